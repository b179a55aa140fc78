"""Image files to CLIP pixels: decoding that never raises, and preprocessing equal to CLIP's."""

import io
import os
import stat
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from PIL import Image, ImageFile
from torchvision.io import ImageReadMode, decode_image

# Why a node's picture is not (all of) its file. A batch carries the index; 0 is a picture read in full.
CAUSES = ("", "no image path", "file not found", "unreadable", "truncated", "too many pixels", "outside the image root",
          "file too large")  # fmt: skip
NO_PATH = CAUSES.index("no image path")
OUTSIDE = "/dev/null/outside the image root"  # instead of a path that is not to be opened; nothing can lie there
# What Pillow may open. Others are for no picture of a node, and some run other programs (EPS: Ghostscript).
FORMATS = ("JPEG", "MPO", "PNG", "GIF", "WEBP", "AVIF", "JPEG2000", "TIFF", "BMP", "DIB", "PPM", "ICO", "TGA")
MAX_FILE_BYTES = 1 << 30


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


def read_image(path: str | None, truncated: Literal["partial", "black"] = "partial") -> tuple[torch.Tensor, int]:
    """Read a picture as RGB, as ``PIL.Image.open(path).convert("RGB")`` would (EXIF rotation is not applied).

    JPEG is decoded by torchvision, whose pixels are the same; everything else (PNG, GIF, WebP, CMYK, files that end
    early) by Pillow, if it is of :data:`FORMATS`: torchvision's PNG decoder dies of a flipped bit (SIGSEGV). Files of
    more than :data:`MAX_FILE_BYTES` are not read, and pictures of more than twice Pillow's ``MAX_IMAGE_PIXELS`` not
    decoded.

    Returns:
        (3, H, W) uint8 and an index into ``CAUSES``. A picture that cannot be read is black, 224x224.
    """
    return decode_picture(*read_file(path), truncated)


def read_file(path: str | None) -> tuple[bytes | None, int]:
    """An image file's bytes, or None; and an index into ``CAUSES``."""
    if path is None or path == OUTSIDE:
        return None, CAUSES.index("no image path" if path is None else "outside the image root")
    try:
        status = os.stat(path)  # noqa: PTH116 - of millions of pictures
        if not stat.S_ISREG(status.st_mode):  # a folder; or a pipe or device, which may never end
            return None, CAUSES.index("file not found")
        if status.st_size > MAX_FILE_BYTES:
            return None, CAUSES.index("file too large")
        return Path(path).read_bytes(), 0
    except (FileNotFoundError, NotADirectoryError, ValueError):  # the last of a NUL byte
        return None, CAUSES.index("file not found")
    except OSError:
        return None, CAUSES.index("unreadable")


def decode_picture(
    data: bytes | None, cause: int, truncated: Literal["partial", "black"] = "partial"
) -> tuple[torch.Tensor, int]:
    """What :func:`read_image` gives, from what :func:`read_file` gave."""
    if data is None:
        return black_image(), cause
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's, of large pictures and of palettes: the original decoded them too
        return _decode_safely(data, truncated)


def _decode_safely(data: bytes, truncated: str) -> tuple[torch.Tensor, int]:
    try:
        with _accept_truncated.off():
            header = Image.open(io.BytesIO(data), formats=_formats())
    except Image.DecompressionBombError:
        return black_image(), CAUSES.index("too many pixels")
    except Exception:  # Pillow's plugins raise whatever a broken header makes them raise
        return black_image(), CAUSES.index("unreadable")
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
            return black_image(), CAUSES.index("unreadable")
    if truncated == "black":
        return black_image(), CAUSES.index("truncated")
    try:
        with _accept_truncated.on():
            return _to_tensor(Image.open(io.BytesIO(data), formats=_formats())), CAUSES.index("truncated")
    except Exception:
        return black_image(), CAUSES.index("unreadable")


@cache
def _formats() -> tuple[str, ...]:
    """Those that this Pillow knows."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _to_tensor(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)


def describe_causes(codes: Sequence[int]) -> str:
    """How many of some nodes lack their whole picture, by cause, such as ``3 file not found, 1 truncated``."""
    return ", ".join(f"{codes.count(i):,} {cause}" for i, cause in enumerate(CAUSES) if cause and i in codes)


class SeenImages:
    """The image files that this rank has seen, and why some were not whole.

    Args:
        nodes: how many there are.

    Attributes:
        causes: (nodes,) int8, indices into ``CAUSES``; 0 also where a node was not seen.
        read: image files so far, each once.
        bad: those of them that were not there, or not whole.
    """

    def __init__(self, nodes: int):
        self.causes, self._seen = np.zeros(nodes, dtype=np.int8), np.zeros(nodes, dtype=bool)
        self.read, self.bad = 0, 0

    def note(self, rows: np.ndarray, causes: np.ndarray) -> None:
        """Note distinct nodes of a batch: (U,) rows, and (U,) indices into ``CAUSES``."""
        with_path = causes != NO_PATH
        new = with_path & ~self._seen[rows]
        self.read, self.bad = self.read + int(new.sum()), self.bad + int((new & (causes != 0)).sum())
        self._seen[rows[with_path]] = True
        self.causes[rows] = causes


def is_black(causes: np.ndarray, truncated: Literal["partial", "black"]) -> np.ndarray:
    """Whether nodes have no picture at all, from their indices into ``CAUSES``; bool of the same shape."""
    partial = (causes == CAUSES.index("truncated")) & (truncated == "partial")
    return (causes != 0) & ~partial


def black_image() -> torch.Tensor:
    """What a node without a readable picture has: (3, 224, 224) uint8."""
    return torch.zeros(3, 224, 224, dtype=torch.uint8)
