"""The tower store: tokens of both towers on disk, in memory-mapped safetensors files (shards).

Each text and each image has one entry, under the hash of its content. A store contains no node ids or rows, so several
graphs can share it. An entry is never used for another text or image.

A shard has up to ``SHARD`` text entries or image entries (more in very large stores, see ``MAX_SHARDS``). Tokens and
patches are float32 or float16. A shard of K entries has these tensors, where P is the number of patches per image:

``text-<name>.safetensors``:

- ``hashes``: (K, 16) uint8.
- ``tokens``: (T, d_text), the T valid tokens of all K texts, concatenated.
- ``offsets``: (K + 1,) int64, the start of each text in ``tokens``, then T.
- ``pooled``: (K, d_text) float32.

``image-<name>.safetensors``:

- ``hashes``: (K, 16) uint8.
- ``patches``: (K, P, d_vis), without the class token.
- ``pooled``: (K, d_vis) float32.
- ``causes``: (K,) uint8, indices into :data:`mmgraph.data.images.IMAGE_STATUS`; see :mod:`mmgraph.towers.remarks`.
"""

import ctypes
import hashlib
import json
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from mmgraph.data.content_hashes import HASH
from mmgraph.errors import UserError
from mmgraph.towers.remarks import with_remarks
from mmgraph.towers.tokens import Tokens

SHARD = 512  # entries per shard; if a build is killed, each rank loses its unfinished shard
# Maximum number of shards that a build plans per modality. Larger stores get larger shards instead, because each shard
# is a memory map, and Linux by default limits a process to 65,530 memory maps.
MAX_SHARDS = 8000

DTYPES = {"U8": torch.uint8, "I64": torch.int64, "F32": torch.float32, "F16": torch.float16}  # by safetensors name
TOKENS = (torch.float32, torch.float16)  # dtypes of tokens and patches

Modality = Literal["text", "image"]
ShardTensors = dict[str, torch.Tensor]

# The number of dimensions and the possible dtypes of each tensor of a shard.
LAYOUT: dict[Modality, dict[str, tuple[int, tuple[torch.dtype, ...]]]] = {
    "text": {
        "hashes": (2, (torch.uint8,)),
        "tokens": (2, TOKENS),
        "offsets": (1, (torch.int64,)),
        "pooled": (2, (torch.float32,)),
    },
    "image": {
        "hashes": (2, (torch.uint8,)),
        "patches": (3, TOKENS),
        "pooled": (2, (torch.float32,)),
        "causes": (1, (torch.uint8,)),
    },
}

libc = ctypes.CDLL(None)


def shard_name(modality: Modality, hashes: np.ndarray) -> str:
    """Return a shard's file name, which contains a hash of its entries' hashes.

    If two builds divide the entries into different shards, the shards have different names and never conflict.
    """
    return f"{modality}-{hashlib.blake2b(hashes.tobytes(), digest_size=8).hexdigest()}.safetensors"


class Shards:
    """The shards of one modality in a folder.

    Entries are numbered over all shards: entry k of shard s has the index ``starts[s] + k``.

    Raises:
        UserError: a shard is damaged, cannot be mapped, or is from different towers than the first shard.
    """

    def __init__(self, folder: Path, modality: Modality):
        self.files = sorted(folder.glob(f"{modality}-*.safetensors"))
        self.tensors: list[ShardTensors] = []
        hashes: list[np.ndarray] = []
        for file in self.files:
            self.tensors.append(shard := _map_shard(file, modality))
            if _widths(shard) != _widths(self.tensors[0]):
                raise UserError(
                    f"tower store: {file} and {self.files[0]} are from different towers; remove the wrong file"
                )
            hashes.append(shard["hashes"].numpy().reshape(-1).view(HASH).copy())
            _release(shard)
        self.starts = np.cumsum([0, *map(len, hashes)])
        self._hashes = np.concatenate([np.empty(0, HASH), *hashes])
        self._order = np.argsort(self._hashes, kind="stable")

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """Return the index of each hash's entry, or -1 if there is no entry: (N,) HASH -> (N,) int64."""
        if not len(self._order):
            return np.full(len(hashes), -1)
        ranked = np.searchsorted(self._hashes, hashes, sorter=self._order)
        indices = self._order[np.minimum(ranked, len(self._order) - 1)]
        return np.where(self._hashes[indices] == hashes, indices, -1)

    def locate(self, indices: np.ndarray) -> Sequence[tuple[ShardTensors, int]]:
        """Return the shard of each entry, and its position there. Call :meth:`release` after reading the entries."""
        shards = self._shard_indices(indices)
        entries = indices - self.starts[shards]
        return [(self.tensors[s], e) for s, e in zip(shards.tolist(), entries.tolist(), strict=True)]

    def release(self, indices: np.ndarray) -> None:
        """Unmap the pages that were read from the shards of these entries (see :func:`_release`)."""
        for shard in np.unique(self._shard_indices(indices)).tolist():
            _release(self.tensors[shard])

    def _shard_indices(self, indices: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.starts, indices, side="right") - 1

    def by_shard(self, indices: np.ndarray) -> Iterator[tuple[ShardTensors, torch.Tensor]]:
        """Yield each shard that has some of these entries, and the positions of these entries in the shard.

        Args:
            indices: (U,) ascending indices of entries.
        """
        cuts = np.searchsorted(indices, self.starts)
        for shard, start, begin, end in zip(self.tensors, self.starts[:-1], cuts[:-1], cuts[1:], strict=True):
            if end > begin:
                yield shard, torch.from_numpy(indices[begin:end] - start)
                _release(shard)

    def gather(self, name: str, indices: np.ndarray) -> torch.Tensor:
        """Return the rows of U entries in the tensor ``name``, which is ``pooled``, ``causes`` or ``patches``."""
        rows = torch.stack([shard[name][entry] for shard, entry in self.locate(indices)])
        self.release(indices)
        return rows


def _map_shard(file: Path, modality: Modality) -> ShardTensors:
    """Return a shard's tensors, memory-mapped. The kernel reads the file when the tensors are used.

    Raises:
        UserError: the shard is damaged or cannot be mapped.
    """
    try:
        with safe_open(file, "pt"):  # checks the header against the file's size
            pass
        # Map with torch, not with safetensors: _release() is known to be safe for torch's map. No file stays open.
        content = torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8)
        return _parse_shard(content, modality)
    except (SafetensorError, ValueError) as error:
        raise UserError(f"tower store: {file} is damaged ({error}); remove it to rebuild its entries") from None
    except (OSError, RuntimeError) as error:  # for example the kernel's limit on maps or memory
        raise UserError(
            f"tower store: {file} cannot be mapped ({error}); set --tower_cache off to run without the store"
        ) from None


def _parse_shard(content: torch.Tensor, modality: Modality) -> ShardTensors:
    """Return the tensors in the bytes of a shard.

    Raises:
        ValueError: the bytes are not a valid shard of this modality.
    """
    # A file consists of the header's length (8 bytes), the header in JSON, and the tensors.
    start = 8 + int.from_bytes(content[:8].numpy().tobytes(), "little")
    header = json.loads(content[8:start].numpy().tobytes())
    remarks = (header.pop("__metadata__", None) or {}).get("remarks")
    if header.keys() != LAYOUT[modality].keys() or any(entry["dtype"] not in DTYPES for entry in header.values()):
        description = ", ".join(f"{name} ({entry['dtype']})" for name, entry in header.items())
        raise ValueError(f"unexpected tensors: {description}")
    shard = {
        name: content[start:][slice(*entry["data_offsets"])].view(DTYPES[entry["dtype"]]).view(entry["shape"])
        for name, entry in header.items()
    }
    count = len(shard["hashes"])
    for name, (dimensions, dtypes) in LAYOUT[modality].items():
        tensor = shard[name]
        rows = {"tokens": len(tensor), "offsets": count + 1}.get(name, count)
        if tensor.ndim != dimensions or tensor.dtype not in dtypes or len(tensor) != rows:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)} and dtype {tensor.dtype}: wrong for {count} {modality} entries"
            )
    if shard["hashes"].shape[1] != HASH.itemsize:
        raise ValueError(f"hashes have {shard['hashes'].shape[1]} bytes")
    if remarks is not None:
        shard["causes"] = with_remarks(shard["causes"], remarks)
    if modality == "text":
        offsets = shard["offsets"]
        if offsets[0] != 0 or offsets[-1] != len(shard["tokens"]) or not (offsets.diff() > 0).all():
            raise ValueError("offsets do not ascend from 0 to the number of tokens")
    return shard


def _widths(shard: ShardTensors) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """Return the dtype and the row shape of each tensor. All shards of the same towers have equal values."""
    return {name: (tensor.dtype, tensor.shape[1:]) for name, tensor in shard.items()}


def _release(shard: ShardTensors) -> None:
    """Unmap the shard's pages that were read, as :meth:`mmgraph.data.node_table.NodeTable._release` does.

    This is safe because the mapping belongs to a file and is never written to. If a page is read again, the kernel
    takes the same bytes from the page cache or the file.
    """
    storage = shard["hashes"].untyped_storage()
    libc.madvise(ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()), mmap.MADV_DONTNEED)


class TowerStore:
    """Reads the entries in a store's folder.

    Args:
        folder: the store's folder. A folder that does not exist is an empty store.

    Raises:
        UserError: a shard is damaged or cannot be mapped, or the shards are from different towers.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.texts, self.images = Shards(folder, "text"), Shards(folder, "image")

    def shards(self, modality: Modality) -> Shards:
        return self.texts if modality == "text" else self.images

    def tokens(self, texts: np.ndarray, images: np.ndarray, pin: bool = False) -> Tokens:
        """Return the tokens of U nodes, on the CPU. Text tokens are padded with zeros.

        Args:
            texts, images: (U,) indices of the entries of the nodes' texts and images.
            pin: use page-locked memory, so that a copy to the GPU does not block.
        """
        located = self.texts.locate(texts)
        spans = [(shard["tokens"], *shard["offsets"][entry : entry + 2].tolist()) for shard, entry in located]
        lengths = torch.tensor([end - start for _, start, end in spans])
        shape = (len(spans), int(lengths.max()), spans[0][0].shape[1])
        text = torch.zeros(shape, dtype=spans[0][0].dtype, pin_memory=pin)  # (U, L, d_text)
        for row, (tokens, start, end) in zip(text, spans, strict=True):
            row[: end - start] = tokens[start:end]
        parts = [shard["patches"][entry] for shard, entry in self.images.locate(images)]
        patches = torch.empty((len(parts), *parts[0].shape), dtype=parts[0].dtype, pin_memory=pin)  # (U, P, d_vis)
        torch.stack(parts, out=patches)
        self.texts.release(texts)
        self.images.release(images)
        mask = torch.empty(shape[:2], dtype=torch.int64, pin_memory=pin)  # (U, L)
        torch.lt(torch.arange(shape[1]), lengths[:, None], out=mask)
        return Tokens(text, mask, patches)
