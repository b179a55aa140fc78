"""Feature shards: embeddings of consecutive nodes, computed by all ranks and cached in files."""

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
from mmgraph.data.images import IMAGE_STATUS, count_image_status
from mmgraph.distributed.collectives import on_main_process, raise_on_all_ranks, work_on_all_ranks
from mmgraph.errors import UserError
from mmgraph.inference.feature_files import write_features
from mmgraph.inference.feature_origin import ids_digest, origin_file, write_origin
from mmgraph.inference.node_outputs import BATCH
from mmgraph.inference.pretrained import Inference
from mmgraph.towers.cached import VISIBLE_SECONDS
from mmgraph.utils.files import explain_disk_errors, write_durably
from mmgraph.utils.log import log

SHARD_NODES = 16 * BATCH  # nodes per shard; at an interruption, each rank loses at most one shard


def build_shards(shards: "FeatureShards", accelerator: Accelerator, others: int = 0) -> None:
    """Build the missing shards. Call on all ranks.

    The shards are assigned to the ranks in turn. An interrupted call loses only its unfinished shards, and the next
    call builds all shards that are still missing.

    Args:
        others: how many shard folders of other checkpoints, features or settings are kept.

    Raises:
        UserError: not all machines see the folder.
        RunError: the folder's disk is full or fails.
    """
    rank, world_size = accelerator.process_index, accelerator.num_processes
    on_main_process(accelerator, lambda: shards.make_folder(others))
    missing = missing_shards(shards, accelerator)
    total = len(shards.inference.nodes)
    done = total - sum(len(shards.rows(number)) for number in missing)
    if done:
        log(f"resuming: {done:,} of {total:,} nodes are already embedded")
    with progress_bar(accelerator, total, done, "node") as bar:
        for count in work_on_all_ranks(
            accelerator, show_progress(shards.make(missing[rank::world_size]), bar, shards.output)
        ):
            bar.update(count)
    raise_on_all_ranks(accelerator, lambda: shards.wait_for(missing))


def missing_shards(shards: "FeatureShards", accelerator: Accelerator) -> list[int]:
    """Return the numbers of the shards that do not exist, are damaged or are out of date. Call on all ranks.

    A shard is out of date if one of its images has changed. Each rank checks a part of the shards.
    """
    mine, missing = range(accelerator.process_index, len(shards), accelerator.num_processes), list[int]()
    for _ in work_on_all_ranks(accelerator, shards.missing_shards(mine, missing)):
        pass
    return sorted(number for numbers in gather_object([missing]) for number in numbers)


def progress_bar(accelerator: Accelerator, total: int, initial: int, unit: str) -> "tqdm[Any]":
    """Return a progress bar that is shown only on the main process, and only in a terminal."""
    disable = None if accelerator.is_main_process else True
    return tqdm(total=total, initial=initial, unit=unit, disable=disable, dynamic_ncols=True)


def show_progress(counts: Iterator[int], shown: "tqdm[Any]", output: Path) -> Iterator[int]:
    """Yield ``counts`` and add them to the progress bar. The message of a disk error says what to do.

    Args:
        shown: the progress bar.
        output: folder to name in the message of a disk error.
    """
    with explain_disk_errors(output, "free disk space, then run the same command again to resume"):
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
    """Shards of a graph's features in a hidden folder of ``output``: one file for each range of consecutive nodes.

    The folder's name is a hash of the node table, the checkpoint, the input rules, the feature names and the shard
    size. The features also depend on the images. Each shard therefore stores a digest of the paths, sizes and times of
    its image files, and the shard is rebuilt if the digest has changed.
    """

    def __init__(self, inference: Inference, output: Path, features: tuple[str, ...]):
        self.inference, self.output, self.features = inference, output, features
        truncated, *changed = inference.outputs.inputs.rules.key().items()
        key = [inference.nodes_fingerprint, inference.checkpoint_fingerprint, truncated[1], features, SHARD_NODES]
        key += changed
        self.folder = output / f".blocks-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"

    def __len__(self) -> int:
        return -(-len(self.inference.nodes) // SHARD_NODES)

    def rows(self, number: int) -> range:
        return range(SHARD_NODES * number, min(SHARD_NODES * (number + 1), len(self.inference.nodes)))

    def file(self, number: int) -> Path:
        return self.folder / f"{number:08d}.safetensors"

    def make_folder(self, others: int) -> None:
        """Create the shard folder, and remove the other shard folders except the ``others`` newest."""
        folders = [folder for folder in self.folder.parent.glob(".blocks-*") if folder != self.folder]
        for other in sorted(folders, key=lambda folder: -folder.stat().st_mtime_ns)[others:]:
            shutil.rmtree(other)
        self.folder.mkdir(exist_ok=True)

    def missing_shards(self, numbers: Sequence[int], missing: list[int]) -> Iterator[int]:
        """Append to ``missing`` the shards that do not exist, are damaged or are out of date. Yield 1 per shard."""
        for number in numbers:
            if not self._is_current(number):
                missing.append(number)
            yield 1

    def _is_current(self, number: int) -> bool:
        try:
            with safe_open(self.file(number), "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in (*self.features, "causes")}
        except (OSError, SafetensorError):
            return False
        return metadata == {"images": self._images(number), "sha256": _digest(tensors)}

    def wait_for(self, numbers: Sequence[int]) -> None:
        """Wait until this rank sees these shards, because a network file system may show them late.

        Raises:
            UserError: some shards are not visible after :data:`VISIBLE_SECONDS`.
        """
        deadline = time.monotonic() + VISIBLE_SECONDS
        while not all(self.file(number).is_file() for number in numbers):
            if time.monotonic() > deadline:
                raise UserError(
                    f"{self.output}: not all shards are visible on this machine; use a folder that all machines share"
                )
            time.sleep(1)

    def _images(self, number: int) -> str:
        """Return a digest of the signatures of a shard's images."""
        digest = hashlib.sha256()
        images = self.inference.images
        for node in self.inference.nodes.scan(self.rows(number), images.columns):
            signature = images.signature(images.locate(node), MIN_AGE_NS)
            # The image changed too recently to trust its times. A random value makes the next run rebuild the shard.
            if signature is None:
                signature = os.urandom(HASH.itemsize)
            digest.update(signature.ljust(HASH.itemsize, b"\0"))
        return digest.hexdigest()

    @torch.no_grad()
    def make(self, numbers: Sequence[int]) -> Iterator[int]:
        """Embed the nodes of these shards, and write the shards. Yield the number of nodes of each batch."""
        # Computed before any image is read, so that the next run notices an image that changes in the meantime.
        images = []
        for number in numbers:
            images.append(self._images(number))
            yield 0  # lets this rank sync with the others, because this loop takes long for many files
        outputs = self.inference.outputs.of([self.rows(number) for number in numbers])
        for number, images_of_shard in zip(numbers, images, strict=True):
            batches: dict[str, list[torch.Tensor]] = {}
            left = len(self.rows(number))
            while left:
                tokens, image_status = next(outputs)
                embedded = self.inference.module.embeddings(tokens)
                for name in self.features:
                    batches.setdefault(name, []).append(embedded[name].float().cpu())
                batches.setdefault("causes", []).append(torch.from_numpy(image_status.astype(np.uint8)))
                left -= len(image_status)
                yield len(image_status)
            tensors = {name: torch.cat(parts) for name, parts in batches.items()}
            content = save(tensors, metadata={"images": images_of_shard, "sha256": _digest(tensors)})
            write_durably(self.file(number), partial(_write, content))

    def write(self, features: Sequence[str], file_format: str) -> Iterator[int]:
        """Join the shards into one file per feature, in format ``file_format``. Yield the number of rows written."""
        ids = ids_digest(self.inference.nodes) if features else ""
        for feature in features:
            shape = len(self.inference.nodes), self._read(0, feature).shape[1]
            shards = (self._read(number, feature).numpy() for number in range(len(self)))
            path = self.folder.parent / f"features_{feature}.{file_format}"
            origin_file(path).unlink(missing_ok=True)  # first, so that it never stands beside another file
            yield from write_features(path, shape, shards, self._ids())
            fingerprints = self.inference.nodes_fingerprint, self.inference.checkpoint_fingerprint
            write_origin(path, shape[0], ids, *fingerprints)

    def count_image_status(self) -> list[int]:
        """Return the number of nodes with each image status, in the order of ``IMAGE_STATUS``."""
        counts = np.zeros(len(IMAGE_STATUS), np.int64)
        for number in range(len(self)):
            counts += count_image_status(self._read(number, "causes").numpy())
        return counts.tolist()

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor for all nodes.

        Args:
            name: name of a feature, or ``causes`` for the image status.

        Returns:
            (N, d) float32 for a feature, (N,) uint8 for the image status.
        """
        return torch.cat([self._read(number, name) for number in range(len(self))])

    def _read(self, number: int, name: str) -> torch.Tensor:
        with safe_open(self.file(number), "pt") as file:
            return file.get_tensor(name)

    def _ids(self) -> Iterator[pa.ChunkedArray]:
        for number in range(len(self)):
            # The column is opened again for each shard, so that its memory-mapped pages are released after each shard.
            with self.inference.nodes.column("node_id") as ids:
                yield ids.slice(SHARD_NODES * number, SHARD_NODES)
