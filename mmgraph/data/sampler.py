"""The sampler of global batches. The order of the edges depends only on seed, epoch and number of edges."""

import hashlib
from collections.abc import Iterator

import numpy as np
from torch.utils.data import Sampler

ROUNDS = 8


def permuted(positions: np.ndarray, length: int, seed: int, epoch: int) -> np.ndarray:
    """Apply a keyed permutation of 0..length-1 to ``positions``, in O(1) memory and time per position.

    The permutation is a balanced Feistel network (Luby and Rackoff, 1988) over the next power of four. It is applied
    repeatedly until the value is less than ``length`` (Black and Rogaway, 2002). The key is (seed, epoch), so the order
    does not depend on the process, the time or the number of calls.

    Args:
        positions: int64 array of values in [0, length).
        length: number of values.
        seed, epoch: key of the permutation.

    Returns:
        int64 array of the shape of ``positions``. For all positions together, each value in [0, length) occurs once.
    """
    half_bits = max(4, (max(length - 1, 1).bit_length() + 1) // 2)  # at least 4: shorter halves would mix badly
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
    """Apply the finalizer of SplitMix64 (Steele, Lea and Flood, 2014). uint64 arithmetic wraps around."""
    values = (values ^ values >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ values >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return values ^ values >> np.uint64(31)


class GlobalBatchSampler(Sampler[list[int]]):
    """Yields the global batches of an epoch, each a list of ``batch_size`` edge numbers for all processes together.

    ``Accelerator.prepare`` slices every batch over the ranks, so this class must not slice. The incomplete last batch
    is dropped. The only state is the start of the next iteration, set by :meth:`begin`.

    Args:
        num_edges: number of edges of the graph.
        batch_size: number of edges in a global batch.
        seed: the run's seed.
    """

    def __init__(self, num_edges: int, batch_size: int, seed: int):
        self.num_edges, self.batch_size, self.seed = num_edges, batch_size, seed
        self.drop_last = True  # read by Accelerate
        self.begin(epoch=1)

    def begin(self, epoch: int, samples: int = 0) -> None:
        """Let the next iteration start in ``epoch`` (from 1), after the first ``samples`` edges of that epoch."""
        self.epoch, self.samples = epoch, samples

    def __len__(self) -> int:
        """Return the number of batches in a complete epoch."""
        return self.num_edges // self.batch_size

    def __iter__(self) -> Iterator[list[int]]:
        epoch = self.epoch  # read once: an iterator stays in its epoch, even while a loader prefetches
        for start in range(self.samples, len(self) * self.batch_size, self.batch_size):
            positions = np.arange(start, start + self.batch_size)
            yield permuted(positions, self.num_edges, self.seed, epoch).tolist()
