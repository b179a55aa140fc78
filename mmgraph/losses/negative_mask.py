"""Masks that exclude the logits of false negatives from the denominators of the losses."""

from typing import NamedTuple

import numpy as np
import torch

from mmgraph.config import Config
from mmgraph.data.adjacency import Adjacency
from mmgraph.data.content_hashes import ContentHashes, without_file


class NegativeMask:
    """Computes which logits to mask for n queries over N columns, one chunk of queries at a time.

    The own nodes of a query are its node and, in the graph loss, also the node of its positive. A logit is a false
    negative if the node of its column is an own node, has the same image as an own node, or is a neighbor of the
    query's node. The column of a query's positive is never masked.

    Args:
        own_images: image numbers of the queries' own nodes: (n,) for the queries' nodes and, in the graph loss, (n,)
            for their positives' nodes. An empty tuple masks neither own nodes nor equal images.
        columns: (N,) image numbers of the columns' nodes.
        labels: (n,) column of each query's positive.
        linked: the adjacency, the queries' node rows (n,) and the columns' node rows (N,). None masks no neighbors.
        absent: (N,) bool, columns to mask for all queries. None masks no column.

    Attributes:
        count: scalar tensor, the number of false negatives in the chunks computed so far. Logits that only ``absent``
            masks are not counted.
        queries: number of queries in these chunks.
        log_candidates: scalar tensor, the sum of ln(candidates that are not false negatives) over these queries, with
            the positive. Columns that only ``absent`` masks count as candidates.
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
        self.log_candidates = torch.zeros((), device=columns.device)

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
        masked = mask.sum(1)  # (s,)
        self.count += masked.sum()
        self.log_candidates += (len(self.columns) - masked).log().sum()
        self.queries += len(labels)
        return mask if self.absent is None else mask.logical_or_(self.absent).scatter_(1, labels, False)


class FalseNegatives(NamedTuple):
    """The masking rules of a run, with the data that they need about the graph's N nodes. The data is on the device."""

    image_numbers: torch.Tensor  # (N,) int64, from image_numbers()
    mask_same: bool  # mask the query's own nodes, and nodes with the same image as an own node
    neighbors: Adjacency | None  # graph loss: mask each query's neighbors in this adjacency; None masks no neighbors
    missing_images: bool  # exclude nodes without an image from the text-image loss

    def graph_masks(
        self, local: torch.Tensor, all_ranks: torch.Tensor, labels: torch.Tensor
    ) -> tuple[NegativeMask, NegativeMask] | None:
        """Return two masks: of this rank's anchors over all positives, and of its positives over all anchors.

        Return None if the graph loss masks nothing.

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
            labels: (2b,) indices of this rank's nodes among those of all ranks.
            absent: (2B,) bool, True for nodes to mask. None masks no node.
        """
        own_images = (self.image_numbers[local],) if self.mask_same else ()
        return NegativeMask(own_images, self.image_numbers[all_ranks], labels, absent=absent)


def image_numbers(content_hashes: ContentHashes) -> torch.Tensor:
    """Return an image number for each node, (N,) int64.

    Two nodes have the same number if and only if their image files have the same bytes. A node without an image file
    has a unique number.
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
        num_nodes: number of nodes in the graph.
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
