"""What a run will take, from its shapes alone: disk, memory, time of a step. Estimates, and said to be."""

from typing import NamedTuple

import torch
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModel

from mmgraph.config import Config
from mmgraph.models.multimodal_graph_encoder import TrainedModule
from mmgraph.towers.cost import MATMUL_SHARE, tower_flops

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


def shape(text: CLIPTextConfig, vision: CLIPVisionConfig, config: Config) -> Shape:
    """The sizes, without loading or allocating anything."""
    with torch.device("meta"):
        towers = (CLIPTextModel(text), CLIPVisionModel(vision))
        module = TrainedModule(text.hidden_size, vision.hidden_size, config.fused_dim, config.proj_dim)
    frozen, trained = (sum(p.numel() for m in modules for p in m.parameters()) for modules in (towers, (module,)))
    image_size, patch_size = int(vision.image_size), int(vision.patch_size)  # type: ignore[arg-type]
    length, patches = text.max_position_embeddings, (image_size // patch_size) ** 2
    both_towers = tower_flops(text, length) + tower_flops(vision, patches + 1)
    width = config.fused_dim
    projections = length * text.hidden_size * width + patches * vision.hidden_size * width
    # Four projections a token, and two for the first layer after them: the second is applied to their mean.
    attention_and_ffn = 6 * (length + patches) * width**2 + 4 * length * patches * width
    return Shape(
        frozen, trained, length, patches, image_size, text.hidden_size, vision.hidden_size, width, both_towers,
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
