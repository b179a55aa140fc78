"""The order of edges: a pure function of (seed, epoch), and the sampler that walks it in global batches."""

import hashlib
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

ROUNDS = 8


def permuted(positions: np.ndarray, length: int, seed: int, epoch: int) -> np.ndarray:
    """Where a keyed permutation of 0..length-1 sends each of ``positions``; O(1) memory and time a position.

    A balanced Feistel network (Luby and Rackoff, 1988) over the next power of four, walked until it lands inside the
    range (Black and Rogaway, 2002). The key is (seed, epoch), so the order never depends on who asks, when, or how
    often.

    Args:
        positions: int64 array of values in [0, length).

    Returns:
        int64 array of the same shape; over all positions, each value once.
    """
    half_bits = max(4, (max(length - 1, 1).bit_length() + 1) // 2)  # short halves would mix badly
    digest = hashlib.shake_256(f"mmgraph order {seed} {epoch}".encode()).digest(8 * ROUNDS)
    keys = np.frombuffer(digest, dtype="<u8")
    values = positions.astype(np.uint64)
    outside = np.ones(values.shape, dtype=bool)
    while outside.any():
        values[outside] = _feistel(values[outside], keys, half_bits)
        outside = values >= length
    return values.astype(np.int64)


def _feistel(values: np.ndarray, keys: np.ndarray, half_bits: int) -> np.ndarray:
    bits, mask = np.uint64(half_bits), np.uint64((1 << half_bits) - 1)
    left, right = values >> bits, values & mask
    for key in keys:
        left, right = right, left ^ (_mix(right ^ key) & mask)
    return left << bits | right


def _mix(values: np.ndarray) -> np.ndarray:
    """The finalizer of SplitMix64 (Steele, Lea and Flood, 2014); uint64 arithmetic wraps."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


class GlobalBatchSampler(Sampler[list[int]]):
    """Yields the global batches of one epoch: lists of ``batch_size`` edges, over all processes together.

    ``Accelerator.prepare`` gives each rank its slice of every batch; never slice here too. The incomplete last batch
    is dropped. Its whole state is the place to begin at, set by :meth:`begin`.

    Args:
        num_edges: edges of the graph.
        batch_size: edges of a global batch.
        seed: the run's.
    """

    def __init__(self, num_edges: int, batch_size: int, seed: int):
        self.num_edges, self.batch_size, self.seed = num_edges, batch_size, seed
        self.drop_last = True  # read by Accelerate
        self.begin(epoch=1)

    def begin(self, epoch: int, samples: int = 0) -> None:
        """Start the next iteration in ``epoch`` (from 1), after its first ``samples`` edges."""
        self.epoch, self.samples = epoch, samples

    def __len__(self) -> int:
        """Batches of a whole epoch."""
        return self.num_edges // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.epoch  # an iterator stays in its epoch, also while a loader prefetches
        for start in range(self.samples, len(self) * self.batch_size, self.batch_size):
            positions = np.arange(start, start + self.batch_size)
            yield permuted(positions, self.num_edges, self.seed, epoch).tolist()
