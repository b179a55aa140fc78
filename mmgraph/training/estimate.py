"""What a run will take, from its shapes alone: disk, memory, time of a step. Estimates, and said to be."""

from typing import NamedTuple

import torch

from mmgraph.config import Config
from mmgraph.models.multimodal_graph_encoder import TrainedModule
from mmgraph.towers.cost import MATMUL_SHARE
from mmgraph.towers.tokens import Towers

PROCESS_GB = {"cpu": 0.9, "cuda": 0.6}  # Python with the libraries' code; a CUDA context


class Shape(NamedTuple):
    """Sizes of the towers and of what is trained."""

    frozen: int  # parameters of both towers
    trained: int  # parameters
    text_length: int
    patches: int
    image_size: int  # pixels a side
    d_text: int
    d_vis: int
    fused_dim: int
    tower_flops: float  # of a node, forward
    fusion_flops: float  # of a node, forward


def shape(towers: Towers, config: Config) -> Shape:
    """The sizes, without loading or allocating anything where the towers are on torch's meta device."""
    text, image = towers
    with torch.device("meta"):
        module = TrainedModule(*towers.widths, config.fused_dim, config.proj_dim)
    frozen = sum(p.numel() for tower in towers for p in tower.model.parameters())
    trained = sum(p.numel() for p in module.parameters())
    length, patches, width = text.length, image.patches, config.fused_dim
    both_towers = text.flops(length) + image.flops()
    projections = length * text.width * width + patches * image.width * width
    # Four projections a token, and two for the first layer after them: the second is applied to their mean.
    attention_and_ffn = 6 * (length + patches) * width**2 + 4 * length * patches * width
    return Shape(
        frozen, trained, length, patches, image.image_size, text.width, image.width, width, both_towers,
        2.0 * (projections + attention_and_ffn),
    )  # fmt: skip


def epoch_file_bytes(sizes: Shape) -> int:
    return 4 * (sizes.frozen + 3 * sizes.trained)  # float32, and Adam's two moments


def state_bytes(sizes: Shape) -> int:
    return 12 * sizes.trained


def final_file_bytes(sizes: Shape) -> int:
    return 4 * (sizes.frozen + sizes.trained)


def store_bytes(sizes: Shape, nodes: int, half: bool) -> int:
    """Of a tower store, at full text length: tokens, and pooled outputs in float32."""
    tokens = sizes.text_length * sizes.d_text + sizes.patches * sizes.d_vis
    return nodes * (tokens * (2 if half else 4) + 4 * (sizes.d_text + sizes.d_vis))


def memory_gb(
    sizes: Shape, edges: int, micro_batch_size: int | None, device: str, half: bool, stored: bool = False
) -> float:
    """The most memory of a process, in GB (10^9 bytes).

    Args:
        edges: of a step, on this process.
        half: the network runs in 16 bits.
        stored: tokens come from a tower store on the disk, and no tower is loaded.
    """
    nodes, at_once = 2 * edges, 2 * min(edges, micro_batch_size or edges)
    width = 2 if half else 4
    weights = 20 * sizes.trained  # weight, gradient, its bucket, two moments
    weights += 0 if stored else 4 * sizes.frozen
    pixels = 0 if stored else 3 * sizes.image_size**2 * 4
    tokens = (sizes.text_length * sizes.d_text + sizes.patches * sizes.d_vis) * 4
    # A fusion token keeps about 12 vectors for the backward pass; a tower's layer holds about as many for a moment.
    fusion = 12 * (sizes.text_length + sizes.patches) * sizes.fused_dim * width
    tower = 0 if stored else 12 * max(sizes.text_length * sizes.d_text, (sizes.patches + 1) * sizes.d_vis) * width
    return PROCESS_GB[device] + (weights + nodes * (pixels + tokens) + at_once * max(fusion, tower)) / 1e9


def step_seconds(
    sizes: Shape, edges: int, micro_batch_size: int | None, flops_per_s: float, stored: bool = False
) -> float:
    """The time of a step's arithmetic on a process with ``edges`` edges; with live towers, images come on top."""
    passes = 4 if micro_batch_size and micro_batch_size < edges else 3  # backward costs two; recomputing one more
    tower_flops = 0.0 if stored else sizes.tower_flops
    return 2 * edges * (tower_flops + passes * sizes.fusion_flops) / (MATMUL_SHARE * flops_per_s)
