"""Batches larger than memory: the same gradients in parts, and a part's memory."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import loss_difference, settings, tiny_configs
from launches import ZERO3, launch, run_warm
from transformers import CLIPImageProcessor

from mmgraph.data.batches import EdgeBatch
from mmgraph.data.preprocessing import Preprocessing
from mmgraph.models.multimodal_graph_encoder import TrainedModule
from mmgraph.towers.clip import random_towers
from mmgraph.towers.live import LiveTowers

ZERO = "deepspeed_zero{}.yaml --num_processes 2 --mixed_precision no"


@pytest.mark.parametrize("config", ["cpu_2proc.yaml", ZERO.format(2)])
def test_gradients_in_parts_are_those_of_the_whole(graph: Path, tmp_path: Path, config: str) -> None:
    """Halves, quarters and eighths of a process's 16 edges, over two processes."""
    script, target = str(Path(__file__).parent / "micro_batch_gradients.py"), str(tmp_path / "gradients.pt")
    done = run_warm([script, target, *settings(graph, tmp_path / "run", "--batch_size=32")], config)
    assert done.returncode == 0, done.stderr[-3000:]
    whole, *parts = torch.load(target)
    norm = torch.cat([gradient.flatten() for gradient in whole]).norm()
    assert norm > 0.1
    for number, gradients in zip((2, 4, 8), parts, strict=True):
        difference = torch.cat([(a - b).flatten() for a, b in zip(gradients, whole, strict=True)]).norm() / norm
        print(f"1/{number}: {float(difference):.1e}")
        assert 0 <= difference < 1e-5


@pytest.mark.parametrize(
    "config", [ZERO3, *(pytest.param(c, marks=pytest.mark.slow) for c in ("cpu.yaml", "cpu_2proc.yaml",
                                                                                  ZERO.format(1), ZERO.format(2)))]
)  # fmt: skip
def test_a_run_in_micro_batches(graph: Path, one_process: Path, tmp_path: Path, config: str) -> None:
    """Ranks have different numbers of distinct nodes, and must still make the same number of parts under ZeRO-3."""
    launch(config, *settings(graph, tmp_path / "run", "--max_steps=30", "--micro_batch_size=1"))
    assert loss_difference(tmp_path / "run", one_process, 30) < 1e-5


@pytest.mark.parametrize("nodes", [3, 8, 11])
def test_any_number_of_nodes_splits(nodes: int) -> None:
    """Also into more parts than there are nodes, which leaves some empty."""
    towers = random_towers(*tiny_configs())
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "input_ids": torch.randint(60, (nodes, 7), generator=generator),
        "attention_mask": torch.ones(nodes, 7, dtype=torch.int64),
        "pictures": torch.randint(256, (nodes, 3, 32, 32), dtype=torch.uint8, generator=generator),
    }
    rows = torch.arange(nodes)
    batch = EdgeBatch(rows, rows, rows, rows.numpy(), inputs=inputs)
    source = LiveTowers(towers, Preprocessing(CLIPImageProcessor()), torch.device("cpu"))
    module = TrainedModule(32, 48, 24, 16)
    results = []
    for parts in (1, 4):
        module.zero_grad()
        z = module(source.tokens(batch, parts), parts)
        sum((x * torch.arange(16)).square().sum() for x in z).backward()
        results.append([*z, *(p.grad.clone() for p in module.parameters())])
    for whole, in_parts in zip(*results, strict=True):
        assert torch.allclose(whole, in_parts, rtol=1e-4, atol=1e-4)


MEASURE = """
import sys, torch
from mmgraph.models.multimodal_graph_encoder import TrainedModule
from mmgraph.towers.tokens import Tokens
from mmgraph.distributed.launch import peak_memory_gb
cpu = torch.device("cpu")
parts = int(sys.argv[1])
module = TrainedModule(512, 768, 512, 256)
def step(nodes):
    tokens = Tokens(torch.randn(nodes, 77, 512), torch.ones(nodes, 77), torch.randn(nodes, 49, 768))
    before = peak_memory_gb(cpu)
    z = module(tokens, parts)
    (z[0] @ z[1].T + z[2] @ z[1].T).sum().backward()
    return peak_memory_gb(cpu) - before
step(8)
print(step(128))
"""


def test_memory_is_a_parts() -> None:
    """Of the fusion at ViT-B/32's size, 64 edges: what a step adds to the process, in GB, whole and in eighths."""
    whole, eighths = (
        float(subprocess.run([sys.executable, "-c", MEASURE, str(parts)], capture_output=True, text=True).stdout)
        for parts in (1, 8)
    )
    print(f"{whole:.2f} GB whole, {eighths:.2f} GB in eighths")
    assert eighths < whole / 3
