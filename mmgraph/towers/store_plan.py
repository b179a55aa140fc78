"""What a tower store is of, what it lacks, and what that takes to make."""

import hashlib
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from mmgraph.config import Config
from mmgraph.data.content_hashes import ContentHashes
from mmgraph.data.graph import Graph
from mmgraph.data.node_inputs import TEXT_LENGTH, NodeInputs, node_text
from mmgraph.towers.load import tower_shapes
from mmgraph.towers.store import MAX_SHARDS, SHARD, Modality, TowerStore, shard_name
from mmgraph.utils.files import cache_folder
from mmgraph.utils.units import size

FORMAT = 1  # raised where the same text or image would give other tokens, or the same tokens lie otherwise
DTYPES = {"float32": torch.float32, "float16": torch.float16}


def nodes_seen(config: Config, graph: Graph, steps: int) -> int:
    """How many nodes live towers would see in so many steps, and in the evaluations between them."""
    evaluations = 2 + (steps // config.eval_every if config.eval_every else 0)
    return 2 * config.global_batch_size * steps + (2 * len(graph.nodes) * evaluations if graph.held_out else 0)


class Recipe(NamedTuple):
    """All that tokens depend on but the text or image itself."""

    folder: Path  # of the store; its name is a hash of the description
    description: dict[str, Any]
    dtype: torch.dtype


class Shard(NamedTuple):
    """A file to make."""

    modality: Modality
    name: str
    rows: np.ndarray  # (K,) nodes that have these texts, or images
    hashes: np.ndarray  # (K,) HASH


def recipe(config: Config, precision: str, inputs: NodeInputs, towers: str) -> Recipe:
    """The recipe of a run.

    Args:
        precision: the launch's; ``no`` stores float32, so that default behaviour stays exact.
        towers: the fingerprint of the towers' weights.
    """
    dtype = config.tower_cache_dtype
    if dtype == "auto":
        dtype = "float32" if precision == "no" else "float16"
    text, image = tower_shapes(config.model_name)
    tokenizer = json.loads(inputs.tokenizer.backend_tokenizer.to_str())
    del tokenizer["truncation"], tokenizer["padding"]  # the last call's
    preprocessing = inputs.preprocessing
    description = {
        "format": FORMAT,
        "towers": towers,
        "text": text.description(),
        "vision": image.description(),
        "tokenizer": hashlib.sha256(json.dumps(tokenizer, sort_keys=True).encode()).hexdigest(),
        "text_length": TEXT_LENGTH,
        "preprocessing": {
            "short_side": preprocessing.short_side,
            "crop": preprocessing.crop,
            "mean": preprocessing.mean.flatten().tolist(),
            "std": preprocessing.std.flatten().tolist(),
        },
        "truncated_images": config.truncated_images,
        "dtype": dtype,
    }
    key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
    root = cache_folder(config.nodes) if config.tower_cache in ("auto", "off") else Path(config.tower_cache)
    return Recipe(root / f"towers-{key}", description, DTYPES[dtype])


def missing_shards(store: TowerStore, content_hashes: ContentHashes, among: np.ndarray | None = None) -> list[Shard]:
    """What a store lacks of some nodes: each text and image once, in the order of the nodes.

    Where some shards of a build are there, the rest are those that it would have made: all but the last are full.

    Args:
        among: ascending rows; default: of all nodes.
    """
    among = np.arange(len(content_hashes.texts)) if among is None else among
    shards: dict[Modality, list[Shard]] = {}
    every: dict[Modality, np.ndarray] = {"text": content_hashes.texts, "image": content_hashes.images}
    for modality, hashes in every.items():
        distinct, first = np.unique(hashes[among], return_index=True)
        rows = np.sort(among[first][store.shards(modality).find(distinct) < 0])
        size = max(SHARD, -(-len(distinct) // MAX_SHARDS))
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        shards[modality] = [Shard(modality, shard_name(modality, hashes[part]), part, hashes[part]) for part in parts]
    return [*shards["image"], *shards["text"]]


class Cost(NamedTuple):
    """Of building some shards, by estimate."""

    bytes: int
    flops: float


def cost(config: Config, recipe: Recipe, graph: Graph, inputs: NodeInputs, shards: list[Shard]) -> Cost:
    """Texts are as long as those of up to 256 of the nodes, in tokens."""
    text, image = tower_shapes(config.model_name)
    counts = {
        modality: sum(len(shard.rows) for shard in shards if shard.modality == modality)
        for modality in ("text", "image")
    }
    drawn = np.random.default_rng(0).permutation(len(graph.nodes))[:256]
    _, mask = inputs.texts([node_text(graph.nodes[int(row)]) for row in drawn])
    length = float(mask.sum(dim=1).float().mean())
    width = recipe.dtype.itemsize
    text_bytes = counts["text"] * (text.width * (length * width + 4) + 24)
    image_bytes = counts["image"] * (image.width * (image.patches * width + 4) + 17)
    flops = counts["text"] * text.flops(mask.shape[1]) + counts["image"] * image.flops()
    return Cost(int(text_bytes + image_bytes), flops)


def refusal(folder: Path, needed: int) -> str | None:
    """Why ``needed`` bytes cannot be built in a folder; None where they can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"{folder} cannot be written ({error.strerror})"
    if needed > 0.95 * free:
        return f"{folder} has room for {size(free)}, and the tower store takes {size(needed)}"
    return None
