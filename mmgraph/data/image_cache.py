"""Image cache on disk, shared by all processes of a host: the resized images of the nodes with the most edges."""

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

FORMAT = 3  # version of the file format
DIGEST_BYTES = 16
# The kernel's clock ticks every 1 to 10 ms, so a file may change again within a tick without a change of its times. An
# image file whose last change is more recent than this is not cached. A later read caches it.
TICK_NS = 10_000_000
# Images with these statuses are not cached: there is nothing to cache, or the failure may be temporary (lost mount, no
# memory).
NOT_CACHED = {IMAGE_STATUS.index(status) for status in ("no image path", "file not found", "unreadable")}


class ImageCache:
    """Caches images and their image status in a file. Processes share the file through the page cache.

    A slot contains a digest, an index into ``IMAGE_STATUS``, and the pixels. The digest covers the image file's
    signature, the status and the pixels. A slot that is partly written, damaged, or from another version of the image
    file does not match its digest and counts as empty. So no locks are needed. Several processes may write to one slot:
    if the image file has not changed, they write the same bytes. A process may be killed at any point. Copies of this
    object in other processes (by fork or pickle) use the same file.

    Args:
        path: cache file, created as a sparse file if it does not exist. Its size depends only on ``slots`` and
            ``shape``.
        slots: (N,) int32, the slot of each node row, or -1 if the row has no slot.
        shape: shape of every image.

    Raises:
        OSError: the file cannot be created, opened or written.

    Attributes:
        failure: why the file could not be written (such as a full disk); empty if this has not happened. After a
            failure, this process stores no more images, but still reads stored images. Each process has a separate
            value.
    """

    def __init__(self, path: Path, slots: np.ndarray, shape: tuple[int, ...]):
        self.path, self.slots, self.shape, self.failure = path, slots, shape, ""
        self.slot_bytes = slot_bytes(shape)
        size = (int(slots.max(initial=-1)) + 1) * self.slot_bytes
        path.parent.mkdir(parents=True, exist_ok=True)
        # The file is read and written by offset, not through a memory map. Both use the page cache. With offsets, the
        # pages do not count as memory of the process, and a full disk is an error instead of SIGBUS. Forked processes
        # share the descriptor, but do not use its position.
        self._descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
        weakref.finalize(self, os.close, self._descriptor)
        if os.fstat(self._descriptor).st_size != size:
            os.ftruncate(self._descriptor, size)  # any process may do this, because all set the same size

    def read(
        self, row: int, images: ImageSource, reference: Hashable, decode: Callable[[], tuple[torch.Tensor, int]]
    ) -> tuple[torch.Tensor, int]:
        """Return the image and image status of a node row, from the cache or else from ``decode()``.

        A result of ``decode()`` is stored if the row has a slot, the status is not in ``NOT_CACHED``, and the image
        file has not changed recently or during the call.

        Args:
            row: row in the node table.
            images: source of the image.
            reference: result of ``images.locate`` for the node.
            decode: reads, decodes and resizes the image.

        Returns:
            uint8 image of the cache's shape, and an index into ``IMAGE_STATUS``.
        """
        signature = images.signature(reference, TICK_NS) if self.slots[row] >= 0 else None
        if not signature:  # no slot, no image file, or a file that changed too recently
            return decode()
        cached = self.get(row, signature)
        if cached is not None:
            return cached
        picture, status = decode()
        if status not in NOT_CACHED and images.signature(reference, TICK_NS) == signature:  # else the file has changed
            self.put(row, signature, picture, status)
        return picture, status

    def get(self, row: int, signature: bytes) -> tuple[torch.Tensor, int] | None:
        """Return the image and image status that are stored for a row. Return None if they do not match the signature.

        Args:
            row: row in the node table; it must have a slot.
            signature: signature of the image file.

        Returns:
            As :meth:`read`. None if the slot is empty, damaged, unreadable or from another version of the image file.
        """
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
        """Store a row's image and image status in its slot. An OSError sets ``failure``. After that, nothing is stored.

        Raises:
            ValueError: the image has another shape or dtype.
        """
        if self.failure:
            return
        pixels = picture.contiguous().numpy()
        if pixels.shape != self.shape or pixels.dtype != np.uint8:
            raise ValueError(f"the image is {pixels.shape} {pixels.dtype}; the cache stores {self.shape} uint8")
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
        except OSError as error:  # the worker that gets this copy works without the cache
            self._descriptor, self.failure = -1, _reason(error)


def _reason(error: OSError) -> str:
    return error.strerror or type(error).__name__


def _digest(signature: bytes, status: int, pixels: np.ndarray) -> bytes:
    digest = hashlib.blake2b(signature, digest_size=DIGEST_BYTES)
    digest.update(bytes([status]))
    digest.update(pixels.data)
    return digest.digest()


def slot_bytes(shape: tuple[int, ...]) -> int:
    """Return the number of bytes that an image takes in the file."""
    return DIGEST_BYTES + 1 + int(np.prod(shape))


def slots_by_frequency(rows: EdgeTable | np.ndarray, num_nodes: int, count: int) -> np.ndarray:
    """Assign slots to the ``count`` nodes with the most edges. Of nodes with equally many, lower rows come first.

    Args:
        rows: (E, 2) node rows of source and destination. A self-loop counts as two edges of its node.
        num_nodes: number of nodes, N.
        count: number of slots.

    Returns:
        (N,) int32, the slot of each node, or -1 if it has no slot. If there are slots for all nodes, each node's slot
        is its row.
    """
    if count >= num_nodes:
        return np.arange(num_nodes, dtype=np.int32)
    ends = np.zeros(num_nodes, dtype=np.int64)
    step = max(2**20, num_nodes)  # edges per chunk; at least num_nodes, because bincount returns num_nodes entries
    for start in range(0, len(rows), step):
        part = rows[np.arange(start, min(start + step, len(rows)))]
        ends += np.bincount(part.ravel(), minlength=num_nodes)
    slots = np.full(num_nodes, -1, dtype=np.int32)
    slots[np.argsort(-ends, kind="stable")[:count]] = np.arange(count)
    return slots


def file_name(**made_of: Any) -> str:
    """Return the name of a cache file: a digest of everything that its bytes and slots depend on.

    The digest also covers the versions of the libraries that decode images.

    Args:
        made_of: JSON values that the bytes and slots depend on.
    """
    versions = (torch.__version__, torchvision.__version__, PIL.__version__)
    key = json.dumps([FORMAT, *versions, made_of], sort_keys=True)
    return f"pictures-{hashlib.blake2b(key.encode(), digest_size=8).hexdigest()}"


def missing_disk_space(path: Path, size: int) -> int:
    """Return how many bytes of free disk space are missing for ``path`` to grow to ``size`` bytes."""
    taken = path.stat().st_blocks * 512 if path.exists() else 0
    folder = next(folder for folder in path.absolute().parents if folder.is_dir())
    return max(0, size - taken - shutil.disk_usage(folder).free)
