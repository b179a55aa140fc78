"""Decodes images. Errors become an image status, never an exception."""

import io
import os
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageFile
from torchvision.io import ImageReadMode, decode_image

# Image status: why a node has no image, or no complete image. Batches contain the index. Index 0: a complete image.
IMAGE_STATUS = (
    "", "no image path", "file not found", "unreadable", "truncated", "too many pixels", "outside the image root",
    "file too large",
)  # fmt: skip
NO_PATH = IMAGE_STATUS.index("no image path")
OUTSIDE_IMAGE_ROOT = "/dev/null/outside the image root"  # replaces a refused path; no file can exist there
# Formats that Pillow may open. Images of nodes need no others, and some others start programs (EPS: Ghostscript).
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "AVIF", "JPEG2000", "TIFF", "BMP", "DIB", "PPM", "ICO", "TGA")


class _Switch:
    """Switches Pillow's ``LOAD_TRUNCATED_IMAGES``, which is shared by all threads.

    While it is off, several threads may decode at a time; while it is on, only one thread. It is not always on, because
    Pillow would then return truncated and damaged images without an error.
    """

    def __init__(self) -> None:
        self._begin, self._changed, self._decoding = threading.Lock(), threading.Condition(), 0

    @contextmanager
    def off(self) -> Iterator[None]:
        with self._begin, self._changed:
            self._decoding += 1
        try:
            yield
        finally:
            with self._changed:
                self._decoding -= 1
                self._changed.notify_all()

    @contextmanager
    def on(self) -> Iterator[None]:
        with self._begin, self._changed:  # _begin stays locked, so no other decoding starts and the wait ends
            self._changed.wait_for(lambda: not self._decoding)
            ImageFile.LOAD_TRUNCATED_IMAGES = True
            try:
                yield
            finally:
                ImageFile.LOAD_TRUNCATED_IMAGES = False


_accept_truncated = _Switch()


def _renew() -> None:
    """Reset the switch in a forked child, which does not have the threads that were decoding."""
    global _accept_truncated
    _accept_truncated, ImageFile.LOAD_TRUNCATED_IMAGES = _Switch(), False


os.register_at_fork(after_in_child=_renew)


def decode_picture(
    data: bytes | None, status: int, truncated: Literal["partial", "black"] = "partial"
) -> tuple[torch.Tensor, int]:
    """Decode an image as RGB, like ``PIL.Image.open(...).convert("RGB")``. EXIF rotation is not applied.

    torchvision decodes RGB JPEG files, to the same pixels as Pillow. Pillow decodes all other files of :data:`FORMATS`
    (PNG, GIF, WebP, CMYK JPEG, truncated files), because a flipped bit can crash torchvision's PNG decoder (SIGSEGV).
    Images with more than twice Pillow's ``MAX_IMAGE_PIXELS`` are not decoded.

    Args:
        data: the encoded image, or None.
        status: why ``data`` is None, as an index into :data:`IMAGE_STATUS`. Not used if ``data`` is not None.
        truncated: result for a truncated file: the part that can be decoded (``"partial"``), or a black image
            (``"black"``).

    Returns:
        The image, (3, H, W) uint8, and an index into :data:`IMAGE_STATUS`. An image that cannot be decoded is black,
        224x224.
    """
    if data is None:
        return black_image(), status
    with warnings.catch_warnings():
        # Pillow warns of large images and of palettes, but the original trainer decodes both.
        warnings.simplefilter("ignore")
        return _decode_safely(data, truncated)


def _decode_safely(data: bytes, truncated: str) -> tuple[torch.Tensor, int]:
    try:
        with _accept_truncated.off():
            header = Image.open(io.BytesIO(data), formats=_formats())
    except Image.DecompressionBombError:
        return black_image(), IMAGE_STATUS.index("too many pixels")
    except Exception:  # Pillow's plugins raise errors of any type for a damaged header
        return black_image(), IMAGE_STATUS.index("unreadable")
    return _decode(data, header, truncated)


def _decode(data: bytes, picture: Image.Image, truncated: str) -> tuple[torch.Tensor, int]:
    if picture.format == "JPEG" and picture.mode == "RGB":
        try:
            return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB), 0
        except RuntimeError:
            pass  # truncated or damaged; Pillow's error below shows which
    try:
        with _accept_truncated.off():
            return _to_tensor(picture), 0
    except Exception as error:
        if not (isinstance(error, OSError) and "truncated" in str(error)):
            return black_image(), IMAGE_STATUS.index("unreadable")
    if truncated == "black":
        return black_image(), IMAGE_STATUS.index("truncated")
    try:
        with _accept_truncated.on():
            return _to_tensor(Image.open(io.BytesIO(data), formats=_formats())), IMAGE_STATUS.index("truncated")
    except Exception:
        return black_image(), IMAGE_STATUS.index("unreadable")


@cache
def _formats() -> tuple[str, ...]:
    """Return the FORMATS that the installed Pillow supports."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _to_tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)


def describe_image_status(codes: Sequence[int]) -> str:
    """Return the number of nodes for each image status except 0, as a text such as ``3 file not found, 1 truncated``.

    Args:
        codes: indices into :data:`IMAGE_STATUS`, one per node.
    """
    return ", ".join(f"{codes.count(i):,} {status}" for i, status in enumerate(IMAGE_STATUS) if status and i in codes)


class ImageCounter:
    """Counts the nodes whose image this rank has read, and records the image status of each node.

    Args:
        nodes: number of nodes.

    Attributes:
        image_status: (nodes,) int8, indices into ``IMAGE_STATUS``; also 0 if the node was not read.
        read: number of nodes with an image path that were read so far. A node counts once.
        bad: number of the nodes in ``read`` whose image status was not 0 when they were first read.
    """

    def __init__(self, nodes: int):
        self.image_status, self._seen = np.zeros(nodes, dtype=np.int8), np.zeros(nodes, dtype=bool)
        self.read, self.bad = 0, 0

    def record(self, rows: np.ndarray, image_status: np.ndarray) -> None:
        """Record the unique nodes of a batch: (U,) rows, and (U,) indices into ``IMAGE_STATUS``."""
        with_path = image_status != NO_PATH
        new = with_path & ~self._seen[rows]
        self.read, self.bad = self.read + int(new.sum()), self.bad + int((new & (image_status != 0)).sum())
        self._seen[rows[with_path]] = True
        self.image_status[rows] = image_status


def is_black(image_status: np.ndarray, truncated: Literal["partial", "black"]) -> np.ndarray:
    """Return which nodes get a black image in place of their own: bool of the shape of ``image_status``.

    Args:
        image_status: indices into ``IMAGE_STATUS``.
        truncated: as for :func:`decode_picture`.
    """
    partial = (image_status == IMAGE_STATUS.index("truncated")) & (truncated == "partial")
    return (image_status != 0) & ~partial


def black_image() -> torch.Tensor:
    """Return the image of nodes without a readable image: (3, 224, 224) uint8, black."""
    return torch.zeros(3, 224, 224, dtype=torch.uint8)
