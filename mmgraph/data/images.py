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

from mmgraph.data.input_rules import InputRules

# Image status: why a node has no image, or no complete image. Batches contain the index. Index 0: a complete image.
# From FIRST_REMARK on: the image is complete, but the rules of the original trainer may spoil it.
IMAGE_STATUS = (
    "", "no image path", "file not found", "unreadable", "truncated", "too many pixels", "outside the image root",
    "file too large", "transparent", "transparent, one color", "16-bit grey",
)  # fmt: skip
NO_PATH = IMAGE_STATUS.index("no image path")
FIRST_REMARK = IMAGE_STATUS.index("transparent")
DEFAULT_RULES = InputRules()
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


def decode_picture(data: bytes | None, status: int, rules: InputRules = DEFAULT_RULES) -> tuple[torch.Tensor, int]:
    """Decode an image as RGB. EXIF rotation is not applied.

    With the default rules, the pixels are those of ``PIL.Image.open(...).convert("RGB")``.

    torchvision decodes RGB JPEG files, to the same pixels as Pillow. Pillow decodes all other files of :data:`FORMATS`
    (PNG, GIF, WebP, CMYK JPEG, truncated files), because a flipped bit can crash torchvision's PNG decoder (SIGSEGV).
    Images with more than twice Pillow's ``MAX_IMAGE_PIXELS`` are not decoded.

    Args:
        data: the encoded image, or None.
        status: why ``data`` is None, as an index into :data:`IMAGE_STATUS`. Not used if ``data`` is not None.
        rules: how truncated files, transparent pixels and 16-bit values are treated.

    Returns:
        The image, (3, H, W) uint8, and an index into :data:`IMAGE_STATUS`. An image that cannot be decoded is black,
        224x224.
    """
    if data is None:
        return black_image(), status
    with warnings.catch_warnings():
        # Pillow warns of large images and of palettes, but the original trainer decodes both.
        warnings.simplefilter("ignore")
        return _decode_safely(data, rules)


def convert_picture(picture: Image.Image, rules: InputRules = DEFAULT_RULES) -> tuple[torch.Tensor, int]:
    """Convert an image that Pillow has opened, as :func:`decode_picture` does for a file.

    If its file is truncated or damaged, the result is black: Pillow cannot read it a second time.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _to_rgb(picture, rules)
        except Exception:  # Pillow's plugins raise errors of any type for damaged data
            return black_image(), IMAGE_STATUS.index("unreadable")


def _decode_safely(data: bytes, rules: InputRules) -> tuple[torch.Tensor, int]:
    try:
        with _accept_truncated.off():
            header = Image.open(io.BytesIO(data), formats=_formats())
    except Image.DecompressionBombError:
        return black_image(), IMAGE_STATUS.index("too many pixels")
    except Exception:  # Pillow's plugins raise errors of any type for a damaged header
        return black_image(), IMAGE_STATUS.index("unreadable")
    return _decode(data, header, rules)


def _decode(data: bytes, picture: Image.Image, rules: InputRules) -> tuple[torch.Tensor, int]:
    if picture.format == "JPEG" and picture.mode == "RGB":
        try:
            return decode_image(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB), 0
        except RuntimeError:
            pass  # truncated or damaged; Pillow's error below shows which
    try:
        with _accept_truncated.off():
            return _to_rgb(picture, rules)
    except Exception as error:
        if not (isinstance(error, OSError) and "truncated" in str(error)):
            return black_image(), IMAGE_STATUS.index("unreadable")
    if rules.truncated_images == "black":
        return black_image(), IMAGE_STATUS.index("truncated")
    try:
        with _accept_truncated.on():
            pixels, _ = _to_rgb(Image.open(io.BytesIO(data), formats=_formats()), rules)
            return pixels, IMAGE_STATUS.index("truncated")
    except Exception:
        return black_image(), IMAGE_STATUS.index("unreadable")


@cache
def _formats() -> tuple[str, ...]:
    """Return the FORMATS that the installed Pillow supports."""
    Image.init()
    return tuple(name for name in FORMATS if name in Image.OPEN)


def _to_rgb(picture: Image.Image, rules: InputRules) -> tuple[torch.Tensor, int]:
    """Return the pixels, (3, H, W) uint8, and an index into :data:`IMAGE_STATUS`: 0 or a remark."""
    if picture.mode.startswith("I") or picture.mode == "F":
        return _deep_grey_to_rgb(picture, rules)
    if not picture.has_transparency_data:
        return _pixels(picture.convert("RGB")), 0
    picture.load()
    with_alpha = picture.convert("RGBA")
    is_transparent = bool((np.asarray(with_alpha.getchannel("A")) < 255).any())
    if rules.color is None or not is_transparent:
        flat = picture.convert("RGB")
    else:
        flat = Image.alpha_composite(Image.new("RGBA", picture.size, (*rules.color, 255)), with_alpha).convert("RGB")
    if not is_transparent:
        return _pixels(flat), 0
    pixels = _pixels(flat)
    one_color = bool((pixels == pixels[:, :1, :1]).all())
    return pixels, IMAGE_STATUS.index("transparent, one color" if one_color else "transparent")


def _deep_grey_to_rgb(picture: Image.Image, rules: InputRules) -> tuple[torch.Tensor, int]:
    """Convert a greyscale image whose pixels are integers of 16 or 32 bits, or floating-point numbers.

    The remark is set if the conversion loses values: those above 255 (or 65,535 with ``scale``) become white, and
    floating-point numbers from 0 to 1 become black.
    """
    grey = np.array(picture)  # (H, W)
    is_float = picture.mode == "F"
    spoiled = bool(grey.size) and bool(grey.max() > 255 or (is_float and 0 < grey.max() <= 1))
    if rules.sixteen_bit_images == "scale" and spoiled and not is_float:
        spoiled = bool(grey.max() > 65_535)
        scaled = (grey.clip(0, 65_535).astype(np.uint32) + 128) // 257  # from 0 to 255
        picture = Image.fromarray(scaled.astype(np.uint8))
    return _pixels(picture.convert("RGB")), IMAGE_STATUS.index("16-bit grey") if spoiled else 0


def _pixels(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)  # (H, W, 3) -> (3, H, W)


def is_incomplete(image_status: np.ndarray) -> np.ndarray:
    """Return which nodes have no image or no complete image: bool of the shape of ``image_status``.

    Args:
        image_status: indices into :data:`IMAGE_STATUS`.
    """
    return (image_status != 0) & (image_status < FIRST_REMARK)


def count_image_status(image_status: np.ndarray | Sequence[int]) -> list[int]:
    """Return the number of nodes with each image status, in the order of :data:`IMAGE_STATUS`.

    Args:
        image_status: (N,) indices into :data:`IMAGE_STATUS`, one per node.
    """
    return np.bincount(np.asarray(image_status, dtype=np.int64), minlength=len(IMAGE_STATUS)).tolist()


def describe_image_status(counts: Sequence[int]) -> str:
    """Describe how many nodes have no complete image, by image status, such as ``3 file not found, 1 truncated``.

    Args:
        counts: result of :func:`count_image_status`.
    """
    incomplete = list(zip(IMAGE_STATUS, counts, strict=True))[:FIRST_REMARK]
    return ", ".join(f"{count:,} {status}" for status, count in incomplete if status and count)


def image_remarks(counts: Sequence[int], rules: InputRules) -> list[str]:
    """Return log lines about complete images that the rules may spoil: transparent images and 16-bit grey images.

    Args:
        counts: result of :func:`count_image_status`.
        rules: the rules by which the images were decoded.
    """
    some, one, grey = counts[FIRST_REMARK:]
    lines = []
    if some and not one and rules.background == "keep":
        lines.append(f"the transparency of {some:,} images is dropped; --background white lays them on a color")
    elif one and rules.background == "keep":
        lines.append(
            f"warning: the transparency of {some + one:,} images is dropped; {one:,} of them become a single color, "
            "such as a black shape on a transparent ground; set --background white to keep such shapes"
        )
    elif one:
        lines.append(
            f"warning: {one:,} of {some + one:,} images with transparent pixels become a single color on --background "
            f"{rules.background}; set another color"
        )
    if grey and rules.sixteen_bit_images == "clip":
        lines.append(
            f"warning: {grey:,} greyscale images have more than 8 bits per pixel; their values above 255 become white; "
            "set --sixteen_bit_images scale for 16-bit images, and convert floating-point images"
        )
    elif grey:
        lines.append(f"warning: {grey:,} greyscale images have 32 bits per pixel, which cannot be scaled; convert them")
    return lines


class ImageCounter:
    """Counts the nodes whose image this rank has read, and records the image status of each node.

    Args:
        nodes: number of nodes.

    Attributes:
        image_status: (nodes,) int8, indices into ``IMAGE_STATUS``; also 0 if the node was not read.
        read: number of nodes with an image path that were read so far. A node counts once.
        bad: number of the nodes in ``read`` whose image was not complete when they were first read.
    """

    def __init__(self, nodes: int):
        self.image_status, self._seen = np.zeros(nodes, dtype=np.int8), np.zeros(nodes, dtype=bool)
        self.read, self.bad = 0, 0

    def record(self, rows: np.ndarray, image_status: np.ndarray) -> None:
        """Record the unique nodes of a batch: (U,) rows, and (U,) indices into ``IMAGE_STATUS``."""
        with_path = image_status != NO_PATH
        new = with_path & ~self._seen[rows]
        self.read, self.bad = self.read + int(new.sum()), self.bad + int((new & is_incomplete(image_status)).sum())
        self._seen[rows[with_path]] = True
        self.image_status[rows] = image_status


def is_black(image_status: np.ndarray, truncated: Literal["partial", "black"]) -> np.ndarray:
    """Return which nodes get a black image in place of their own: bool of the shape of ``image_status``.

    Args:
        image_status: indices into ``IMAGE_STATUS``.
        truncated: ``--truncated_images`` of the run.
    """
    partial = (image_status == IMAGE_STATUS.index("truncated")) & (truncated == "partial")
    return is_incomplete(image_status) & ~partial


def black_image() -> torch.Tensor:
    """Return the image of nodes without a readable image: (3, 224, 224) uint8, black."""
    return torch.zeros(3, 224, 224, dtype=torch.uint8)
