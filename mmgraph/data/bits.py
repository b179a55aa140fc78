"""One bit for each row of a table, in memory-saving arrays: eight rows to a byte, the first row in the highest bit."""

from collections.abc import Iterator

import numpy as np

CHUNK = 1 << 23  # rows that are unpacked at a time; a multiple of 8


class BitWriter:
    """Packs (n,) bool arrays, one after another, to one array of bits."""

    def __init__(self) -> None:
        self._packed: list[np.ndarray] = []
        self._rest = np.empty(0, bool)

    def add(self, values: np.ndarray) -> None:
        values = np.concatenate([self._rest, values])
        whole = len(values) - len(values) % 8
        self._packed.append(np.packbits(values[:whole]))
        self._rest = values[whole:]

    def finish(self) -> np.ndarray:
        """Return the bits, uint8; the last byte is filled with zeros."""
        return np.concatenate([*self._packed, np.packbits(self._rest)])


def unpacked(bits: np.ndarray | None, count: int) -> Iterator[np.ndarray]:
    """Yield ``count`` bits as (n,) bool arrays with up to :data:`CHUNK` values.

    Args:
        bits: result of :meth:`BitWriter.finish`; None: all bits are 1.
        count: number of rows.
    """
    for start in range(0, count, CHUNK):
        rows = min(CHUNK, count - start)
        if bits is None:
            yield np.ones(rows, bool)
        else:
            yield np.unpackbits(bits[start // 8 : (start + rows + 7) // 8], count=rows).astype(bool)
