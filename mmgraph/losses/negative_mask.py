"""Masks for false negatives: logits that are excluded from the denominators of the losses."""

from typing import NamedTuple

import numpy as np
import torch

from mmgraph.config import Config
from mmgraph.data.adjacency import Adjacency
from mmgraph.data.content_hashes import ContentHashes, without_file


class NegativeMask:
    """Masks entries in the logits of n queries over all N columns, one chunk of queries at a time.

    An entry is a false negative if its column's node has the same image as one of the query's own nodes, is one of
    these nodes, or is a neighbor of the query's node. The column of a query's positive is never masked.

    Args:
        own_images: image numbers of the queries' own nodes, (n,) each: of the query's node and, in the graph loss, of
            its positive's node. An empty tuple masks nothing by image.
        columns: (N,) image numbers of the columns' nodes.
        labels: (n,) column of each query's positive.
        linked: the adjacency, node rows of the queries (n,) and node rows of the columns (N,); None masks no neighbors.
        absent: (N,) bool, columns to mask for all queries.

    Attributes:
        count: false negatives in the chunks computed so far, before ``absent`` is applied; a scalar tensor.
        queries: number of queries in these chunks.
    """

    def __init__(
        self,
        own_images: tuple[torch.Tensor, ...],
        columns: torch.Tensor,
        labels: torch.Tensor,
        linked: tuple[Adjacency, torch.Tensor, torch.Tensor] | None = None,
        absent: torch.Tensor | None = None,
    ):
        self.own_images, self.columns, self.labels, self.linked, self.absent = (
            own_images,
            columns,
            labels,
            linked,
            absent,
        )
        self.count, self.queries = torch.zeros((), device=columns.device), 0

    def chunk(self, start: int, stop: int) -> torch.Tensor:
        """Return the mask of queries ``start`` to ``stop``, (s, N) bool, and count its false negatives."""
        labels = self.labels[start:stop, None]
        mask = torch.zeros(len(labels), len(self.columns), dtype=torch.bool, device=labels.device)  # (s, N)
        for images in self.own_images:
            mask |= images[start:stop, None] == self.columns
        if self.linked is not None:
            neighbors, queries, columns = self.linked
            mask |= neighbors.linked(queries[start:stop], columns)
        mask.scatter_(1, labels, False)
        self.count += mask.sum()
        self.queries += len(labels)
        return mask if self.absent is None else mask.logical_or_(self.absent).scatter_(1, labels, False)


class FalseNegatives(NamedTuple):
    """The masking rules of a run, with the data of its N nodes that they need, on the device."""

    image_numbers: torch.Tensor  # (N,) int64, as image_numbers() returns them
    mask_same: bool  # mask the query's own nodes, and nodes with the same image as one of them
    neighbors: Adjacency | None  # mask these neighbors in the graph loss
    missing_images: bool  # exclude nodes without an image from the text-image loss

    def graph_masks(
        self, local: torch.Tensor, all_ranks: torch.Tensor, labels: torch.Tensor
    ) -> tuple[NegativeMask, NegativeMask] | None:
        """Return the masks of anchors over all positives and of positives over all anchors; None without masking.

        Args:
            local: (2, b) node rows of this rank's anchors and positives.
            all_ranks: (2, B) node rows of all ranks' anchors and positives.
            labels: (b,) indices of this rank's edges in the global batch.
        """
        if not self.mask_same:
            return None
        masks = []
        for query, other in ((0, 1), (1, 0)):
            linked = None if self.neighbors is None else (self.neighbors, local[query], all_ranks[other])
            masks.append(
                NegativeMask(tuple(self.image_numbers[local]), self.image_numbers[all_ranks[other]], labels, linked)
            )
        return masks[0], masks[1]

    def text_image_mask(
        self, local: torch.Tensor, all_ranks: torch.Tensor, labels: torch.Tensor, absent: torch.Tensor | None
    ) -> NegativeMask:
        """Return the mask of texts over all images. It is also the mask of images over all texts.

        Args:
            local: (2b,) node rows of this rank's nodes.
            all_ranks: (2B,) node rows of all ranks' nodes.
            labels: (2b,) indices of this rank's nodes among all nodes.
            absent: (2B,) bool, nodes to mask.
        """
        own_images = (self.image_numbers[local],) if self.mask_same else ()
        return NegativeMask(own_images, self.image_numbers[all_ranks], labels, absent=absent)


def image_numbers(content_hashes: ContentHashes) -> torch.Tensor:
    """Return an image number for each node, (N,) int64: equal if the image files have the same bytes.

    A node without an image file gets a unique number.
    """
    _, numbers = np.unique(content_hashes.images, return_inverse=True)
    unique = len(numbers) + np.arange(len(numbers))
    return torch.from_numpy(np.where(without_file(content_hashes.images), unique, numbers).astype(np.int64))


def build_false_negatives(
    config: Config,
    num_nodes: int,
    content_hashes: ContentHashes | None,
    neighbors: Adjacency | None,
    device: torch.device,
) -> FalseNegatives | None:
    """Return the masking rules of a run; None if it masks nothing, as in the original trainer.

    Args:
        config: the run's settings.
        num_nodes: N.
        content_hashes: hashes of the nodes' images; needed unless ``false_negatives`` is ``keep``.
        neighbors: adjacency of the training edges; needed if ``false_negatives`` is ``mask_neighbors``.
        device: device for the tensors.
    """
    mask_same = config.false_negatives != "keep" and content_hashes is not None
    missing_images = config.missing_image == "mask"
    if not (mask_same or missing_images):
        return None
    numbers = (
        image_numbers(content_hashes)
        if mask_same and content_hashes is not None
        else torch.zeros(num_nodes, dtype=torch.int64)
    )
    linked = neighbors.to(device) if config.false_negatives == "mask_neighbors" and neighbors is not None else None
    return FalseNegatives(numbers.to(device), mask_same, linked, missing_images)
