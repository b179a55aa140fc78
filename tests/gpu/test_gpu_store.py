"""Token sources on a GPU: a store in the device's memory, a store on disk, and live towers."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import line_with, loss_difference
from gpu_runs import DEVICE, RUN_BOUNDS, STEPS, needs_cuda, on_a_gpu, train

from mmgraph.towers.resident import ResidentTokens
from mmgraph.towers.store import TowerStore

pytestmark = on_a_gpu


@needs_cuda
def test_a_store_in_device_memory_gives_the_losses_of_the_store_on_disk(graph: Path, tmp_path: Path) -> None:
    """The losses are not equal to the bit, because kernels may sum gradients in another order."""
    for place, words in (("cuda", "memory of cuda"), ("cpu", "read from disk")):
        flags = (f"--max_steps={STEPS}", f"--tower_cache_device={place}")
        text = train("single_gpu.yaml", tmp_path / place, graph, *flags)
        assert words in line_with(text, "40 nodes", "tokens")
    difference = loss_difference(tmp_path / "cuda", tmp_path / "cpu", STEPS)
    print(f"store in device memory against store on disk: losses within {difference:.1e}")
    assert difference < RUN_BOUNDS["bf16"]


def test_tokens_in_device_memory_equal_those_on_disk(trained: Callable[[str], Path]) -> None:
    [folder] = set(re.findall(r"tower store: (\S+), 40 nodes", (trained("bf16") / "training_log.txt").read_text()))
    store = TowerStore(Path(folder))
    count = min(int(store.texts.starts[-1]), int(store.images.starts[-1]))
    entries = np.arange(count)
    resident = ResidentTokens.load(store, entries, entries, DEVICE)
    rows, length = torch.arange(count, device=DEVICE), int(resident.offsets.diff().max())
    on_device, on_disk = resident.tokens(rows, rows, length)[:3], store.tokens(entries, entries)[:3]
    assert all(torch.equal(ours.cpu(), theirs) for ours, theirs in zip(on_device, on_disk, strict=True))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_live_towers_give_the_losses_of_the_store(
    precision: str, graph: Path, tmp_path: Path, trained: Callable[[str], Path]
) -> None:
    flags = (f"--max_steps={STEPS}", "--tower_cache=off", "--num_workers=2")
    train(f"single_gpu.yaml --mixed_precision {precision}", tmp_path / "live", graph, *flags)
    difference = loss_difference(tmp_path / "live", trained(precision), STEPS)
    print(f"{precision}: live towers against the store, losses within {difference:.1e}")
    assert difference < RUN_BOUNDS[precision]


def test_the_same_command_gives_the_same_losses_again(
    graph: Path, tmp_path: Path, trained: Callable[[str], Path]
) -> None:
    """Whether a second run is equal to the bit is printed: kernels may sum in another order."""
    flags = (f"--max_steps={STEPS}", "--save_every=10")
    train("single_gpu.yaml --mixed_precision bf16", tmp_path / "again", graph, *flags)
    difference = loss_difference(tmp_path / "again", trained("bf16"), STEPS)
    print(f"a second run: losses within {difference:.1e}, {'equal' if difference == 0 else 'not equal'} to the bit")
    assert difference < RUN_BOUNDS["bf16"]


def test_a_resumed_run_continues(graph: Path, tmp_path: Path, trained: Callable[[str], Path]) -> None:
    for steps in (11, STEPS):
        flags = (f"--max_steps={steps}", "--save_every=10")
        train("single_gpu.yaml --mixed_precision bf16", tmp_path / "run", graph, *flags)
    difference = loss_difference(tmp_path / "run", trained("bf16"), STEPS)
    print(f"stopped and resumed: losses within {difference:.1e}")
    assert difference < RUN_BOUNDS["bf16"]
