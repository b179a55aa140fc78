"""DeepSpeed's ZeRO on one GPU: the losses of plain training, and resume between the two."""

from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import LOSSES, loss_difference, read_metrics
from gpu_runs import RUN_BOUNDS, STEPS, on_a_gpu, train

pytestmark = [*on_a_gpu, pytest.mark.filterwarnings("ignore")]
FLAGS = ("--save_every=10",)


@pytest.fixture(scope="module", autouse=True)
def _deepspeed() -> None:
    # Reasons other than a missing package are failures: DeepSpeed also raises ImportError for a bad CUDA setup.
    pytest.importorskip("deepspeed", reason="the package deepspeed is not installed", exc_type=ModuleNotFoundError)


@pytest.mark.parametrize("stage", [2, 3])
def test_zero_gives_the_losses_of_plain_training(
    stage: int, graph: Path, tmp_path: Path, trained: Callable[[str], Path]
) -> None:
    train(
        f"deepspeed_zero{stage}.yaml --num_processes 1", tmp_path / "run", graph, f"--max_steps={STEPS}", *FLAGS
    )  # fmt: skip
    difference = loss_difference(tmp_path / "run", trained("cpu"), STEPS)
    print(f"ZeRO-{stage} in bf16: losses within {difference:.1e} of the CPU's")
    assert difference < RUN_BOUNDS["bf16"]


def test_a_run_moves_between_plain_training_and_zero(
    graph: Path, tmp_path: Path, trained: Callable[[str], Path]
) -> None:
    """Each start adds eight steps: plain, ZeRO-2, ZeRO-3, plain."""
    configs = ["single_gpu.yaml", *(f"deepspeed_zero{stage}.yaml --num_processes 1" for stage in (2, 3))]
    for start, config in enumerate([*configs, configs[0]], start=1):
        train(config, tmp_path / "run", graph, f"--max_steps={min(STEPS, 8 * start)}", *FLAGS)
    difference = loss_difference(tmp_path / "run", trained("cpu"), STEPS)
    print(f"plain, ZeRO-2, ZeRO-3, plain: losses within {difference:.1e} of the CPU's")
    assert difference < RUN_BOUNDS["bf16"]
    assert all(row[name] is not None for row in read_metrics(tmp_path / "run") for name in LOSSES)
