"""A batch embedded in micro batches has the same gradients and needs less memory."""

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
def test_any_number_of_nodes_is_split(nodes: int) -> None:
    """Embeddings and gradients stay the same, also with more parts than nodes, where some parts are empty."""
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
    for complete, split in zip(*results, strict=True):
        assert torch.allclose(complete, split, rtol=1e-4, atol=1e-4)


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


@pytest.mark.slow
def test_micro_batches_need_less_memory() -> None:
    """A step in 8 parts adds less than a third of the memory that a step in 1 part adds to the process.

    The step has 64 edges (128 nodes), and the fusion has the widths of ViT-B/32.
    """
    complete, eighths = (
        float(subprocess.run([sys.executable, "-c", MEASURE, str(parts)], capture_output=True, text=True).stdout)
        for parts in (1, 8)
    )
    print(f"{complete:.2f} GB in 1 part, {eighths:.2f} GB in 8 parts")
    assert eighths < complete / 3
