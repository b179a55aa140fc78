"""Nodes to tower inputs: the text rule, the image rule, and the cache. Every collator is this and an order of nodes."""

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch

from mmgraph.data.image_cache import PictureFile
from mmgraph.data.images import CAUSES, black_image, decode_picture, read_file
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
        pictures, _ = self.pictures([node.get("image_path") for node in nodes])
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
        self, image_paths: Sequence[Any], rows: Sequence[int] | np.ndarray | None = None
    ) -> tuple[torch.Tensor, list[int]]:
        """Pictures of N nodes, resized and cropped, (N, 3, S, S) uint8, and an index into ``CAUSES`` for each.

        Args:
            rows: the nodes' rows in the node table; without them ``picture_file`` is not used.
        """
        numbers = [None] * len(image_paths) if rows is None else [int(row) for row in rows]
        pictures, causes = zip(*map(self._picture, image_paths, numbers), strict=True)
        return torch.stack(pictures), list(causes)

    def _picture(self, image_path: Any, row: int | None) -> tuple[torch.Tensor, int]:
        given = isinstance(image_path, str) and bool(image_path.strip())
        path = image_path.replace("\\", "/") if given else None
        return self.cache.get(path, lambda: self._read(path, row))

    def _read(self, path: str | None, row: int | None) -> tuple[torch.Tensor, int]:
        if self.picture_file is None or row is None:
            return self.picture_of(*read_file(path))
        return self.picture_file.read(row, path, lambda: self.picture_of(*read_file(path)))

    def picture_of(self, data: bytes | None, cause: int) -> tuple[torch.Tensor, int]:
        """What :func:`mmgraph.data.images.read_file` gave, decoded and resized: (3, S, S) uint8, and its cause."""
        picture, cause = decode_picture(data, cause, self.truncated_images)
        self.decoded += data is not None or CAUSES[cause] == "unreadable"
        if not self.preprocessing.fits(picture):
            picture, cause = black_image(), CAUSES.index("too many pixels")
        return self.preprocessing.resize(picture), cause
