"""Builds the missing shards of a tower store, on all ranks."""

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
from mmgraph.data.node_inputs import NodeInputs
from mmgraph.distributed.collectives import (
    broadcast_from_main_process,
    on_main_process,
    raise_on_all_ranks,
    work_on_all_ranks,
)
from mmgraph.errors import UserError
from mmgraph.towers.cost import MATMUL_SHARE, matmul_flops_per_s
from mmgraph.towers.load import load_towers
from mmgraph.towers.remarks import take_remarks
from mmgraph.towers.store_plan import Cost, Recipe, Shard
from mmgraph.towers.tokens import Towers
from mmgraph.utils.files import POLL_SECONDS, claim_file, explain_disk_errors, write_durably
from mmgraph.utils.log import log
from mmgraph.utils.units import duration, size

# Entries (texts or images) per tower batch. The size is fixed, so that a shard's bytes do not depend on the number of
# ranks.
BATCH = 64
PROGRESS_SECONDS = 60  # minimum time between two log lines


def build(
    config: Config,
    accelerator: Accelerator,
    graph: Graph,
    inputs: NodeInputs,
    recipe: Recipe,
    shards: list[Shard],
    expected: Cost,
) -> None:
    """Build the missing shards of a tower store. Call on all ranks.

    Each rank builds its part of the shards, and then shards that no other rank has started. If two runs build the same
    store at the same time, they share the work. If a build is killed, each rank loses only its unfinished shard, and
    the next build continues with the missing shards.

    Args:
        config, accelerator, graph: settings, Accelerator and data of the run.
        inputs: converts texts and images to tower inputs.
        recipe: folder and dtype of the store, and the description that is written to its ``store.json``.
        shards: shards that the store on this rank's host lacks.
        expected: estimated cost of building the shards, for the log.

    Raises:
        UserError: the towers cannot be loaded, a text or image changed during the build, or tokens overflow float16.
        RunError: the disk is full or fails.
    """
    folder, entries = recipe.folder, sum(len(shard.rows) for shard in shards)
    speed = min(gather_object([matmul_flops_per_s(accelerator.device, torch.float32)]))
    seconds = expected.flops / (MATMUL_SHARE * speed * accelerator.num_processes)
    log(
        f"tower store: building {folder} from {entries:,} texts and images takes about {size(expected.bytes)} and "
        f"{duration(seconds)} (--tower_cache off runs the towers in every step instead)"
    )
    index, builders = _builder_index(accelerator, folder)
    description = json.dumps(recipe.description, indent=2) + "\n"
    raise_on_all_ranks(accelerator, lambda: _describe(folder, description) if index == 0 else None)
    start = time.perf_counter()
    towers = raise_on_all_ranks(accelerator, lambda: load_towers(config.model_name).to(accelerator.device))
    assigned = shards[index::builders]
    queue = deque([*assigned, *reversed([shard for i, shard in enumerate(shards) if i % builders != index])])
    with ThreadPoolExecutor(max(1, config.num_workers)) as readers, _Progress(entries, accelerator) as progress:
        shard_builder = _ShardBuilder(graph, inputs, towers, recipe.dtype, accelerator.device, readers, progress)
        for count in work_on_all_ranks(accelerator, _explain_errors(shard_builder.work(queue, folder), folder)):
            progress.add(count)  # entries of the other ranks; shard_builder adds this rank's entries
    log(f"tower store: built in {duration(time.perf_counter() - start)}")


def _describe(folder: Path, description: str) -> None:
    write_durably(folder / "store.json", lambda path: path.write_text(description), shared=True)


def _explain_errors(counts: Iterator[int], folder: Path) -> Iterator[int]:
    with explain_disk_errors(folder, "free disk space for the store, or set --tower_cache off to run the towers live"):
        yield from counts


class _Progress:
    """Shows the progress of all ranks: a bar if the main process has a terminal, else a log line per minute."""

    def __init__(self, entries: int, accelerator: Accelerator):
        self.terminal = accelerator.is_main_process and sys.stderr.isatty()
        self.bar = tqdm(total=entries, unit="entry", disable=not self.terminal, dynamic_ncols=True)
        self.entries, self.done, self.start = entries, 0, time.perf_counter()
        self.last_logged = self.start

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def add(self, entries: int) -> None:
        now = time.perf_counter()
        self.done += entries
        self.bar.update(entries)
        if not self.terminal and self.done and now - self.last_logged > PROGRESS_SECONDS:
            self.last_logged, left = now, (now - self.start) * (self.entries / self.done - 1)
            log(f"tower store: {self.done:,} of {self.entries:,} texts and images done, about {duration(left)} left")


def _builder_index(accelerator: Accelerator, folder: Path) -> tuple[int, int]:
    """Return this rank's index among the ranks that write to the same folder, and the number of these ranks.

    The main process creates a file in the folder. If any rank does not see this file, each host is taken to have a
    separate folder, and the number is that of the host with the most ranks.
    """
    probe = folder / f".probe-{uuid.uuid4().hex}"
    name = broadcast_from_main_process(accelerator, lambda: _touch(probe).name)
    shared = all(gather_object([(folder / name).exists()]))
    on_main_process(accelerator, probe.unlink)
    if shared:
        return accelerator.process_index, accelerator.num_processes
    raise_on_all_ranks(accelerator, lambda: folder.mkdir(parents=True, exist_ok=True))
    local_indices = gather_object([accelerator.local_process_index])
    return accelerator.local_process_index, 1 + max(local_indices)


def _touch(path: Path) -> Path:
    path.touch()
    return path


class _ShardBuilder(NamedTuple):
    """Builds shards on one rank."""

    graph: Graph
    inputs: NodeInputs
    towers: Towers  # float32, on the device
    dtype: torch.dtype  # of the stored tokens
    device: torch.device
    readers: ThreadPoolExecutor  # threads that read and decode images
    progress: "_Progress"

    def work(self, queue: "deque[Shard]", folder: Path) -> Iterator[int]:
        """Build the queued shards that no other process has built or is building.

        A shard that exists leaves the queue. A shard that another process is building goes to the end of the queue, so
        that this process builds it if the other process is killed.

        Yields:
            The number of entries of each batch. After each pass over the queue, it yields 0, so that this rank can sync
            with the other ranks while it waits.
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
        """Compute a shard.

        Yields:
            The number of entries of each batch.

        Returns:
            The bytes of the shard's file.
        """
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
        # One key only: safetensors writes several in random order, but builds of a shard must have equal bytes.
        metadata = {"format": "pt"} if shard.modality == "text" else {"remarks": take_remarks(tensors["causes"])}
        tensors["hashes"] = torch.from_numpy(_bytes(shard.hashes).copy())
        return save(tensors, metadata=metadata)

    def _texts(self, shard: Shard) -> Iterator[dict[str, torch.Tensor]]:
        for rows, hashes in zip(_batches(shard.rows), _batches(_bytes(shard.hashes)), strict=True):
            texts = [self.inputs.rules.text(self.graph.nodes[int(row)]) for row in rows]
            if any(text_hash(text) != expected.tobytes() for text, expected in zip(texts, hashes, strict=True)):
                raise UserError(
                    "the node table changed while the tower store was built; run the same command again to continue"
                )
            input_ids, mask = self.inputs.tokenize(texts)
            input_ids, mask = input_ids.to(self.device), mask.to(self.device)
            output = self.towers.text.tokens(input_ids, mask)
            assert output.mask is not None
            tokens = output.sequence[output.mask.bool()]  # (k, L, d_text) for k texts -> (t, d_text) for t tokens
            yield {"tokens": self._cast(tokens), "lengths": output.mask.sum(dim=1), "pooled": output.pooled}

    def _images(self, shard: Shard) -> Iterator[dict[str, torch.Tensor]]:
        hashes = [expected.tobytes() for expected in _bytes(shard.hashes)]
        read = self.readers.map(self._picture, shard.rows.tolist(), hashes)
        for rows in _batches(shard.rows):
            pictures, statuses = zip(*(next(read) for _ in rows), strict=True)
            pixels = self.inputs.preprocessing.normalize(torch.stack(pictures).to(self.device))
            output = self.towers.image.tokens(pixels)
            image_status = torch.tensor(statuses, dtype=torch.uint8)
            yield {"patches": self._cast(output.sequence), "causes": image_status, "pooled": output.pooled}

    def _picture(self, row: int, expected: bytes) -> tuple[torch.Tensor, int]:
        reference = self.graph.images.locate(self.graph.nodes[row])
        data, status = self.graph.images.read(reference)
        if image_hash(data, status) != expected:
            raise UserError(
                f"{reference} changed while the tower store was built; run the same command again to continue"
            )
        return self.inputs.decode_image_of(data, status)

    def _cast(self, tokens: torch.Tensor) -> torch.Tensor:
        stored = tokens.to(self.dtype)
        if stored.isfinite().all():
            return stored
        if tokens.isfinite().all():
            raise UserError("tokens of these towers exceed the range of float16; set --tower_cache_dtype float32")
        raise UserError("tokens of these towers are not finite; check the weights of --model_name")


def _bytes(hashes: np.ndarray) -> np.ndarray:
    """Convert hashes to bytes: (K,) HASH -> (K, 16) uint8."""
    return hashes.view(np.uint8).reshape(-1, HASH.itemsize)


def _batches(entries: np.ndarray) -> Iterator[np.ndarray]:
    for start in range(0, len(entries), BATCH):
        yield entries[start : start + BATCH]
