"""Estimates disk space, memory and time per step from the sizes of the towers, the trained module and the batch."""

from typing import NamedTuple

import torch

from mmgraph.config import Config
from mmgraph.models.multimodal_graph_encoder import TrainedModule
from mmgraph.towers.cost import MATMUL_SHARE
from mmgraph.towers.tokens import Towers

# Memory of a process before it creates tensors: Python and its libraries on a CPU, the CUDA context on a GPU.
PROCESS_GB = {"cpu": 0.9, "cuda": 0.6}


class Sizes(NamedTuple):
    """Sizes of the towers and of the trained module."""

    frozen: int  # number of parameters of both towers
    trained: int  # number of trained parameters
    text_length: int  # text tokens per node
    patches: int  # image tokens per node
    image_size: int  # pixels per side
    d_text: int  # width of a text token
    d_vis: int  # width of an image token
    fused_dim: int
    tower_flops: float  # floating-point operations of both towers in the forward pass of one node
    fusion_flops: float  # floating-point operations of the trained module in the forward pass of one node


def model_sizes(towers: Towers, config: Config) -> Sizes:
    """Return the sizes of the towers and of the trained module.

    If the towers are on torch's meta device, no weights are loaded or allocated.
    """
    text, image = towers
    with torch.device("meta"):
        module = TrainedModule(*towers.widths, config.fused_dim, config.proj_dim)
    frozen = sum(p.numel() for tower in towers for p in tower.model.parameters())
    trained = sum(p.numel() for p in module.parameters())
    length, patches, width = text.length, image.patches, config.fused_dim
    both_towers = text.flops(length) + image.flops()
    projections = length * text.width * width + patches * image.width * width
    # The factor 6 counts four projections of each token, and the first FFN layer, which costs as much as two of them.
    # The second FFN layer is applied only to the mean over the tokens.
    attention_and_ffn = 6 * (length + patches) * width**2 + 4 * length * patches * width
    return Sizes(
        frozen, trained, length, patches, image.image_size, text.width, image.width, width, both_towers,
        2.0 * (projections + attention_and_ffn),
    )  # fmt: skip


def epoch_file_bytes(sizes: Sizes) -> int:
    """Return the size of an epoch file in bytes."""
    return 4 * (sizes.frozen + 3 * sizes.trained)  # float32, and Adam's two moments


def state_bytes(sizes: Sizes) -> int:
    """Return the size of a resume state in bytes."""
    return 12 * sizes.trained  # float32 weights, and Adam's two moments


def final_file_bytes(sizes: Sizes) -> int:
    """Return the size of the final file in bytes."""
    return 4 * (sizes.frozen + sizes.trained)


def store_bytes(sizes: Sizes, nodes: int, half: bool) -> int:
    """Return the size of a tower store in bytes, if all texts have the full length.

    A store has the tokens of each node, and the pooled outputs in float32.

    Args:
        nodes: number of nodes.
        half: whether tokens are stored in 16 bits. Otherwise they are stored in float32.
    """
    tokens = sizes.text_length * sizes.d_text + sizes.patches * sizes.d_vis
    return nodes * (tokens * (2 if half else 4) + 4 * (sizes.d_text + sizes.d_vis))


def memory_gb(
    sizes: Sizes, edges: int, micro_batch_size: int | None, device: str, half: bool, stored: bool = False
) -> float:
    """Estimate the peak memory of a process in GB (10^9 bytes).

    Args:
        edges: number of edges per step on this process.
        micro_batch_size: edges per micro batch; None: there are no micro batches.
        device: ``"cpu"`` or ``"cuda"``.
        half: whether the network computes in 16 bits.
        stored: whether tokens are read from a tower store on disk. No tower is loaded in this case.
    """
    nodes, micro_batch_nodes = 2 * edges, 2 * min(edges, micro_batch_size or edges)
    width = 2 if half else 4
    weights = 20 * sizes.trained  # float32 weight, gradient, gradient bucket and two moments of each parameter
    weights += 0 if stored else 4 * sizes.frozen
    pixels = 0 if stored else 3 * sizes.image_size**2 * 4
    tokens = (sizes.text_length * sizes.d_text + sizes.patches * sizes.d_vis) * 4
    # The fusion keeps about 12 vectors per token for the backward pass. A tower has no backward pass. It needs about 12
    # vectors per token, for the layer that it is computing.
    fusion = 12 * (sizes.text_length + sizes.patches) * sizes.fused_dim * width
    tower = 0 if stored else 12 * max(sizes.text_length * sizes.d_text, (sizes.patches + 1) * sizes.d_vis) * width
    return PROCESS_GB[device] + (weights + nodes * (pixels + tokens) + micro_batch_nodes * max(fusion, tower)) / 1e9


def step_seconds(
    sizes: Sizes, edges: int, micro_batch_size: int | None, flops_per_s: float, stored: bool = False
) -> float:
    """Estimate the computing time of a step on a process, in seconds. The time to read images is not included.

    Args:
        edges: number of edges per step on this process.
        micro_batch_size: edges per micro batch; None: there are no micro batches.
        flops_per_s: measured speed of a large matrix product in this process.
        stored: whether tokens are read from a tower store. The towers do not run in this case.
    """
    # A backward pass costs as much as two forward passes. With micro batches, the forward pass is computed twice.
    passes = 4 if micro_batch_size and micro_batch_size < edges else 3
    tower_flops = 0.0 if stored else sizes.tower_flops
    return 2 * edges * (tower_flops + passes * sizes.fusion_flops) / (MATMUL_SHARE * flops_per_s)
