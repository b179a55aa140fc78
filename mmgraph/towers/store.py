"""Tokens of both towers on disk, each text and each image once: shards of safetensors, memory-mapped.

A shard holds up to ``SHARD`` entries of one kind under the hashes of what they were made from, so a store knows nothing
of nodes or rows, several graphs can share one, and an entry is never of another text or image than the one asked for:

- ``text-<name>.safetensors``: ``hashes`` (K, 16) uint8; ``tokens`` (T, d_text), the valid ones of all K texts one after
  the other; ``offsets`` (K + 1,) int64, where each begins; ``pooled`` (K, d_text) float32;
- ``image-<name>.safetensors``: ``hashes``; ``patches`` (K, P, d_vis), without the class token; ``pooled`` (K, d_vis)
  float32; ``causes`` (K,) uint8, as :data:`mmgraph.data.images.IMAGE_STATUS`.
"""

import ctypes
import hashlib
import json
import mmap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from mmgraph.data.content_hashes import HASH
from mmgraph.errors import UserError
from mmgraph.towers.tokens import Tokens

SHARD = 512  # entries: what a build that is killed computes again
MAX_SHARDS = 8000  # of a kind; larger stores have larger shards, for the kernel maps 65,530 files at most

DTYPES = {"U8": torch.uint8, "I64": torch.int64, "F32": torch.float32, "F16": torch.float16}  # safetensors' names
TOKENS = (torch.float32, torch.float16)

Modality = Literal["text", "image"]
ShardTensors = dict[str, torch.Tensor]

LAYOUT: dict[Modality, dict[str, tuple[int, tuple[torch.dtype, ...]]]] = {  # dimensions and dtypes of a shard's tensors
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
    """A shard's file name, from its entries' hashes: builders that divide the work otherwise never clash."""
    return f"{modality}-{hashlib.blake2b(hashes.tobytes(), digest_size=8).hexdigest()}.safetensors"


class Shards:
    """The shards of one kind in a folder, and the places of their entries: entry k of shard s is starts[s] + k."""

    def __init__(self, folder: Path, modality: Modality):
        self.files = sorted(folder.glob(f"{modality}-*.safetensors"))
        self.tensors: list[ShardTensors] = []
        hashes: list[np.ndarray] = []
        for file in self.files:
            self.tensors.append(shard := _mapped(file, modality))
            if _widths(shard) != _widths(self.tensors[0]):
                raise UserError(f"tower store: {file} and {self.files[0]} are of different towers; remove the wrong")
            hashes.append(shard["hashes"].numpy().reshape(-1).view(HASH).copy())
            _release(shard)
        self.starts = np.cumsum([0, *map(len, hashes)])
        self._hashes = np.concatenate([np.empty(0, HASH), *hashes])
        self._order = np.argsort(self._hashes, kind="stable")

    def find(self, hashes: np.ndarray) -> np.ndarray:
        """Places of the entries under ``hashes`` (N,), int64; -1 where there is none."""
        if not len(self._order):
            return np.full(len(hashes), -1)
        ranked = np.searchsorted(self._hashes, hashes, sorter=self._order)
        places = self._order[np.minimum(ranked, len(self._order) - 1)]
        return np.where(self._hashes[places] == hashes, places, -1)

    def locate(self, places: np.ndarray) -> Sequence[tuple[ShardTensors, int]]:
        """The shard of each place, and the entry in it. Call :meth:`release` when they are read."""
        shards = self._numbers(places)
        entries = places - self.starts[shards]
        return [(self.tensors[s], e) for s, e in zip(shards.tolist(), entries.tolist(), strict=True)]

    def release(self, places: np.ndarray) -> None:
        """Let go of what was read of the shards of ``places`` (see :func:`_release`)."""
        for shard in np.unique(self._numbers(places)).tolist():
            _release(self.tensors[shard])

    def _numbers(self, places: np.ndarray) -> np.ndarray:
        return np.searchsorted(self.starts, places, side="right") - 1

    def by_shard(self, places: np.ndarray) -> Iterator[tuple[ShardTensors, torch.Tensor]]:
        """The shards that hold ascending ``places``, and which of their entries these are."""
        cuts = np.searchsorted(places, self.starts)
        for shard, start, begin, end in zip(self.tensors, self.starts[:-1], cuts[:-1], cuts[1:], strict=True):
            if end > begin:
                yield shard, torch.from_numpy(places[begin:end] - start)
                _release(shard)

    def gather(self, name: str, places: np.ndarray) -> torch.Tensor:
        """A tensor of one row an entry (``pooled``, ``causes``, ``patches``), at ``places``: (U, ...)."""
        rows = torch.stack([shard[name][entry] for shard, entry in self.locate(places)])
        self.release(places)
        return rows


def _mapped(file: Path, modality: Modality) -> ShardTensors:
    """A shard's tensors where they lie in the file, which the kernel reads when they are used."""
    try:
        with safe_open(file, "pt"):  # checks the header against the file's size
            pass
        # Mapped here and not by safetensors, so that letting go of pages is known to be safe. Keeps no descriptor open.
        whole = torch.from_file(str(file), size=file.stat().st_size, dtype=torch.uint8)
        return _read(whole, modality)
    except (SafetensorError, ValueError) as error:
        raise UserError(f"tower store: {file} is damaged ({error}); remove it, and its entries are made anew") from None
    except (OSError, RuntimeError) as error:  # such as a limit of the kernel's on maps or memory
        raise UserError(f"tower store: {file} cannot be mapped ({error}); --tower_cache off does without") from None


def _read(whole: torch.Tensor, modality: Modality) -> ShardTensors:
    """The tensors in the bytes of a shard. Raises :class:`ValueError` where it is none of this kind."""
    start = 8 + int.from_bytes(whole[:8].numpy().tobytes(), "little")  # the format: a length, a header in JSON, bytes
    header = json.loads(whole[8:start].numpy().tobytes())
    header.pop("__metadata__", None)
    if header.keys() != LAYOUT[modality].keys() or any(entry["dtype"] not in DTYPES for entry in header.values()):
        told = ", ".join(f"{name} of {entry['dtype']}" for name, entry in header.items())
        raise ValueError(f"holds {told}")
    shard = {
        name: whole[start:][slice(*entry["data_offsets"])].view(DTYPES[entry["dtype"]]).view(entry["shape"])
        for name, entry in header.items()
    }
    count = len(shard["hashes"])
    for name, (dimensions, dtypes) in LAYOUT[modality].items():
        found = shard[name]
        rows = {"tokens": len(found), "offsets": count + 1}.get(name, count)
        if found.ndim != dimensions or found.dtype not in dtypes or len(found) != rows:
            raise ValueError(f"{name} is {tuple(found.shape)} {found.dtype}, of {count} {modality}s")
    if shard["hashes"].shape[1] != HASH.itemsize:
        raise ValueError(f"hashes of {shard['hashes'].shape[1]} bytes")
    if modality == "text":
        offsets = shard["offsets"]
        if offsets[0] != 0 or offsets[-1] != len(shard["tokens"]) or not (offsets.diff() > 0).all():
            raise ValueError("its offsets do not ascend over its tokens")
    return shard


def _widths(shard: ShardTensors) -> dict[str, tuple[torch.dtype, torch.Size]]:
    """What is the same in all shards of a store, for it is of the towers."""
    return {name: (tensor.dtype, tensor.shape[1:]) for name, tensor in shard.items()}


def _release(shard: ShardTensors) -> None:
    """Let go of the shard's pages that were read, as :meth:`mmgraph.data.node_table.NodeTable.release` does.

    The mapping is of a file and nothing writes to it: what is read again comes from the page cache, the same bytes.
    """
    storage = shard["hashes"].untyped_storage()
    libc.madvise(ctypes.c_void_p(storage.data_ptr()), ctypes.c_size_t(storage.nbytes()), mmap.MADV_DONTNEED)


class TowerStore:
    """A folder of shards, read.

    Args:
        folder: the store's; one that does not exist holds nothing.

    Raises:
        UserError: a shard is damaged, or cannot be mapped.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.texts, self.images = Shards(folder, "text"), Shards(folder, "image")

    def shards(self, modality: Modality) -> Shards:
        return self.texts if modality == "text" else self.images

    def tokens(self, texts: np.ndarray, images: np.ndarray, pin: bool = False) -> Tokens:
        """Tokens of U nodes, from the places of their texts and images; zeros behind the end of a text.

        Args:
            pin: in page-locked memory, from where a GPU copies without waiting.
        """
        found = self.texts.locate(texts)
        spans = [(shard["tokens"], *shard["offsets"][entry : entry + 2].tolist()) for shard, entry in found]
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
        mask = (torch.arange(shape[1]) < lengths[:, None]).long()  # (U, L)
        return Tokens(text, mask, patches)


class ResidentTokens(NamedTuple):
    """All tokens of some nodes in one device's memory."""

    text: torch.Tensor  # (T, d_text), of all texts one after the other
    offsets: torch.Tensor  # (N_text + 1,) int64
    patches: torch.Tensor  # (N_image, P, d_vis)

    @classmethod
    def load(cls, store: TowerStore, texts: np.ndarray, images: np.ndarray, device: torch.device) -> "ResidentTokens":
        """The entries at the places ``texts`` and ``images``, each ascending; a shard at a time passes host memory."""
        lengths = torch.cat([shard["offsets"].diff()[entries] for shard, entries in store.texts.by_shard(texts)])
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        first, picture = store.texts.tensors[0]["tokens"], store.images.tensors[0]["patches"]
        text = torch.empty((int(offsets[-1]), first.shape[1]), dtype=first.dtype, device=device)
        begin = 0
        for shard, entries in store.texts.by_shard(texts):
            spans = zip(shard["offsets"][entries].tolist(), shard["offsets"][entries + 1].tolist(), strict=True)
            part = torch.cat([shard["tokens"][start:end] for start, end in spans])
            text[begin : begin + len(part)] = part.to(device)
            begin += len(part)
        patches = torch.empty((len(images), *picture.shape[1:]), dtype=picture.dtype, device=device)
        begin = 0
        for shard, entries in store.images.by_shard(images):
            patches[begin : begin + len(entries)] = shard["patches"][entries].to(device)
            begin += len(entries)
        return cls(text, offsets.to(device), patches)

    def tokens(self, texts: torch.Tensor, images: torch.Tensor, length: int) -> Tokens:
        """As :meth:`TowerStore.tokens`, of the entries with these numbers (U,), on the device.

        Args:
            length: of the longest of these texts, known on the host: the device is not waited for.
        """
        starts, ends = self.offsets[texts], self.offsets[texts + 1]  # (U,)
        places = starts[:, None] + torch.arange(length, device=starts.device)  # (U, L)
        mask = places < ends[:, None]
        text = self.text[places.clamp(max=len(self.text) - 1)] * mask[:, :, None]  # (U, L, d_text)
        return Tokens(text, mask.long(), self.patches[images])
