"""Small pictures of nodes, decoded as for the towers, for a page and for trackers."""

import base64
import io
import time
import warnings
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Literal

import numpy as np
from PIL import Image

from mmgraph.data.image_source import ImageSource
from mmgraph.data.images import decode_picture, is_black

WORKERS = 2  # decoders of JPEG and PNG let go of Python's lock; each may hold a picture of 179 million pixels
SECONDS = 120  # after which the pictures that are left are not read
QUALITY = 70


def thumbnails(
    images: ImageSource, references: Sequence[Hashable], side: int, truncated: Literal["partial", "black"]
) -> list[Image.Image | None]:
    """Pictures of at most ``side`` x ``side`` pixels; None where towers see all black, or :data:`SECONDS` are over."""
    deadline = time.monotonic() + SECONDS

    def small(reference: Hashable) -> Image.Image | None:
        if time.monotonic() > deadline:
            return None
        pixels, status = decode_picture(*images.read(reference), truncated)
        if is_black(np.array(status), truncated):
            return None
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())  # (3, H, W) -> (H, W, 3)
        picture.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=3)
        return picture

    # Threads save and restore the filters of warnings over each other, so what is restored must ignore them too.
    with warnings.catch_warnings(), ThreadPoolExecutor(WORKERS) as pool:
        warnings.simplefilter("ignore")
        try:
            return list(pool.map(small, references))
        finally:
            pool.shutdown(cancel_futures=True)  # where it is interrupted


def as_uri(picture: Image.Image) -> str:
    """A picture as a ``data:`` URI."""
    content = io.BytesIO()
    picture.save(content, "WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def sheet(rows: Sequence[Sequence[Image.Image | None]], side: int) -> Image.Image:
    """Rows of pictures on one, each in a square of ``side`` pixels; a gap after the first of a row."""
    gap = side // 4
    width = max(map(len, rows)) * side + gap
    whole = Image.new("RGB", (width, len(rows) * side), "white")
    for top, row in enumerate(rows):
        for left, picture in enumerate(row):
            if picture is not None:
                shown = picture.copy()
                shown.thumbnail((side - 4, side - 4))
                whole.paste(shown, (left * side + (gap if left else 0) + 2, top * side + 2))
    return whole


def scattered(pictures: Sequence[Image.Image | None], places: Sequence[tuple[float, float]], size: int) -> Image.Image:
    """Pictures on a square of ``size`` pixels, centred at places from 0 to 1, the second upwards."""
    whole = Image.new("RGB", (size, size), "white")
    for picture, (x, y) in zip(pictures, places, strict=True):
        if picture is not None:
            shown = picture.copy()
            shown.thumbnail((size // 40, size // 40))
            whole.paste(shown, (int(x * (size - shown.width)), int((1 - y) * (size - shown.height))))
    return whole
