"""Nodes to tower inputs: the text rule, the image rule, and the cache. Every collator is this and an order of nodes."""

from collections.abc import Hashable, Iterable, Sequence
from functools import partial
from itertools import repeat
from typing import Any, Literal

import numpy as np
import torch

from mmgraph.data.image_cache import PictureFile
from mmgraph.data.image_source import AS_GIVEN, ImageSource
from mmgraph.data.images import IMAGE_STATUS, black_image, decode_picture
from mmgraph.data.lru import ShardedLRU
from mmgraph.data.preprocessing import Preprocessing

TEXT_LENGTH = 77  # tokens, CLIP's


def node_text(node: dict[str, Any]) -> str:
    """``summary`` if it has more than 3 words, else ``short_name``, else one space. Missing values are not words."""
    for name, words in (("summary", 4), ("short_name", 1)):
        value = node.get(name)
        if isinstance(value, str) and len(value.split()) >= words:
            return value
    return " "


class NodeInputs:
    """Turns N node dicts into what CLIP's towers take.

    Calling it gives a dict of ``input_ids`` (N, 77) int64, ``attention_mask`` (N, 77) int64, ``pixel_values``
    (N, 3, S, S) float32.

    Args:
        tokenizer: a Hugging Face tokenizer.
        processor: a Hugging Face CLIP processor or CLIP image processor.
        cache_size: images kept decoded and resized (as bytes, 150 KB each at 224 pixels).
        truncated_images: what an image file that ends early gives: the part that is there, or black.
        picture_file: where pictures of known rows are looked up before they are decoded, and kept.

    Attributes:
        decoded: image files decoded so far, in this process.
    """

    def __init__(
        self,
        tokenizer: Any,
        processor: Any,
        cache_size: int,
        truncated_images: Literal["partial", "black"] = "partial",
        picture_file: PictureFile | None = None,
    ):
        self.tokenizer = tokenizer
        self.preprocessing = Preprocessing(processor)
        self.cache: ShardedLRU[tuple[torch.Tensor, int]] = ShardedLRU(cache_size)
        self.truncated_images = truncated_images
        self.picture_file = picture_file
        self.decoded = 0

    def __call__(self, nodes: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        input_ids, attention_mask = self.texts([node_text(node) for node in nodes], "max_length")
        pictures, _ = self.pictures(map(AS_GIVEN.locate, nodes))
        return {
            "input_ids": input_ids,  # (N, 77)
            "attention_mask": attention_mask,  # (N, 77)
            "pixel_values": self.preprocessing.normalize(pictures),  # (N, 3, S, S)
        }

    def texts(
        self, texts: Sequence[str], padding: Literal["longest", "max_length"] = "longest"
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids and mask of N texts, (N, L) int64 each: L is 77, or that of the longest text of these."""
        tokens = self.tokenizer(
            list(texts), padding=padding, truncation=True, max_length=TEXT_LENGTH, return_tensors="pt"
        )
        return tokens["input_ids"], tokens["attention_mask"]

    def pictures(
        self,
        references: Iterable[Hashable],
        rows: Sequence[int] | np.ndarray | None = None,
        images: ImageSource = AS_GIVEN,
    ) -> tuple[torch.Tensor, list[int]]:
        """Pictures of N nodes, resized and cropped, (N, 3, S, S) uint8, and an index into ``IMAGE_STATUS`` for each.

        Args:
            references: what ``images.locate`` gave of the nodes.
            rows: the nodes' rows in the node table; without them ``picture_file`` is not used.
            images: where they are read from; by default the references are paths, opened as they are.
        """
        numbers = repeat(None) if rows is None else map(int, rows)
        found = [
            self.cache.get(reference, partial(self._read, images, reference, row))
            for reference, row in zip(references, numbers, strict=rows is not None)
        ]
        pictures, image_status = zip(*found, strict=True)
        return torch.stack(pictures), list(image_status)

    def _read(self, images: ImageSource, reference: Hashable, row: int | None) -> tuple[torch.Tensor, int]:
        def decode() -> tuple[torch.Tensor, int]:
            return self.picture_of(*images.read(reference))

        if self.picture_file is None or row is None:
            return decode()
        return self.picture_file.read(row, images, reference, decode)

    def picture_of(self, data: bytes | None, status: int) -> tuple[torch.Tensor, int]:
        """What :meth:`ImageSource.read` gave, decoded and resized: (3, S, S) uint8, and its cause."""
        picture, status = decode_picture(data, status, self.truncated_images)
        self.decoded += data is not None or IMAGE_STATUS[status] == "unreadable"
        if not self.preprocessing.fits(picture):
            picture, status = black_image(), IMAGE_STATUS.index("too many pixels")
        return self.preprocessing.resize(picture), status
