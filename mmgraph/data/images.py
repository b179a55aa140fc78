"""Image files to CLIP pixels: decoding that never raises, and preprocessing equal to CLIP's."""

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

# Why a node's picture is not (all of) its file. A batch carries the index; 0 is a picture read in full.
IMAGE_STATUS = (
    "", "no image path", "file not found", "unreadable", "truncated", "too many pixels", "outside the image root",
    "file too large",
)  # fmt: skip
NO_PATH = IMAGE_STATUS.index("no image path")
OUTSIDE = "/dev/null/outside the image root"  # instead of a path that is not to be opened; nothing can lie there
# What Pillow may open. Others are for no picture of a node, and some run other programs (EPS: Ghostscript).
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "AVIF", "JPEG2000", "TIFF", "BMP", "DIB", "PPM", "ICO", "TGA")


class _Switch:
    """Pillow's ``LOAD_TRUNCATED_IMAGES``, which is all threads': many decode while it is off, or one while it is on.

    Left on, half images would pass without a word, and damaged ones as whole.
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
        with self._begin, self._changed:  # held all along: nobody else begins, so this one need not wait for ever
            self._changed.wait_for(lambda: not self._decoding)
            ImageFile.LOAD_TRUNCATED_IMAGES = True
            try:
                yield
            finally:
                ImageFile.LOAD_TRUNCATED_IMAGES = False


_accept_truncated = _Switch()


def _renew() -> None:
    """In a child: who was decoding is no thread of it."""
    global _accept_truncated
    _accept_truncated, ImageFile.LOAD_TRUNCATED_IMAGES = _Switch(), False


os.register_at_fork(after_in_child=_renew)


def decode_picture(
    data: bytes | None, status: int, truncated: Literal["partial", "black"] = "partial"
) -> tuple[torch.Tensor, int]:
    """Decode a picture as RGB, as ``PIL.Image.open(...).convert("RGB")`` would (EXIF rotation is not applied).

    JPEG is decoded by torchvision, whose pixels are the same; everything else (PNG, GIF, WebP, CMYK, files that end
    early) by Pillow, if it is of :data:`FORMATS`: torchvision's PNG decoder dies of a flipped bit (SIGSEGV). Pictures
    of more than twice Pillow's ``MAX_IMAGE_PIXELS`` are not decoded.

    Args:
        data: the encoded picture; None where there is none.
        cause: index into :data:`IMAGE_STATUS` of why there is none.
        truncated: what a file that ends early gives: the part that is there, or black.

    Returns:
        (3, H, W) uint8 and an index into :data:`IMAGE_STATUS`. A picture that cannot be decoded is black, 224x224.
    """
    if data is None:
        return black_image(), status
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of large pictures and of palettes: the original decoded them too
        return _decode_safely(data, truncated)


def _decode_safely(data: bytes, truncated: str) -> tuple[torch.Tensor, int]:
    try:
        with _accept_truncated.off():
            header = Image.open(io.BytesIO(data), formats=_formats())
    except Image.DecompressionBombError:
        return black_image(), IMAGE_STATUS.index("too many pixels")
    except Exception:  # Pillow's plugins raise whatever a broken header makes them raise
        return black_image(), IMAGE_STATUS.index("unreadable")
    return _decode(data, header, truncated)


def _decode(data: bytes, picture: Image.Image, truncated: str) -> tuple[torch.Tensor, int]:
    if picture.format == "JPEG" and picture.mode == "RGB":
        try:
            return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB), 0
        except RuntimeError:
            pass  # truncated or broken: Pillow tells which
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
    """Those that this Pillow knows."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _to_tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)


def describe_image_status(codes: Sequence[int]) -> str:
    """How many of some nodes lack their whole picture, by cause, such as ``3 file not found, 1 truncated``."""
    return ", ".join(f"{codes.count(i):,} {status}" for i, status in enumerate(IMAGE_STATUS) if status and i in codes)


class ImageCounter:
    """The image files that this rank has seen, and why some were not whole.

    Args:
        nodes: how many there are.

    Attributes:
        causes: (nodes,) int8, indices into ``IMAGE_STATUS``; 0 also where a node was not seen.
        read: image files so far, each once.
        bad: those of them that were not there, or not whole.
    """

    def __init__(self, nodes: int):
        self.image_status, self._seen = np.zeros(nodes, dtype=np.int8), np.zeros(nodes, dtype=bool)
        self.read, self.bad = 0, 0

    def note(self, rows: np.ndarray, image_status: np.ndarray) -> None:
        """Note distinct nodes of a batch: (U,) rows, and (U,) indices into ``IMAGE_STATUS``."""
        with_path = image_status != NO_PATH
        new = with_path & ~self._seen[rows]
        self.read, self.bad = self.read + int(new.sum()), self.bad + int((new & (image_status != 0)).sum())
        self._seen[rows[with_path]] = True
        self.image_status[rows] = image_status


def is_black(image_status: np.ndarray, truncated: Literal["partial", "black"]) -> np.ndarray:
    """Whether nodes have no picture at all, from their indices into ``IMAGE_STATUS``; bool of the same shape."""
    partial = (image_status == IMAGE_STATUS.index("truncated")) & (truncated == "partial")
    return (image_status != 0) & ~partial


def black_image() -> torch.Tensor:
    """What a node without a readable picture has: (3, 224, 224) uint8."""
    return torch.zeros(3, 224, 224, dtype=torch.uint8)
