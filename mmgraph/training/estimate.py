"""Estimates of disk space, memory and time per step, from the shapes of a run alone."""

from typing import NamedTuple

import torch

from mmgraph.config import Config
from mmgraph.models.multimodal_graph_encoder import TrainedModule
from mmgraph.towers.cost import MATMUL_SHARE
from mmgraph.towers.tokens import Towers

PROCESS_GB = {"cpu": 0.9, "cuda": 0.6}  # before any tensor: Python and the loaded libraries; a CUDA context


class Shape(NamedTuple):
    """Sizes of the towers and of the trained module."""

    frozen: int  # number of parameters of both towers
    trained: int  # number of trained parameters
    text_length: int
    patches: int
    image_size: int  # pixels per side
    d_text: int
    d_vis: int
    fused_dim: int
    tower_flops: float  # of both towers, for one node, forward
    fusion_flops: float  # of the trained module, for one node, forward


def shape(towers: Towers, config: Config) -> Shape:
    """Return the sizes. Loads and allocates nothing if the towers are on torch's meta device."""
    text, image = towers
    with torch.device("meta"):
        module = TrainedModule(*towers.widths, config.fused_dim, config.proj_dim)
    frozen = sum(p.numel() for tower in towers for p in tower.model.parameters())
    trained = sum(p.numel() for p in module.parameters())
    length, patches, width = text.length, image.patches, config.fused_dim
    both_towers = text.flops(length) + image.flops()
    projections = length * text.width * width + patches * image.width * width
    # Per token: four projections, and two for the first layer of the FFN. Its second layer is applied to the mean.
    attention_and_ffn = 6 * (length + patches) * width**2 + 4 * length * patches * width
    return Shape(
        frozen, trained, length, patches, image.image_size, text.width, image.width, width, both_towers,
        2.0 * (projections + attention_and_ffn),
    )  # fmt: skip


def epoch_file_bytes(sizes: Shape) -> int:
    """Return the size of an epoch file in bytes."""
    return 4 * (sizes.frozen + 3 * sizes.trained)  # float32, and Adam's two moments


def state_bytes(sizes: Shape) -> int:
    """Return the size of a resume state in bytes."""
    return 12 * sizes.trained  # float32 weights, and Adam's two moments


def final_file_bytes(sizes: Shape) -> int:
    """Return the size of the final file in bytes."""
    return 4 * (sizes.frozen + sizes.trained)


def store_bytes(sizes: Shape, nodes: int, half: bool) -> int:
    """Return the size of a tower store in bytes, at full text length: tokens, and pooled outputs in float32.

    Args:
        nodes: number of nodes.
        half: tokens are stored in float16, else in float32.
    """
    tokens = sizes.text_length * sizes.d_text + sizes.patches * sizes.d_vis
    return nodes * (tokens * (2 if half else 4) + 4 * (sizes.d_text + sizes.d_vis))


def memory_gb(
    sizes: Shape, edges: int, micro_batch_size: int | None, device: str, half: bool, stored: bool = False
) -> float:
    """Estimate the peak memory of a process in GB (10^9 bytes).

    Args:
        edges: number of edges per step on this process.
        micro_batch_size: edges per micro batch; None: all.
        device: ``"cpu"`` or ``"cuda"``.
        half: the network runs in 16 bits.
        stored: tokens are read from a tower store on disk, and no tower is loaded.
    """
    nodes, micro_batch_nodes = 2 * edges, 2 * min(edges, micro_batch_size or edges)
    width = 2 if half else 4
    weights = 20 * sizes.trained  # float32: weight, gradient, gradient bucket, two moments
    weights += 0 if stored else 4 * sizes.frozen
    pixels = 0 if stored else 3 * sizes.image_size**2 * 4
    tokens = (sizes.text_length * sizes.d_text + sizes.patches * sizes.d_vis) * 4
    # The fusion stores about 12 vectors per token for the backward pass. A tower's layer briefly holds about as many.
    fusion = 12 * (sizes.text_length + sizes.patches) * sizes.fused_dim * width
    tower = 0 if stored else 12 * max(sizes.text_length * sizes.d_text, (sizes.patches + 1) * sizes.d_vis) * width
    return PROCESS_GB[device] + (weights + nodes * (pixels + tokens) + micro_batch_nodes * max(fusion, tower)) / 1e9


def step_seconds(
    sizes: Shape, edges: int, micro_batch_size: int | None, flops_per_s: float, stored: bool = False
) -> float:
    """Estimate the computing time of a step on a process, in seconds. The time to read images is not included.

    Args:
        edges: number of edges per step on this process.
        micro_batch_size: edges per micro batch; None: all.
        flops_per_s: measured speed of a large matrix product on this process.
        stored: tokens are read from a tower store, and the towers do not run.
    """
    # A backward pass costs two forward passes. Micro batches recompute the forward pass.
    passes = 4 if micro_batch_size and micro_batch_size < edges else 3
    tower_flops = 0.0 if stored else sizes.tower_flops
    return 2 * edges * (tower_flops + passes * sizes.fusion_flops) / (MATMUL_SHARE * flops_per_s)
