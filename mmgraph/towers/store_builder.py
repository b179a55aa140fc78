"""Filling a tower store, by all ranks."""

import json
import sys
import time
import uuid
from collections import deque
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors.torch import save
from tqdm import tqdm

from mmgraph.config import Config
from mmgraph.data.content_hashes import HASH, image_hash, text_hash
from mmgraph.data.graph import Graph
from mmgraph.data.node_inputs import NodeInputs, node_text
from mmgraph.distributed.collectives import (
    broadcast_from_main_process,
    on_main_process,
    raise_on_all_ranks,
    work_on_all_ranks,
)
from mmgraph.errors import UserError
from mmgraph.towers.cost import MATMUL_SHARE, matmul_flops_per_s
from mmgraph.towers.load import load_towers
from mmgraph.towers.store_plan import Cost, Recipe, Shard
from mmgraph.towers.tokens import Towers
from mmgraph.utils.files import POLL_SECONDS, claim_file, explain_disk_errors, write_durably
from mmgraph.utils.log import log
from mmgraph.utils.units import duration, size

BATCH = 64  # entries that a tower sees at once; fixed, so that the bytes do not depend on who builds
PROGRESS_SECONDS = 60


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
    speed = min(gather_object([matmul_flops_per_s(accelerator.device, torch.float32)]))
    seconds = expected.flops / (MATMUL_SHARE * speed * accelerator.num_processes)
    log(
        f"tower store: {folder}; {entries:,} texts and images go through the towers once, about "
        f"{size(expected.bytes)} and {duration(seconds)} (--tower_cache off runs the towers live)"
    )
    index, builders = _place(accelerator, folder)
    description = json.dumps(recipe.description, indent=2) + "\n"
    raise_on_all_ranks(accelerator, lambda: _describe(folder, description) if index == 0 else None)
    begun = time.perf_counter()
    towers = raise_on_all_ranks(accelerator, lambda: load_towers(config.model_name).to(accelerator.device))
    own = shards[index::builders]
    queue = deque([*own, *reversed([shard for i, shard in enumerate(shards) if i % builders != index])])
    with ThreadPoolExecutor(max(1, config.num_workers)) as readers, _Progress(entries, accelerator) as progress:
        maker = _ShardBuilder(graph, inputs, towers, recipe.dtype, accelerator.device, readers, progress)
        for others in work_on_all_ranks(accelerator, _saying_why(maker.work(queue, folder), folder)):
            progress.add(others)  # what is made here the maker tells
    log(f"tower store: built in {duration(time.perf_counter() - begun)}")


def _describe(folder: Path, description: str) -> None:
    write_durably(folder / "store.json", lambda path: path.write_text(description), shared=True)


def _saying_why(counts: Iterator[int], folder: Path) -> Iterator[int]:
    with explain_disk_errors(folder, "make room for the tower store, or --tower_cache off runs the towers live"):
        yield from counts


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
            log(f"tower store: {self.done:,} of {self.entries:,}, about {duration(left)} left")


def _place(accelerator: Accelerator, folder: Path) -> tuple[int, int]:
    """This rank's number among those that write to the same folder, and how many these are."""
    probe = folder / f".probe-{uuid.uuid4().hex}"
    name = broadcast_from_main_process(accelerator, lambda: _touched(probe).name)
    shared = all(gather_object([(folder / name).exists()]))
    on_main_process(accelerator, probe.unlink)
    if shared:
        return accelerator.process_index, accelerator.num_processes
    raise_on_all_ranks(
        accelerator, lambda: folder.mkdir(parents=True, exist_ok=True)
    )  # each host has a folder of its own
    hosts = gather_object([accelerator.local_process_index])
    return accelerator.local_process_index, 1 + max(hosts)


def _touched(path: Path) -> Path:
    path.touch()
    return path


class _ShardBuilder(NamedTuple):
    graph: Graph
    inputs: NodeInputs
    towers: Towers  # float32
    dtype: torch.dtype  # of the tokens
    device: torch.device
    readers: ThreadPoolExecutor
    progress: "_Progress"

    def work(self, queue: "deque[Shard]", folder: Path) -> Iterator[int]:
        """Make the shards of the queue that nobody has made or is making. Yields counts of made entries.

        What is there leaves the queue; what others are at goes to its end, for they may be killed. Where that is all
        that is left, yields 0 from time to time.
        """
        while queue:
            for _ in range(len(queue)):
                shard = queue.popleft()
                if (folder / shard.name).exists():
                    continue
                with claim_file(folder / shard.name) as file:
                    if file is not None:
                        file.write((yield from self.make(shard)))
                if not (folder / shard.name).exists():
                    queue.append(shard)
            time.sleep(POLL_SECONDS if queue else 0)
            yield 0

    def make(self, shard: Shard) -> Generator[int, None, bytes]:
        """Yields how many entries each batch has, and returns the bytes of the shard's file."""
        parts: dict[str, list[torch.Tensor]] = {}
        for entries in self._texts(shard) if shard.modality == "text" else self._images(shard):
            for name, tensor in entries.items():
                parts.setdefault(name, []).append(tensor.cpu())
            count = len(entries["pooled"])
            self.progress.add(count)
            yield count
        tensors = {name: torch.cat(tensors) for name, tensors in parts.items()}
        if shard.modality == "text":
            tensors["offsets"] = torch.cat([torch.zeros(1, dtype=torch.int64), tensors.pop("lengths").cumsum(0)])
        tensors["hashes"] = torch.from_numpy(_bytes(shard.hashes).copy())
        return save(tensors, metadata={"format": "pt"})

    def _texts(self, shard: Shard) -> Iterator[dict[str, torch.Tensor]]:
        for rows, hashes in zip(_batches(shard.rows), _batches(_bytes(shard.hashes)), strict=True):
            texts = [node_text(self.graph.nodes[int(row)]) for row in rows]
            if any(text_hash(text) != expected.tobytes() for text, expected in zip(texts, hashes, strict=True)):
                raise UserError("the node table changed while the tower store was built; start again, and it goes on")
            input_ids, mask = self.inputs.texts(texts)
            input_ids, mask = input_ids.to(self.device), mask.to(self.device)
            output = self.towers.text.tokens(input_ids, mask)
            assert output.mask is not None
            tokens = output.sequence[output.mask.bool()]  # (k, L, d_text) -> (t, d_text)
            yield {"tokens": self._cast(tokens), "lengths": output.mask.sum(dim=1), "pooled": output.pooled}

    def _images(self, shard: Shard) -> Iterator[dict[str, torch.Tensor]]:
        hashes = [expected.tobytes() for expected in _bytes(shard.hashes)]
        read = self.readers.map(self._picture, shard.rows.tolist(), hashes)
        for rows in _batches(shard.rows):
            pictures, causes = zip(*(next(read) for _ in rows), strict=True)
            pixels = self.inputs.preprocessing.normalize(torch.stack(pictures).to(self.device))
            output = self.towers.image.tokens(pixels)
            told = torch.tensor(causes, dtype=torch.uint8)
            yield {"patches": self._cast(output.sequence), "causes": told, "pooled": output.pooled}

    def _picture(self, row: int, expected: bytes) -> tuple[torch.Tensor, int]:
        reference = self.graph.images.locate(self.graph.nodes[row])
        data, status = self.graph.images.read(reference)
        if image_hash(data, status) != expected:
            raise UserError(f"{reference} changed while the tower store was built; start again, and it goes on")
        return self.inputs.picture_of(data, status)

    def _cast(self, tokens: torch.Tensor) -> torch.Tensor:
        tokens = tokens.to(self.dtype)
        if not tokens.isfinite().all():
            raise UserError("tokens of these towers are beyond float16: --tower_cache_dtype float32")
        return tokens


def _bytes(hashes: np.ndarray) -> np.ndarray:
    """(K,) HASH -> (K, 16) uint8."""
    return hashes.view(np.uint8).reshape(-1, HASH.itemsize)


def _batches(entries: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(entries), BATCH):
        yield entries[start : start + BATCH]
