"""All nodes' embeddings from any checkpoint, to files: by all ranks, in constant memory, resumed where it stopped."""

import hashlib
import json
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
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

from mmgraph.config import Config
from mmgraph.contents import file_signature
from mmgraph.errors import UserError
from mmgraph.feature_files import FORMATS, write_features
from mmgraph.files import locked, told_of_disk, write_durably
from mmgraph.images import CAUSES
from mmgraph.inference import Inference, open_checkpoint
from mmgraph.node_outputs import BATCH
from mmgraph.text_log import log
from mmgraph.tower_cache import SHOWN_SECONDS
from mmgraph.world import on_main_process, together, work_together

FEATURES = ("z_graph", "fused", "text_only", "image_only", "concat")
BLOCK = 16 * BATCH  # nodes whose features are kept in a file until all are there: what is lost when it is stopped


def encode(
    checkpoint: Path, config: Config, accelerator: Accelerator, output: Path, features: Sequence[str], kind: str
) -> None:
    """Write ``features_<name>.<kind>``: one float32 vector a node, in node order. Called by all ranks.

    Blocks of nodes are embedded by all ranks and kept beside the files to be; a second start goes on from those. Then
    they are put together, a feature a rank.

    Args:
        checkpoint: an epoch or final file, of mmgraph or the original.
        output: folder to write to, which all ranks see.
        features: names of :data:`FEATURES`.
        kind: one of :data:`mmgraph.feature_files.FORMATS`.

    Raises:
        UserError: as :func:`mmgraph.inference.open_checkpoint`; or ``output`` cannot be written.
    """
    _check(features, kind)
    with ExitStack() as stack:
        on_main_process(accelerator, lambda: _open_folder(output, stack))
        _encode(open_checkpoint(checkpoint, config, accelerator), config, accelerator, output, features, kind)


def _encode(
    inference: Inference, config: Config, accelerator: Accelerator, output: Path, features: Sequence[str], kind: str
) -> None:
    blocks = Blocks(inference, output, tuple(dict.fromkeys(features)), config.truncated_images)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    on_main_process(accelerator, blocks.make_folder)
    own: list[int] = []
    for _ in work_together(accelerator, blocks.look(range(rank, len(blocks), world_size), own)):
        pass
    missing = sorted(number for numbers in gather_object([own]) for number in numbers)
    total = len(inference.nodes)
    done = total - sum(len(blocks.rows(number)) for number in missing)
    if done:
        log(f"goes on: {done:,} of {total:,} nodes were embedded before")
    with _bar(accelerator, total, done, "node") as bar:
        for others in work_together(accelerator, _telling(blocks.make(missing[rank::world_size]), bar, output)):
            bar.update(others)
    together(accelerator, lambda: blocks.wait_for(missing))
    with _bar(accelerator, total * len(blocks.features), 0, "row") as bar:
        written = blocks.write(blocks.features[rank::world_size], kind)
        for others in work_together(accelerator, _telling(written, bar, output)):
            bar.update(others)
    on_main_process(accelerator, lambda: _finish(blocks, output, kind))


def _check(features: Sequence[str], kind: str) -> None:
    unknown = [name for name in features if name not in FEATURES]
    if unknown:
        raise UserError(f"--features {unknown[0]}: must be of {', '.join(FEATURES)}")
    if kind not in FORMATS:
        raise UserError(f"--format {kind}: must be one of {', '.join(FORMATS)}")


def _open_folder(folder: Path, stack: ExitStack) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not locked(folder, stack):
            raise UserError(f"--output_dir {folder}: another process encodes into it")
    except OSError as error:
        raise UserError(f"--output_dir {folder}: {error.strerror}") from None


def _bar(accelerator: Accelerator, total: int, initial: int, unit: str) -> "tqdm[Any]":
    disable = None if accelerator.is_main_process else True
    return tqdm(total=total, initial=initial, unit=unit, disable=disable, dynamic_ncols=True)


def _telling(counts: Iterator[int], bar: "tqdm[Any]", output: Path) -> Iterator[int]:
    with told_of_disk(output, "make room, and the same command goes on where it stopped"):
        for count in counts:
            bar.update(count)
            yield count


def _finish(blocks: "Blocks", output: Path, kind: str) -> None:
    causes = blocks.causes()
    told = ", ".join(
        f"{count:,} {cause}" for cause, count in zip(CAUSES, causes.tolist(), strict=True) if cause and count
    )
    if told:
        log(f"images that are black or in part: {told}")
    shutil.rmtree(blocks.folder)
    log(f"{', '.join(blocks.features)} of {len(blocks.inference.nodes):,} nodes: {output}/features_*.{kind}")


def _digest(tensors: Mapping[str, torch.Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(tensors[name].numpy().data)
    return digest.hexdigest()


def _write(content: bytes, path: Path) -> None:
    path.write_bytes(content)


class Blocks:
    """Features of runs of nodes, each in a file of its own in a hidden folder of the output.

    The folder's name is of all that features depend on but the images, whose times and sizes a block remembers: a block
    of anything else is made anew.
    """

    def __init__(self, inference: Inference, output: Path, features: tuple[str, ...], truncated_images: str):
        self.inference, self.features = inference, features
        key = [inference.nodes_fingerprint, inference.checkpoint_fingerprint, truncated_images, features, BLOCK]
        self.folder = output / f".blocks-{hashlib.sha256(json.dumps(key).encode()).hexdigest()[:16]}"

    def __len__(self) -> int:
        return -(-len(self.inference.nodes) // BLOCK)

    def rows(self, number: int) -> range:
        return range(BLOCK * number, min(BLOCK * (number + 1), len(self.inference.nodes)))

    def file(self, number: int) -> Path:
        return self.folder / f"{number:08d}.safetensors"

    def make_folder(self) -> None:
        """Make the folder of the blocks, and remove those of other features."""
        for other in self.folder.parent.glob(".blocks-*"):
            if other != self.folder:
                shutil.rmtree(other)
        self.folder.mkdir(exist_ok=True)

    def look(self, numbers: Sequence[int], missing: list[int]) -> Iterator[int]:
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
        deadline = time.monotonic() + SHOWN_SECONDS
        while not all(self.file(number).is_file() for number in numbers):
            if time.monotonic() > deadline:
                raise UserError(f"--output_dir {self.folder.parent}: must be one folder that all machines see")
            time.sleep(1)

    def _images(self, number: int) -> str:
        digest = hashlib.sha256()
        for node in self.inference.nodes.scan(self.rows(number), ("image_path",)):
            digest.update(file_signature(self.inference.paths.resolve(node["image_path"])))
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
                tokens, text_only, image_only, causes = next(outputs)
                embedded = self.inference.module.embeddings(tokens, text_only, image_only)
                for name in self.features:
                    found.setdefault(name, []).append(embedded[name].float().cpu())
                found.setdefault("causes", []).append(torch.from_numpy(causes.astype(np.uint8)))
                left -= len(causes)
                yield len(causes)
            tensors = {name: torch.cat(parts) for name, parts in found.items()}
            content = save(tensors, metadata={"images": images, "sha256": _digest(tensors)})
            write_durably(self.file(number), partial(_write, content))

    def write(self, features: Sequence[str], kind: str) -> Iterator[int]:
        """Put the blocks of some features together. Yields how many rows were written."""
        for feature in features:
            shape = len(self.inference.nodes), self._read(0, feature).shape[1]
            blocks = (self._read(number, feature).numpy() for number in range(len(self)))
            path = self.folder.parent / f"features_{feature}.{kind}"
            yield from write_features(path, shape, blocks, self._ids())

    def causes(self) -> np.ndarray:
        """How many nodes there are of each of :data:`mmgraph.images.CAUSES`."""
        counts = np.zeros(len(CAUSES), np.int64)
        for number in range(len(self)):
            counts += np.bincount(self._read(number, "causes").numpy(), minlength=len(CAUSES))
        return counts

    def _read(self, number: int, name: str) -> torch.Tensor:
        with safe_open(self.file(number), "pt") as file:
            return file.get_tensor(name)

    def _ids(self) -> Iterator[pa.ChunkedArray]:
        nodes = self.inference.nodes
        for number in range(len(self)):
            yield nodes.column("node_id").slice(BLOCK * number, BLOCK)
            nodes.release()
