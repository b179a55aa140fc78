"""Makes thumbnails of nodes' images for the page and for trackers. Images are decoded as for the towers."""

import base64
import io
import time
import warnings
from collections.abc import Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image

from mmgraph.data.image_source import ImageSource
from mmgraph.data.images import decode_picture, is_black
from mmgraph.data.input_rules import InputRules

# Number of threads. Threads are enough, because the decoders release the GIL. There are only 2, because each thread may
# hold an image of 179 million pixels.
WORKERS = 2
SECONDS = 120  # time limit; images that are not read within this time are skipped
QUALITY = 70  # of WebP images, from 0 to 100


def thumbnails(
    images: ImageSource, references: Sequence[Hashable], side: int, rules: InputRules
) -> list[Image.Image | None]:
    """Return thumbnails of at most ``side`` x ``side`` pixels, in the order of the references.

    A thumbnail is None if the towers get a black image instead of the node's image, or if the image is not read within
    :data:`SECONDS`.

    Args:
        images: the source that reads the images.
        references: references of images, from ``images.locate``.
        side: maximum width and height in pixels.
        rules: as in :func:`mmgraph.data.images.decode_picture`.
    """
    deadline = time.monotonic() + SECONDS

    def small(reference: Hashable) -> Image.Image | None:
        if time.monotonic() > deadline:
            return None
        pixels, status = decode_picture(*images.read(reference), rules)
        if is_black(np.array(status), rules.truncated_images):
            return None
        picture = Image.fromarray(pixels.permute(1, 2, 0).numpy())  # (3, H, W) -> (H, W, 3)
        picture.thumbnail((side, side), Image.Resampling.BICUBIC, reducing_gap=3)
        return picture

    # decode_picture saves the warning filters, sets filters that ignore warnings, and restores the saved ones. All
    # threads share the filters, so one thread may restore them while another one decodes. The saved filters must
    # therefore ignore warnings too.
    with warnings.catch_warnings(), ThreadPoolExecutor(WORKERS) as pool:
        warnings.simplefilter("ignore")
        try:
            return list(pool.map(small, references))
        finally:
            pool.shutdown(cancel_futures=True)  # after an interrupt, the remaining images are not decoded


def as_uri(picture: Image.Image) -> str:
    """Return an image as a ``data:`` URI of a WebP file."""
    content = io.BytesIO()
    picture.save(content, "WEBP", quality=QUALITY)
    return f"data:image/webp;base64,{base64.b64encode(content.getvalue()).decode()}"


def sheet(rows: Sequence[Sequence[Image.Image | None]], side: int) -> Image.Image:
    """Draw rows of images on one image. Each image gets a square of ``side`` pixels; None gives a white square.

    A gap follows the first square of each row.
    """
    gap = side // 4
    width = max(map(len, rows)) * side + gap
    canvas = Image.new("RGB", (width, len(rows) * side), "white")
    for top, row in enumerate(rows):
        for left, picture in enumerate(row):
            if picture is not None:
                shown = picture.copy()
                shown.thumbnail((side - 4, side - 4))
                canvas.paste(shown, (left * side + (gap if left else 0) + 2, top * side + 2))
    return canvas


def scattered(
    pictures: Sequence[Image.Image | None], positions: Sequence[tuple[float, float]], size: int
) -> Image.Image:
    """Draw images at given positions on a white square.

    Args:
        pictures: the images. An image is scaled down to at most 1/40 of ``size``; None is skipped.
        positions: (x, y) of each image, from 0 to 1; y points up.
        size: width and height of the square in pixels.
    """
    canvas = Image.new("RGB", (size, size), "white")
    for picture, (x, y) in zip(pictures, positions, strict=True):
        if picture is not None:
            shown = picture.copy()
            shown.thumbnail((size // 40, size // 40))
            canvas.paste(shown, (int(x * (size - shown.width)), int((1 - y) * (size - shown.height))))
    return canvas
