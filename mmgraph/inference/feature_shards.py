"""Features of runs of nodes, embedded by all ranks and kept in files: what was made is not made again."""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from tqdm import tqdm

from mmgraph.data.content_hashes import HASH, MIN_AGE_NS
from mmgraph.data.images import IMAGE_STATUS
from mmgraph.distributed.collectives import on_main_process, raise_on_all_ranks, work_on_all_ranks
from mmgraph.errors import UserError
from mmgraph.inference.feature_files import write_features
from mmgraph.inference.node_outputs import BATCH
from mmgraph.inference.pretrained import Inference
from mmgraph.towers.cached import VISIBLE_SECONDS
from mmgraph.utils.files import explain_disk_errors, write_durably
from mmgraph.utils.log import log

SHARD_NODES = 16 * BATCH  # nodes whose features are kept in a file: what is lost when it is stopped


def build_shards(shards: "FeatureShards", accelerator: Accelerator, others: int = 0) -> None:
    """Make all blocks that are not there, the ranks in turns; a second start goes on from those. Called by all ranks.

    Args:
        others: how many folders of blocks of other features stay beside these.

    Raises:
        UserError: the folder is not one that all machines see; its disk is full.
    """
    rank, world_size = accelerator.process_index, accelerator.num_processes
    on_main_process(accelerator, lambda: shards.make_folder(others))
    missing = missing_shards(shards, accelerator)
    total = len(shards.inference.nodes)
    done = total - sum(len(shards.rows(number)) for number in missing)
    if done:
        log(f"goes on: {done:,} of {total:,} nodes were embedded before")
    with progress_bar(accelerator, total, done, "node") as shown:
        for count in work_on_all_ranks(
            accelerator, show_progress(shards.make(missing[rank::world_size]), shown, shards.output)
        ):
            shown.update(count)
    raise_on_all_ranks(accelerator, lambda: shards.wait_for(missing))


def missing_shards(shards: "FeatureShards", accelerator: Accelerator) -> list[int]:
    """Which blocks are not there, damaged, or not of the images as they are now; looked at by all ranks in turns."""
    mine, own = range(accelerator.process_index, len(shards), accelerator.num_processes), list[int]()
    for _ in work_on_all_ranks(accelerator, shards.missing_shards(mine, own)):
        pass
    return sorted(number for numbers in gather_object([own]) for number in numbers)


def progress_bar(accelerator: Accelerator, total: int, initial: int, unit: str) -> "tqdm[Any]":
    """A progress bar, on the main process alone."""
    disable = None if accelerator.is_main_process else True
    return tqdm(total=total, initial=initial, unit=unit, disable=disable, dynamic_ncols=True)


def show_progress(counts: Iterator[int], shown: "tqdm[Any]", output: Path) -> Iterator[int]:
    """Show what is done as it is, and say of a full disk what to do."""
    with explain_disk_errors(output, "make room, and the same command goes on where it stopped"):
        for count in counts:
            shown.update(count)
            yield count


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)


class FeatureShards:
    """Features of runs of nodes, each in a file of its own in a hidden folder of the output.

    The folder's name is of all that features depend on but the images, whose times and sizes a block remembers: a block
    of anything else is made anew.
    """

    def __init__(self, inference: Inference, output: Path, features: tuple[str, ...], truncated_images: str):
        self.inference, self.output, self.features = inference, output, features
        key = [inference.nodes_fingerprint, inference.checkpoint_fingerprint, truncated_images, features, SHARD_NODES]
        self.folder = output / f".blocks-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"

    def __len__(self) -> int:
        return -(-len(self.inference.nodes) // SHARD_NODES)

    def rows(self, number: int) -> range:
        return range(SHARD_NODES * number, min(SHARD_NODES * (number + 1), len(self.inference.nodes)))

    def file(self, number: int) -> Path:
        return self.folder / f"{number:08d}.safetensors"

    def make_folder(self, others: int) -> None:
        """Make the folder of the blocks, and remove those of other features but the last ``others``."""
        found = [folder for folder in self.folder.parent.glob(".blocks-*") if folder != self.folder]
        for other in sorted(found, key=lambda folder: -folder.stat().st_mtime_ns)[others:]:
            shutil.rmtree(other)
        self.folder.mkdir(exist_ok=True)

    def missing_shards(self, numbers: Sequence[int], missing: list[int]) -> Iterator[int]:
        """Add to ``missing`` the blocks that are not there, damaged, or not of the images as they are now."""
        for number in numbers:
            if not self._is_current(number):
                missing.append(number)
            yield 1

    def _is_current(self, number: int) -> bool:
        try:
            with safe_open(self.file(number), "pt") as file:
                told = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in (*self.features, "causes")}
        except (OSError, SafetensorError):
            return False
        return told == {"images": self._images(number), "sha256": _digest(tensors)}

    def wait_for(self, numbers: Sequence[int]) -> None:
        """Until all ranks' blocks are seen here: a network file system may take a while to show them."""
        deadline = time.monotonic() + VISIBLE_SECONDS
        while not all(self.file(number).is_file() for number in numbers):
            if time.monotonic() > deadline:
                raise UserError(f"{self.output}: must be one folder that all machines see")
            time.sleep(1)

    def _images(self, number: int) -> str:
        digest = hashlib.sha256()
        images = self.inference.images
        for node in self.inference.nodes.scan(self.rows(number), images.columns):
            signature = images.signature(images.locate(node), MIN_AGE_NS)
            if signature is None:  # it changed a moment ago and may change again unnoticed: equal to nothing
                signature = os.urandom(HASH.itemsize)
            digest.update(signature.ljust(HASH.itemsize, b"\0"))
        return digest.hexdigest()

    @torch.no_grad()
    def make(self, numbers: Sequence[int]) -> Iterator[int]:
        """Embed and write these blocks. Yields how many nodes each batch has."""
        outputs = self.inference.outputs.of([self.rows(number) for number in numbers])
        for number in numbers:
            images = self._images(number)  # before they are read
            found: dict[str, list[torch.Tensor]] = {}
            left = len(self.rows(number))
            while left:
                tokens, image_status = next(outputs)
                embedded = self.inference.module.embeddings(tokens)
                for name in self.features:
                    found.setdefault(name, []).append(embedded[name].float().cpu())
                found.setdefault("causes", []).append(torch.from_numpy(image_status.astype(np.uint8)))
                left -= len(image_status)
                yield len(image_status)
            tensors = {name: torch.cat(parts) for name, parts in found.items()}
            content = save(tensors, metadata={"images": images, "sha256": _digest(tensors)})
            write_durably(self.file(number), partial(_write, content))

    def write(self, features: Sequence[str], kind: str) -> Iterator[int]:
        """Put the blocks of some features together. Yields how many rows were written."""
        for feature in features:
            shape = len(self.inference.nodes), self._read(0, feature).shape[1]
            shards = (self._read(number, feature).numpy() for number in range(len(self)))
            path = self.folder.parent / f"features_{feature}.{kind}"
            yield from write_features(path, shape, shards, self._ids())

    def image_status(self) -> np.ndarray:
        """How many nodes there are of each of :data:`mmgraph.data.images.IMAGE_STATUS`."""
        counts = np.zeros(len(IMAGE_STATUS), np.int64)
        for number in range(len(self)):
            counts += np.bincount(self._read(number, "causes").numpy(), minlength=len(IMAGE_STATUS))
        return counts

    def read(self, name: str) -> torch.Tensor:
        """A feature of all nodes, (N, d); or ``image_status``, (N,)."""
        return torch.cat([self._read(number, name) for number in range(len(self))])

    def _read(self, number: int, name: str) -> torch.Tensor:
        with safe_open(self.file(number), "pt") as file:
            return file.get_tensor(name)

    def _ids(self) -> Iterator[pa.ChunkedArray]:
        for number in range(len(self)):
            with self.inference.nodes.column("node_id") as ids:  # of a block at a time, which is written meanwhile
                yield ids.slice(SHARD_NODES * number, SHARD_NODES)
