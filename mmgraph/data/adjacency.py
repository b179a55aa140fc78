"""Looks up the neighbors of nodes, and whether two nodes are linked."""

from collections.abc import Iterator

import numpy as np
import torch

from mmgraph.data.edge_table import EdgeTable, RemainingEdges

EDGE_CHUNK = 1 << 20  # edges read at a time
PAIR_CHUNK = 1 << 21  # pairs per look-up; their int64 keys take 16 MB


class Adjacency:
    """The pairs of nodes that are linked by an edge in either direction. A pair takes 16 bytes of memory.

    Args:
        keys: (K,) int64, ascending, from :func:`pair_keys`.
        num_nodes: number of nodes, N.
    """

    def __init__(self, keys: torch.Tensor, num_nodes: int):
        self.keys, self.num_nodes = keys, num_nodes

    def to(self, device: torch.device) -> "Adjacency":
        return Adjacency(self.keys.to(device), self.num_nodes)

    def neighbors_of(
        self, nodes: torch.Tensor, first: int = 0, stop: int | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the neighbors of some nodes.

        Args:
            nodes: (Q,) int64 node rows.
            first: lowest row of a neighbor to return.
            stop: return only neighbors in rows below this one. None: no limit.

        Returns:
            Two (T,) int64 tensors with one entry for each of the T neighbors: the index into ``nodes`` of the node that
            has this neighbor, and the neighbor's row.
        """
        base = nodes * self.num_nodes  # (Q,)
        begin = torch.searchsorted(self.keys, base + first)
        count = torch.searchsorted(self.keys, base + (self.num_nodes if stop is None else stop)) - begin
        owners = torch.repeat_interleave(torch.arange(len(nodes), device=nodes.device), count)  # (T,)
        indices = torch.arange(len(owners), device=nodes.device) + (begin - (count.cumsum(0) - count))[owners]
        return owners, self.keys[indices] - base[owners]

    def count(self, pairs: torch.Tensor) -> int:
        """Return how many of the M pairs are linked. ``pairs`` contains (M, 2) int64 node rows."""
        return int(torch.isin(pairs[:, 0] * self.num_nodes + pairs[:, 1], self.keys).sum())

    def linked(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Return whether each node of ``left`` is linked to each node of ``right``.

        Args:
            left: (A,) int64 node rows.
            right: (B,) int64 node rows.

        Returns:
            (A, B) bool.
        """
        result = torch.zeros(len(left), len(right), dtype=torch.bool, device=left.device)
        if not len(self.keys):
            return result
        for start in range(0, len(left), size := max(1, PAIR_CHUNK // max(1, len(right)))):
            pairs = left[start : start + size, None] * self.num_nodes + right  # (a, B)
            indices = torch.searchsorted(self.keys, pairs).clamp_(max=len(self.keys) - 1)
            torch.eq(self.keys[indices], pairs, out=result[start : start + size])
        return result


def pair_keys(rows: np.ndarray | EdgeTable | RemainingEdges, num_nodes: int) -> np.ndarray:
    """Return a key for each unique (node, neighbor) pair of the edges. Each edge gives a pair in both directions.

    Args:
        rows: (E, 2) node rows of source and destination.
        num_nodes: number of nodes, N.

    Returns:
        (K,) int64 keys, ascending. The key of a pair is node * N + neighbor.
    """
    keys = [np.empty(0, np.int64)]
    for part in _parts(rows):
        source, destination = part.astype(np.int64).T
        keys.append(np.unique(np.concatenate([source * num_nodes + destination, destination * num_nodes + source])))
    return np.unique(np.concatenate(keys))


def _parts(rows: np.ndarray | EdgeTable | RemainingEdges) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), EDGE_CHUNK):
        yield rows[np.arange(start, min(start + EDGE_CHUNK, len(rows)))]
