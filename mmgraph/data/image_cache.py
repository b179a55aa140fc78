"""One file per graph with the resized pictures of its most frequent nodes, which all processes of a host share."""

import hashlib
import json
import os
import shutil
import weakref
from collections.abc import Callable, Hashable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import torch
import torchvision

from mmgraph.data.edge_table import EdgeTable
from mmgraph.data.image_source import ImageSource
from mmgraph.data.images import IMAGE_STATUS

FORMAT = 2
DIGEST_BYTES = 16
# An image file that changed this recently may change once more without its time telling: the kernel's clock ticks
# every 1 to 10 ms. Its picture is kept at a later reading.
TICK_NS = 10_000_000
# Not kept: there is nothing to save, or the reason may pass (a lost mount, no memory).
PASSING = {IMAGE_STATUS.index(status) for status in ("no image path", "file not found", "unreadable")}


class PictureFile:
    """Keeps pictures, and why they are not whole, on disk; the page cache above it is what processes share.

    A slot holds a digest, an index into ``IMAGE_STATUS``, and the pixels. The digest is over the image file's
    signature, the status and the pixels. A slot that is half written, damaged, or from another version of the image
    file does not match its digest and counts as empty. So no locks are needed: several processes may write one slot
    (the same bytes, if the image file has not changed), and may be killed at any point. Copies in other processes (by
    fork or pickle) use the same file.

    Args:
        path: created where it is not there, sparse; of one size for one ``slots`` and ``shape``.
        slots: (N,) int32: each row's slot, -1 where it has none.
        shape: of every picture.

    Raises:
        OSError: the file cannot be made, opened or written to.

    Attributes:
        failure: why no more is kept, once the file could not be written (such as a full disk); what it holds is still
            read. Empty until then. Of this process: each finds out by itself.
    """

    def __init__(self, path: Path, slots: np.ndarray, shape: tuple[int, ...]):
        self.path, self.slots, self.shape, self.failure = path, slots, shape, ""
        self.slot_bytes = slot_bytes(shape)
        size = (int(slots.max(initial=-1)) + 1) * self.slot_bytes
        path.parent.mkdir(parents=True, exist_ok=True)
        # Read and written by offset, not through a mapping: the page cache is the same, but the pages do not count as
        # the process's own memory, a full disk is an error instead of SIGBUS, and forks share no position.
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        weakref.finalize(self, os.close, self._descriptor)
        if os.fstat(self._descriptor).st_size != size:
            os.ftruncate(self._descriptor, size)  # whoever comes first; the others would only do the same

    def read(
        self, row: int, images: ImageSource, reference: Hashable, decode: Callable[[], tuple[torch.Tensor, int]]
    ) -> tuple[torch.Tensor, int]:
        """The picture and cause of a row's image: what is kept of it, else what ``decode()`` makes, then kept."""
        signature = images.signature(reference, TICK_NS) if self.slots[row] >= 0 else None
        if not signature:  # there is no image, or it changed this very moment
            return decode()
        found = self.get(row, signature)
        if found is not None:
            return found
        picture, status = decode()
        if status not in PASSING and images.signature(reference, TICK_NS) == signature:  # else it changed in between
            self.put(row, signature, picture, status)
        return picture, status

    def get(self, row: int, signature: bytes) -> tuple[torch.Tensor, int] | None:
        """What was put of a row (which has a slot) under this signature; None where it is not there, or not whole."""
        header, picture = bytearray(DIGEST_BYTES + 1), torch.empty(self.shape, dtype=torch.uint8)
        pixels = picture.numpy()
        try:
            count = os.preadv(self._descriptor, [header, pixels.data], int(self.slots[row]) * self.slot_bytes)
        except OSError:
            return None
        status = header[DIGEST_BYTES]
        if count < self.slot_bytes or header[:DIGEST_BYTES] != _digest(signature, status, pixels):
            return None
        return picture, status

    def put(self, row: int, signature: bytes, picture: torch.Tensor, status: int) -> None:
        """Keep a row's picture, in its slot. An error sets ``failure``, and nothing is kept from there."""
        if self.failure:
            return
        pixels = picture.contiguous().numpy()
        if pixels.shape != self.shape or pixels.dtype != np.uint8:
            raise ValueError(f"a picture of {pixels.shape} {pixels.dtype}, not {self.shape} uint8")
        entry = _digest(signature, status, pixels) + bytes([status]) + pixels.tobytes()
        try:
            os.pwrite(self._descriptor, entry, int(self.slots[row]) * self.slot_bytes)
        except OSError as error:
            self.failure = _reason(error)

    def __getstate__(self) -> dict[str, Any]:
        return {"path": self.path, "slots": self.slots, "shape": self.shape}

    def __setstate__(self, state: dict[str, Any]) -> None:
        try:
            self.__init__(**state)  # type: ignore[misc]
        except OSError as error:  # in a worker, which can do without
            self._descriptor, self.failure = -1, _reason(error)


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__


def _digest(signature: bytes, status: int, pixels: np.ndarray) -> bytes:
    digest = hashlib.blake2b(signature, digest_size=DIGEST_BYTES)
    digest.update(bytes([status]))
    digest.update(pixels.data)
    return digest.digest()


def slot_bytes(shape: tuple[int, ...]) -> int:
    """What a picture takes in the file."""
    return DIGEST_BYTES + 1 + int(np.prod(shape))


def slots_by_frequency(rows: EdgeTable | np.ndarray, num_nodes: int, room: int) -> np.ndarray:
    """Slots for the ``room`` nodes with the most edge ends; of nodes with as many, the first rows.

    Args:
        rows: (E, 2) rows of the edges' ends; anything with a length that an int array indexes.

    Returns:
        (N,) int32, -1 where a node has none. A node's slot is its own row if there is room for all.
    """
    if room >= num_nodes:
        return np.arange(num_nodes, dtype=np.int32)
    ends = np.zeros(num_nodes, dtype=np.int64)
    step = max(2**20, num_nodes)  # edges at a time: a count is as long as the node table
    for start in range(0, len(rows), step):
        part = rows[np.arange(start, min(start + step, len(rows)))]
        ends += np.bincount(part.ravel(), minlength=num_nodes)
    slots = np.full(num_nodes, -1, dtype=np.int32)
    slots[np.argsort(-ends, kind="stable")[:room]] = np.arange(room)
    return slots


def file_name(**made_of: Any) -> str:
    """A file's name: a digest of all that its bytes and slots depend on, and of the libraries that decode."""
    versions = (torch.__version__, torchvision.__version__, PIL.__version__)
    key = json.dumps([FORMAT, *versions, made_of], sort_keys=True)
    return f"pictures-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}"


def missing_room(path: Path, size: int) -> int:
    """Bytes that the disk lacks for ``path`` to be filled up to ``size``."""
    taken = path.stat().st_blocks * 512 if path.exists() else 0
    folder = next(folder for folder in path.absolute().parents if folder.is_dir())
    return max(0, size - taken - shutil.disk_usage(folder).free)
