"""Converts nodes to tower inputs. All collators that return tower inputs use this module."""

import warnings
from collections.abc import Hashable, Iterable, Mapping, Sequence
from functools import partial
from itertools import repeat
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image

from mmgraph.data.given_images import Given, check_keys, given_image
from mmgraph.data.image_cache import ImageCache
from mmgraph.data.image_source import UNRESOLVED_FILES, ImageSource
from mmgraph.data.images import (
    FIRST_REMARK,
    IMAGE_STATUS,
    black_image,
    convert_picture,
    count_image_status,
    decode_picture,
    describe_image_status,
    image_remarks,
)
from mmgraph.data.input_rules import InputRules
from mmgraph.data.lru import ShardedLRU
from mmgraph.data.preprocessing import Preprocessing

TEXT_LENGTH = 77  # maximum number of tokens of CLIP's text tower


class NodeInputs:
    """Converts N node dicts to inputs of CLIP's towers.

    A call returns a dict with ``input_ids`` (N, 77) int64, ``attention_mask`` (N, 77) int64 and ``pixel_values``
    (N, 3, S, S) float32. See :func:`mmgraph.data.given_images.given_image` for the images that the nodes may have.
    Paths are opened without an image root. Images that are black, partial or spoiled cause a warning, one for each
    image status.

    Args:
        tokenizer: a Hugging Face tokenizer.
        processor: a Hugging Face CLIP processor or CLIP image processor.
        cache_size: number of decoded and resized images to cache in memory (uint8, 150 KB each at 224 pixels).
        rules: how columns become text and pixels.
        picture_file: cache on disk, indexed by node row; None: no cache on disk.

    Attributes:
        decoded: number of image files decoded in this process so far, including unreadable files.
    """

    def __init__(
        self,
        tokenizer: Any,
        processor: Any,
        cache_size: int,
        rules: InputRules | None = None,
        picture_file: ImageCache | None = None,
    ):
        self.tokenizer = tokenizer
        self.preprocessing = Preprocessing(processor)
        self.cache: ShardedLRU[tuple[torch.Tensor, int]] = ShardedLRU(cache_size)
        self.rules = rules or InputRules()
        self.picture_file = picture_file
        self.decoded = 0
        self._warned: set[int] = set()  # image statuses of earlier calls

    def __call__(self, nodes: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
        check_keys(nodes, self.rules)
        input_ids, attention_mask = self.tokenize([self.rules.text(node) for node in nodes], "max_length")
        given = [given_image(node) for node in nodes]
        pictures, image_status = zip(*map(self._read_given, given), strict=True)
        self._warn(given, image_status)
        return {
            "input_ids": input_ids,  # (N, 77)
            "attention_mask": attention_mask,  # (N, 77)
            "pixel_values": self.preprocessing.normalize(torch.stack(pictures)),  # (N, 3, S, S)
        }

    def _read_given(self, given: Given) -> tuple[torch.Tensor, int]:
        match given:
            case bytes():
                return self.decode_image_of(given, 0)
            case Image.Image():
                return self._resized(*convert_picture(given, self.rules))
            case path:
                return self.cache.get(path, partial(self._read, UNRESOLVED_FILES, path, None))

    def _warn(self, given: Sequence[Given], image_status: Sequence[int]) -> None:
        """Warn of images that are not as the caller expects, once for each image status.

        In DataLoader workers, ``log()`` is silent.
        """
        new = [
            (image, status)
            for image, status in zip(given, image_status, strict=True)
            if image is not None and status not in self._warned
        ]
        self._warned.update(status for _, status in new)
        counts = count_image_status([status for _, status in new])
        texts = [line.removeprefix("warning: ") for line in image_remarks(counts, self.rules)]
        if incomplete := describe_image_status(counts):
            first = next(image for image, status in new if 0 < status < FIRST_REMARK)
            name = f", such as {first}" if isinstance(first, str) else ""
            texts.append(f"images are black or partial in this batch of {len(given):,} nodes: {incomplete}{name}")
        for text in texts:
            warnings.warn(f"{text} (later batches do not warn of this)", stacklevel=4)

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
        picture, status = decode_picture(data, status, self.rules)
        self.decoded += data is not None or IMAGE_STATUS[status] == "unreadable"
        return self._resized(picture, status)

    def _resized(self, picture: torch.Tensor, status: int) -> tuple[torch.Tensor, int]:
        if not self.preprocessing.fits(picture):
            picture, status = black_image(), IMAGE_STATUS.index("too many pixels")
        return self.preprocessing.resize(picture), status
