"""Plans a tower store: what determines its tokens (the recipe), which shards it lacks, and what building them costs."""

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
from mmgraph.data.node_inputs import TEXT_LENGTH, NodeInputs
from mmgraph.towers.load import tower_shapes
from mmgraph.towers.store import MAX_SHARDS, SHARD, Modality, TowerStore, shard_name
from mmgraph.utils.files import cache_folder
from mmgraph.utils.units import size

# Increase this number when a change of the code changes the tokens of a text or image, or the layout of the shards.
FORMAT = 1
DTYPES = {"float32": torch.float32, "float16": torch.float16}


def nodes_seen(config: Config, graph: Graph, steps: int) -> int:
    """Return how many nodes live towers process in ``steps`` steps and their evaluations.

    A node is counted each time that it is processed.
    """
    evaluations = 2 + (steps // config.eval_every if config.eval_every else 0)
    return 2 * config.global_batch_size * steps + (2 * len(graph.nodes) * evaluations if graph.held_out else 0)


class Recipe(NamedTuple):
    """Everything that determines the tokens, except the text or image itself."""

    folder: Path  # the store's folder; its name contains a hash of the description
    description: dict[str, Any]
    dtype: torch.dtype


class Shard(NamedTuple):
    """A shard to build."""

    modality: Modality
    name: str
    rows: np.ndarray  # (K,) rows of nodes that have these texts or images
    hashes: np.ndarray  # (K,) HASH of these texts or images


def recipe(config: Config, precision: str, inputs: NodeInputs, towers: str) -> Recipe:
    """Return the settings that determine the tokens in a run's tower store, and the store's folder.

    Args:
        config: settings of the run.
        precision: mixed precision of the launch. With ``no``, ``--tower_cache_dtype auto`` means float32, so that the
            tokens of a run without mixed precision are exact.
        inputs: contains the tokenizer and the preprocessing.
        towers: fingerprint of the towers' weights.
    """
    dtype = config.tower_cache_dtype
    if dtype == "auto":
        dtype = "float32" if precision == "no" else "float16"
    text, image = tower_shapes(config.model_name)
    tokenizer = json.loads(inputs.tokenizer.backend_tokenizer.to_str())
    del tokenizer["truncation"], tokenizer["padding"]  # these two depend on the tokenizer's last call
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
        **inputs.rules.image_key(),
        "dtype": dtype,
    }
    key = hashlib.sha256(json.dumps(description, sort_keys=True).encode()).hexdigest()[:16]
    root = cache_folder(config.nodes) if config.tower_cache in ("auto", "off") else Path(config.tower_cache)
    return Recipe(root / f"towers-{key}", description, DTYPES[dtype])


def missing_shards(store: TowerStore, content_hashes: ContentHashes, among: np.ndarray | None = None) -> list[Shard]:
    """Return the shards that must be built before a store has the texts and images of some nodes.

    Each missing text and image occurs once, in the order of the nodes. After an interrupted build, these are the shards
    that it has not written: all shards except the last are full, so the remaining entries are divided into
    the same shards again.

    Args:
        store: the store, which may be empty.
        content_hashes: hashes of the graph's texts and images.
        among: ascending rows of the nodes. Default: all nodes.
    """
    among = np.arange(len(content_hashes.texts)) if among is None else among
    shards: dict[Modality, list[Shard]] = {}
    all_hashes: dict[Modality, np.ndarray] = {"text": content_hashes.texts, "image": content_hashes.images}
    for modality, hashes in all_hashes.items():
        unique, first = np.unique(hashes[among], return_index=True)
        rows = np.sort(among[first][store.shards(modality).find(unique) < 0])
        size = max(SHARD, -(-len(unique) // MAX_SHARDS))
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        shards[modality] = [Shard(modality, shard_name(modality, hashes[part]), part, hashes[part]) for part in parts]
    return [*shards["image"], *shards["text"]]


class Cost(NamedTuple):
    """Estimated cost of building shards."""

    bytes: int
    flops: float


def cost(config: Config, recipe: Recipe, graph: Graph, inputs: NodeInputs, shards: list[Shard]) -> Cost:
    """Estimate the cost of building shards. The mean text length is that of up to 256 random nodes."""
    text, image = tower_shapes(config.model_name)
    counts = {
        modality: sum(len(shard.rows) for shard in shards if shard.modality == modality)
        for modality in ("text", "image")
    }
    sample = np.random.default_rng(0).permutation(len(graph.nodes))[:256]
    _, mask = inputs.tokenize([inputs.rules.text(graph.nodes[int(row)]) for row in sample])
    length = float(mask.sum(dim=1).float().mean())
    width = recipe.dtype.itemsize
    text_bytes = counts["text"] * (text.width * (length * width + 4) + 24)
    image_bytes = counts["image"] * (image.width * (image.patches * width + 4) + 17)
    flops = counts["text"] * text.flops(mask.shape[1]) + counts["image"] * image.flops()
    return Cost(int(text_bytes + image_bytes), flops)


def refusal(folder: Path, needed: int) -> str | None:
    """Return why ``needed`` bytes cannot be written to a folder, or None if they can. Create the folder first."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        return f"cannot write to {folder} ({error.strerror})"
    if needed > 0.95 * free:
        return f"{folder} has {size(free)} of free disk space, but the tower store needs {size(needed)}"
    return None
