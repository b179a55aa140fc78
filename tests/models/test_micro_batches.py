"""A batch embedded in parts: the same gradients, and a part's memory."""

import subprocess
import sys

import pytest
import torch
from conftest import tiny_configs
from transformers import CLIPImageProcessor

from mmgraph.data.batches import EdgeBatch
from mmgraph.data.preprocessing import Preprocessing
from mmgraph.models.multimodal_graph_encoder import TrainedModule
from mmgraph.towers.clip import random_towers
from mmgraph.towers.live import LiveTowers


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
