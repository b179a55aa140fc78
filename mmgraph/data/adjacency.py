"""Which nodes are linked: the distinct pairs of an edge table, looked up by node and by pair."""

from collections.abc import Iterator

import numpy as np
import torch

from mmgraph.data.edge_table import EdgeTable

EDGE_CHUNK = 1 << 20
PAIR_CHUNK = 1 << 21  # looked up together, 16 MB


class Adjacency:
    """The pairs of nodes with an edge, whatever its direction; 16 bytes of memory a distinct pair.

    Args:
        keys: (K,) int64, ascending, from :func:`pair_keys`.
        num_nodes: N.
    """

    def __init__(self, keys: torch.Tensor, num_nodes: int):
        self.keys, self.num_nodes = keys, num_nodes

    def to(self, device: torch.device) -> "Adjacency":
        return Adjacency(self.keys.to(device), self.num_nodes)

    def of(self, nodes: torch.Tensor, first: int = 0, stop: int | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """The neighbours of (Q,) nodes in rows ``first`` to ``stop``: whose each is, and its row; (T,) int64 both."""
        base = nodes * self.num_nodes  # (Q,)
        begin = torch.searchsorted(self.keys, base + first)
        count = torch.searchsorted(self.keys, base + (self.num_nodes if stop is None else stop)) - begin
        owners = torch.repeat_interleave(torch.arange(len(nodes), device=nodes.device), count)  # (T,)
        places = torch.arange(len(owners), device=nodes.device) + (begin - (count.cumsum(0) - count))[owners]
        return owners, self.keys[places] - base[owners]

    def count(self, pairs: torch.Tensor) -> int:
        """How many of (M, 2) pairs are linked."""
        return int(torch.isin(pairs[:, 0] * self.num_nodes + pairs[:, 1], self.keys).sum())

    def linked(self, left: torch.Tensor, right: torch.Tensor) -> torch.Tensor:
        """Whether there is an edge between each of (A,) and each of (B,) nodes: (A, B) bool."""
        found = torch.zeros(len(left), len(right), dtype=torch.bool, device=left.device)
        if not len(self.keys):
            return found
        for start in range(0, len(left), size := max(1, PAIR_CHUNK // max(1, len(right)))):
            pairs = left[start : start + size, None] * self.num_nodes + right  # (a, B)
            places = torch.searchsorted(self.keys, pairs).clamp_(max=len(self.keys) - 1)
            torch.eq(self.keys[places], pairs, out=found[start : start + size])
        return found


def pair_keys(rows: np.ndarray | EdgeTable, num_nodes: int) -> np.ndarray:
    """The distinct (node, neighbour) pairs of (E, 2) edges in both directions, as ascending node * N + neighbour."""
    found = [np.empty(0, np.int64)]
    for part in _parts(rows):
        source, destination = part.astype(np.int64).T
        found.append(np.unique(np.concatenate([source * num_nodes + destination, destination * num_nodes + source])))
    return np.unique(np.concatenate(found))


def _parts(rows: np.ndarray | EdgeTable) -> Iterator[np.ndarray]:
    for start in range(0, len(rows), EDGE_CHUNK):
        yield rows[np.arange(start, min(start + EDGE_CHUNK, len(rows)))]
