"""Converts nodes to tower inputs. All collators that return tower inputs use this module."""

from collections.abc import Hashable, Iterable, Sequence
from functools import partial
from itertools import repeat
from typing import Any, Literal

import numpy as np
import torch

from mmgraph.data.image_cache import ImageCache
from mmgraph.data.image_source import UNRESOLVED_FILES, ImageSource
from mmgraph.data.images import IMAGE_STATUS, black_image, decode_picture
from mmgraph.data.lru import ShardedLRU
from mmgraph.data.preprocessing import Preprocessing

TEXT_LENGTH = 77  # maximum number of tokens of CLIP's text tower


def node_text(node: dict[str, Any]) -> str:
    """Return a node's text: ``summary`` if it has more than 3 words, else ``short_name``, else one space.

    A value that is not a string, such as None or NaN, counts as missing. So does a ``short_name`` without words.
    """
    for name, min_words in (("summary", 4), ("short_name", 1)):
        value = node.get(name)
        if isinstance(value, str) and len(value.split()) >= min_words:
            return value
    return " "


class NodeInputs:
    """Converts N node dicts to inputs of CLIP's towers.

    A call returns a dict with ``input_ids`` (N, 77) int64, ``attention_mask`` (N, 77) int64 and ``pixel_values``
    (N, 3, S, S) float32. The image paths of the nodes are opened without an image root.

    Args:
        tokenizer: a Hugging Face tokenizer.
        processor: a Hugging Face CLIP processor or CLIP image processor.
        cache_size: number of decoded and resized images to cache in memory (uint8, 150 KB each at 224 pixels).
        truncated_images: result for a truncated image file: the part that can be decoded, or a black image.
        picture_file: cache on disk, indexed by node row; None: no cache on disk.

    Attributes:
        decoded: number of image files decoded in this process so far, including unreadable files.
    """

    def __init__(
        self,
        tokenizer: Any,
        processor: Any,
        cache_size: int,
        truncated_images: Literal["partial", "black"] = "partial",
        picture_file: ImageCache | None = None,
    ):
        self.tokenizer = tokenizer
        self.preprocessing = Preprocessing(processor)
        self.cache: ShardedLRU[tuple[torch.Tensor, int]] = ShardedLRU(cache_size)
        self.truncated_images = truncated_images
        self.picture_file = picture_file
        self.decoded = 0

    def __call__(self, nodes: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        input_ids, attention_mask = self.tokenize([node_text(node) for node in nodes], "max_length")
        pictures, _ = self.read_images(map(UNRESOLVED_FILES.locate, nodes))
        return {
            "input_ids": input_ids,  # (N, 77)
            "attention_mask": attention_mask,  # (N, 77)
            "pixel_values": self.preprocessing.normalize(pictures),  # (N, 3, S, S)
        }

    def tokenize(
        self, texts: Sequence[str], padding: Literal["longest", "max_length"] = "longest"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Tokenize N texts.

        Returns:
            Token ids and attention mask, (N, L) int64 each. L is 77 with ``max_length`` padding, else the number of
            tokens of the longest of these texts, at most 77.
        """
        tokens = self.tokenizer(
            list(texts), padding=padding, truncation=True, max_length=TEXT_LENGTH, return_tensors="pt"
        )
        return tokens["input_ids"], tokens["attention_mask"]

    def read_images(
        self,
        references: Iterable[Hashable],
        rows: Sequence[int] | np.ndarray | None = None,
        images: ImageSource = UNRESOLVED_FILES,
    ) -> tuple[torch.Tensor, list[int]]:
        """Read the images of N nodes, resized and cropped, from the caches or the image files.

        Args:
            references: results of ``images.locate`` for the nodes.
            rows: the nodes' rows in the node table. If None, ``picture_file`` is not used.
            images: source of the images. By default, references are paths, which are opened without an image root.

        Returns:
            (N, 3, S, S) uint8, and an index into ``IMAGE_STATUS`` for each node.
        """
        row_numbers = repeat(None) if rows is None else map(int, rows)
        results = [
            self.cache.get(reference, partial(self._read, images, reference, row))
            for reference, row in zip(references, row_numbers, strict=rows is not None)
        ]
        pictures, image_status = zip(*results, strict=True)
        return torch.stack(pictures), list(image_status)

    def _read(self, images: ImageSource, reference: Hashable, row: int | None) -> tuple[torch.Tensor, int]:
        def decode() -> tuple[torch.Tensor, int]:
            return self.decode_image_of(*images.read(reference))

        if self.picture_file is None or row is None:
            return decode()
        return self.picture_file.read(row, images, reference, decode)

    def decode_image_of(self, data: bytes | None, status: int) -> tuple[torch.Tensor, int]:
        """Decode and resize an image.

        Args:
            data, status: results of :meth:`ImageSource.read`.

        Returns:
            (3, S, S) uint8, and an index into ``IMAGE_STATUS``.
        """
        picture, status = decode_picture(data, status, self.truncated_images)
        self.decoded += data is not None or IMAGE_STATUS[status] == "unreadable"
        if not self.preprocessing.fits(picture):
            picture, status = black_image(), IMAGE_STATUS.index("too many pixels")
        return self.preprocessing.resize(picture), status
