"""Filling a tower store: what it is of, what it lacks, and the building by all ranks."""

import hashlib
import json
import shutil
import sys
import tempfile
import time
import uuid
from collections import deque
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save
from tqdm import tqdm

from mmgraph import estimate
from mmgraph.config import Config
from mmgraph.contents import HASH, Contents, image_hash
from mmgraph.errors import UserError
from mmgraph.files import POLL_SECONDS, cache_folder, claimed, write_durably
from mmgraph.graph import Graph
from mmgraph.images import read_file
from mmgraph.loader.node_inputs import TEXT_LENGTH, NodeInputs, node_text
from mmgraph.text_log import log
from mmgraph.tower_store import MOST_SHARDS, SHARD, Kind, TowerStore, shard_name
from mmgraph.towers import Towers, load_tower_configs, load_towers
from mmgraph.world import from_main_process, together

FORMAT = 1  # raised where the same text or image would give other tokens, or the same tokens lie otherwise
BATCH = 64  # entries that a tower sees at once; fixed, so that the bytes do not depend on who builds
PROGRESS_SECONDS = 60
DTYPES = {"float32": torch.float32, "float16": torch.float16}


class Recipe(NamedTuple):
    """All that tokens depend on but the text or image itself."""

    folder: Path  # of the store; its name is a hash of the description
    description: dict[str, Any]
    dtype: torch.dtype


class Shard(NamedTuple):
    """A file to make."""

    kind: Kind
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
    text, vision = load_tower_configs(config.model_name)
    both = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
            "layer_norm_eps")  # fmt: skip
    tokenizer = json.loads(inputs.tokenizer.backend_tokenizer.to_str())
    del tokenizer["truncation"], tokenizer["padding"]  # the last call's
    preprocessing = inputs.preprocessing
    description = {
        "format": FORMAT,
        "towers": towers,
        "text": {name: getattr(text, name) for name in (*both, "max_position_embeddings", "eos_token_id")},
        "vision": {name: getattr(vision, name) for name in (*both, "image_size", "patch_size")},
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


def missing_shards(store: TowerStore, contents: Contents, among: np.ndarray | None = None) -> list[Shard]:
    """What a store lacks of some nodes: each text and image once, in the order of the nodes.

    Where some shards of a build are there, the rest are those that it would have made: all but the last are full.

    Args:
        among: ascending rows; default: of all nodes.
    """
    among = np.arange(len(contents.texts)) if among is None else among
    shards: dict[Kind, list[Shard]] = {}
    every: dict[Kind, np.ndarray] = {"text": contents.texts, "image": contents.images}
    for kind, hashes in every.items():
        distinct, first = np.unique(hashes[among], return_index=True)
        rows = np.sort(among[first][store.shards(kind).find(distinct) < 0])
        size = max(SHARD, -(-len(distinct) // MOST_SHARDS))
        parts = [rows[start : start + size] for start in range(0, len(rows), size)]
        shards[kind] = [Shard(kind, shard_name(kind, hashes[part]), part, hashes[part]) for part in parts]
    return [*shards["image"], *shards["text"]]


class Cost(NamedTuple):
    """Of building some shards, by estimate."""

    bytes: int
    flops: float


def cost(config: Config, recipe: Recipe, graph: Graph, inputs: NodeInputs, shards: list[Shard]) -> Cost:
    """Texts are as long as those of up to 256 of the nodes, in tokens."""
    text, vision = load_tower_configs(config.model_name)
    counts = {kind: sum(len(shard.rows) for shard in shards if shard.kind == kind) for kind in ("text", "image")}
    drawn = np.random.default_rng(0).permutation(len(graph.nodes))[:256]
    _, mask = inputs.texts([node_text(graph.nodes[int(row)]) for row in drawn])
    length = float(mask.sum(dim=1).float().mean())
    patches = (int(vision.image_size) // int(vision.patch_size)) ** 2  # type: ignore[arg-type]
    width = recipe.dtype.itemsize
    text_bytes = counts["text"] * (text.hidden_size * (length * width + 4) + 24)
    image_bytes = counts["image"] * (vision.hidden_size * (patches * width + 4) + 17)
    flops = counts["text"] * estimate.tower_flops(text, mask.shape[1])
    flops += counts["image"] * estimate.tower_flops(vision, patches + 1)
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
        return f"{folder} has room for {estimate.size(free)}, and the tower store takes {estimate.size(needed)}"
    return None


def build(
    config: Config,
    accelerator: Accelerator,
    graph: Graph,
    inputs: NodeInputs,
    recipe: Recipe,
    shards: list[Shard],
    expected: Cost,
) -> None:
    """Make the shards, each rank its share and then what others have not begun. Called by all ranks.

    Another run that builds the same store shares the work. A build that is killed goes on where it stopped; it loses
    the shard that it was at.
    """
    folder, entries = recipe.folder, sum(len(shard.rows) for shard in shards)
    speed = min(gather_object([estimate.matmul_flops_per_s(accelerator.device, torch.float32)]))
    seconds = expected.flops / (estimate.MATMUL_SHARE * speed * accelerator.num_processes)
    log(
        f"tower store: {folder}; {entries:,} texts and images go through the towers once, about "
        f"{estimate.size(expected.bytes)} and {estimate.duration(seconds)} (--tower_cache off runs the towers live)"
    )
    index, size = _place(accelerator, folder)
    if index == 0:
        description = json.dumps(recipe.description, indent=2) + "\n"
        write_durably(folder / "store.json", lambda path: path.write_text(description), shared=True)
    begun = time.perf_counter()
    towers = Towers(*(tower.to(accelerator.device) for tower in load_towers(config.model_name)))
    own = shards[index::size]
    queue = deque([*own, *reversed([shard for i, shard in enumerate(shards) if i % size != index])])
    with ThreadPoolExecutor(max(1, config.num_workers)) as readers, _Progress(entries, accelerator) as progress:
        maker = _Maker(graph, inputs, towers, recipe.dtype, accelerator.device, readers, progress)
        # In step with the others, a shard at a time: no rank waits longer for another, and all learn of a failure.
        while any(gather_object([bool(queue)])):
            made = together(accelerator, lambda: maker.make_next(queue, folder))
            progress.add(sum(gather_object([made])) - made)  # what others made; its own the maker tells
    log(f"tower store: built in {estimate.duration(time.perf_counter() - begun)}")


class _Progress:
    """How far all ranks together are: a bar on the main process's terminal, or a line a minute where it has none."""

    def __init__(self, entries: int, accelerator: Accelerator):
        self.terminal = accelerator.is_main_process and sys.stderr.isatty()
        self.bar = tqdm(total=entries, unit="input", disable=not self.terminal, dynamic_ncols=True)
        self.entries, self.done, self.begun = entries, 0, time.perf_counter()
        self.told = self.begun

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, entries: int) -> None:
        now = time.perf_counter()
        self.done += entries
        self.bar.update(entries)
        if not self.terminal and self.done and now - self.told > PROGRESS_SECONDS:
            self.told, left = now, (now - self.begun) * (self.entries / self.done - 1)
            log(f"tower store: {self.done:,} of {self.entries:,}, about {estimate.duration(left)} left")


def _place(accelerator: Accelerator, folder: Path) -> tuple[int, int]:
    """This rank's number among those that write to the same folder, and how many these are."""
    probe = folder / f".probe-{uuid.uuid4().hex}"
    name = from_main_process(accelerator, lambda: _touched(probe).name)
    shared = all(gather_object([(folder / name).exists()]))
    if accelerator.is_main_process:
        probe.unlink()
    if shared:
        return accelerator.process_index, accelerator.num_processes
    together(accelerator, lambda: folder.mkdir(parents=True, exist_ok=True))  # each host has a folder of its own
    hosts = gather_object([accelerator.local_process_index])
    return accelerator.local_process_index, 1 + max(hosts)


def _touched(path: Path) -> Path:
    path.touch()
    return path


class _Maker(NamedTuple):
    graph: Graph
    inputs: NodeInputs
    towers: Towers  # float32
    dtype: torch.dtype  # of the tokens
    device: torch.device
    readers: ThreadPoolExecutor
    progress: "_Progress"

    def make_next(self, queue: "deque[Shard]", folder: Path) -> int:
        """Make the first shard of the queue that nobody has made or is making; 0, or how many entries it has.

        What is there leaves the queue; what others are at goes to its end, for they may be killed.
        """
        for _ in range(len(queue)):
            shard = queue.popleft()
            with claimed(folder / shard.name) as file:
                if file is not None:
                    file.write(self.make(shard))
                    return len(shard.rows)
            if not (folder / shard.name).exists():
                queue.append(shard)
        time.sleep(POLL_SECONDS if queue else 0)
        return 0

    @torch.no_grad()
    def make(self, shard: Shard) -> bytes:
        """The bytes of a shard's file."""
        parts: dict[str, list[torch.Tensor]] = {}
        for entries in self._texts(shard) if shard.kind == "text" else self._images(shard):
            for name, tensor in entries.items():
                parts.setdefault(name, []).append(tensor.cpu())
            self.progress.add(len(entries["pooled"]))
        tensors = {name: torch.cat(tensors) for name, tensors in parts.items()}
        if shard.kind == "text":
            tensors["offsets"] = torch.cat([torch.zeros(1, dtype=torch.int64), tensors.pop("lengths").cumsum(0)])
        tensors["hashes"] = torch.from_numpy(shard.hashes.view(np.uint8).reshape(-1, HASH.itemsize).copy())
        return save(tensors, metadata={"format": "pt"})

    def _texts(self, shard: Shard) -> Iterator[dict[str, torch.Tensor]]:
        for rows in _batches(shard.rows):
            input_ids, mask = self.inputs.texts([node_text(self.graph.nodes[int(row)]) for row in rows])
            input_ids, mask = input_ids.to(self.device), mask.to(self.device)
            output = self.towers.text_model(input_ids=input_ids, attention_mask=mask)
            tokens = output.last_hidden_state[mask.bool()]  # (k, L, d_text) -> (t, d_text)
            yield {"tokens": self._cast(tokens), "lengths": mask.sum(dim=1), "pooled": output.pooler_output}

    def _images(self, shard: Shard) -> Iterator[dict[str, torch.Tensor]]:
        hashes = shard.hashes.view(np.uint8).reshape(-1, HASH.itemsize)
        read = self.readers.map(self._picture, shard.rows.tolist(), [row.tobytes() for row in hashes])
        for rows in _batches(shard.rows):
            pictures, causes = zip(*(next(read) for _ in rows), strict=True)
            pixels = self.inputs.preprocessing.normalize(torch.stack(pictures).to(self.device))
            output = self.towers.vision_model(pixel_values=pixels)
            patches = output.last_hidden_state[:, 1:]  # (k, 1 + P, d_vis) -> (k, P, d_vis)
            told = torch.tensor(causes, dtype=torch.uint8)
            yield {"patches": self._cast(patches), "causes": told, "pooled": output.pooler_output}

    def _picture(self, row: int, expected: bytes) -> tuple[torch.Tensor, int]:
        path = self.graph.paths.resolve(self.graph.nodes[row]["image_path"])
        data, cause = read_file(path)
        if image_hash(data, cause) != expected:
            raise UserError(f"{path} changed while the tower store was built; start again, and it goes on")
        return self.inputs.picture_of(data, cause)

    def _cast(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens.to(self.dtype)
        if not tokens.isfinite().all():
            raise UserError("tokens of these towers are beyond float16: --tower_cache_dtype float32")
        return tokens


def _batches(rows: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), BATCH):
        yield rows[start : start + BATCH]
