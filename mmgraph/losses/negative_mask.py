"""Negatives that are none: entries of the losses' squares of logits that leave the denominators."""

from typing import NamedTuple

import numpy as np
import torch

from mmgraph.config import Config
from mmgraph.data.adjacency import Adjacency
from mmgraph.data.content_hashes import ContentHashes, without_file


class NegativeMask:
    """Which entries of some queries' logits over all columns are left out, known part by part.

    A false negative is an entry whose column's node has the image of one of the query's own nodes (as these nodes
    themselves have), or is a neighbour of the query's. A query's own column never is one.

    Args:
        own: (n,) each, pictures of the queries' own nodes: its, and the one it is to find; none keeps false negatives.
        columns: (N,) pictures of the columns' nodes.
        labels: (n,) the queries' own columns.
        linked: tells of neighbours: with rows of the queries (n,) and of the columns (N,).
        absent: (N,) bool, columns that are left out for all queries.

    Attributes:
        count: false negatives in the parts so far; a scalar.
        queries: in these parts.
    """

    def __init__(
        self,
        own: tuple[torch.Tensor, ...],
        columns: torch.Tensor,
        labels: torch.Tensor,
        linked: tuple[Adjacency, torch.Tensor, torch.Tensor] | None = None,
        absent: torch.Tensor | None = None,
    ):
        self.own, self.columns, self.labels, self.linked, self.absent = own, columns, labels, linked, absent
        self.count, self.queries = torch.zeros((), device=columns.device), 0

    def part(self, start: int, stop: int) -> torch.Tensor:
        """Of the queries ``start`` to ``stop``: (s, N) bool, true at entries that are left out."""
        labels = self.labels[start:stop, None]
        out = torch.zeros(len(labels), len(self.columns), dtype=torch.bool, device=labels.device)  # (s, N)
        for pictures in self.own:
            out |= pictures[start:stop, None] == self.columns
        if self.linked is not None:
            neighbors, queries, columns = self.linked
            out |= neighbors.linked(queries[start:stop], columns)
        out.scatter_(1, labels, False)
        self.count += out.sum()
        self.queries += len(labels)
        return out if self.absent is None else out.logical_or_(self.absent).scatter_(1, labels, False)


class FalseNegatives(NamedTuple):
    """What is known about a run's N nodes, on the device, and what is to be left out for it."""

    pictures: torch.Tensor  # (N,) int64, from image_numbers
    same: bool  # leave out the queries' own nodes, and nodes of the same image
    neighbors: Adjacency | None  # leave these out of the graph loss
    missing_images: bool  # leave nodes without an image out of the text-image loss

    def graph_masks(
        self, own: torch.Tensor, every: torch.Tensor, labels: torch.Tensor
    ) -> tuple[NegativeMask, NegativeMask] | None:
        """For anchors over all positives, and for positives over all anchors; None where nothing is left out.

        Args:
            own: (2, b) node rows of this rank's anchors and positives.
            every: (2, B) those of all ranks.
            labels: (b,) where the own ones stand among all.
        """
        if not self.same:
            return None
        masks = []
        for query, other in ((0, 1), (1, 0)):
            linked = None if self.neighbors is None else (self.neighbors, own[query], every[other])
            masks.append(NegativeMask(tuple(self.pictures[own]), self.pictures[every[other]], labels, linked))
        return masks[0], masks[1]

    def text_image_mask(
        self, own: torch.Tensor, every: torch.Tensor, labels: torch.Tensor, absent: torch.Tensor | None
    ) -> NegativeMask:
        """For texts over all images, and for images over all texts: it is the same.

        Args:
            own, every, labels: (2b,), (2B,) and (2b,), of nodes.
            absent: (2B,) bool, nodes that are left out.
        """
        pictures = (self.pictures[own],) if self.same else ()
        return NegativeMask(pictures, self.pictures[every], labels, absent=absent)


def image_numbers(content_hashes: ContentHashes) -> torch.Tensor:
    """Numbers that are equal for nodes whose image files are: (N,) int64. A node without a file has one of its own."""
    _, numbers = np.unique(content_hashes.images, return_inverse=True)
    own = len(numbers) + np.arange(len(numbers))
    return torch.from_numpy(np.where(without_file(content_hashes.images), own, numbers).astype(np.int64))


def build_false_negatives(
    config: Config,
    num_nodes: int,
    content_hashes: ContentHashes | None,
    neighbors: Adjacency | None,
    device: torch.device,
) -> FalseNegatives | None:
    """What a run leaves out of its losses; None where that is nothing, as in the original.

    Args:
        contents: of the nodes, where the run masks false negatives.
        neighbors: of the edges that are trained on, where it masks neighbours.
    """
    same = config.false_negatives != "keep" and content_hashes is not None
    missing_images = config.missing_image == "mask"
    if not (same or missing_images):
        return None
    pictures = (
        image_numbers(content_hashes)
        if same and content_hashes is not None
        else torch.zeros(num_nodes, dtype=torch.int64)
    )
    linked = neighbors.to(device) if config.false_negatives == "mask_neighbors" and neighbors is not None else None
    return FalseNegatives(pictures.to(device), same, linked, missing_images)
