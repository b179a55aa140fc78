"""Edges in memory-mapped .npy files: the node rows of their ends, and their relations."""

import math
import mmap
from pathlib import Path
from typing import BinaryIO

import numpy as np

INDEX_CHUNK = 64  # table entries read at a time


class EdgeTable:
    """Read-only table with one integer, or one row of integers, for each of E edges.

    A table of ends is (E, 2): the node rows of source and destination. A table of relations is (E,): indices into the
    names of the relations. ``table[numbers]``, with (b,) int64 edge numbers, returns (b, ...) int64.

    A pickled table contains only the path, and unpickling opens the file again. A forked process uses the memory map of
    its parent.

    Args:
        path: a .npy file of (E, ...) integers.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()
        with self.path.open("rb") as file:
            np.lib.format.read_magic(file)
            shape, _, dtype = np.lib.format.read_array_header_1_0(file)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._rows = np.frombuffer(self._map, dtype, math.prod(shape), file.tell()).reshape(shape)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        rows = np.empty((len(numbers), *self._rows.shape[1:]), dtype=np.int64)
        for start in range(0, len(numbers), INDEX_CHUNK):
            part = slice(start, start + INDEX_CHUNK)
            rows[part] = self._rows[numbers[part]]
            # Unmap the pages that were read, as NodeTable._release does. Chunks are small because each entry that is
            # read may map 64 KiB.
            self._map.madvise(mmap.MADV_DONTNEED)
        return rows

    def __reduce__(self) -> tuple[type["EdgeTable"], tuple[Path]]:
        return EdgeTable, (self.path,)


class RemainingEdges:
    """An :class:`EdgeTable` without some excluded edges. The remaining edges get consecutive numbers from 0.

    ``remaining[numbers]`` works as in :class:`EdgeTable`, with these new numbers.

    Args:
        table: the entries of all edges.
        excluded: (M,) int64, ascending numbers of the excluded edges. Each takes 8 bytes of memory.
    """

    def __init__(self, table: EdgeTable, excluded: np.ndarray):
        # _before: number of remaining edges before each excluded edge
        self.table, self._before = table, excluded - np.arange(len(excluded))

    def __len__(self) -> int:
        return len(self.table) - len(self._before)

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        return self.table[numbers + np.searchsorted(self._before, numbers, side="right")]


class EdgeWriter:
    """Writes (E, 2) rows to a .npy file in parts, without knowing E in advance.

    Args:
        file: an empty file, open for reading and writing.
        num_nodes: number of nodes. If int32 can hold all node rows, the file's dtype is int32, else int64.
    """

    def __init__(self, file: BinaryIO, num_nodes: int):
        self.file, self.dtype, self.count = file, np.dtype(np.int32 if num_nodes <= 2**31 else np.int64), 0
        self._write_header()

    def write(self, rows: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(rows, self.dtype).data)
        self.count += len(rows)

    def finish(self) -> None:
        """Write the final number of edges to the header."""
        self.file.seek(0)
        self._write_header()  # has the length of the first header, because NumPy reserves space for any count
        self.file.seek(0, 2)

    def _write_header(self) -> None:
        header = {"descr": self.dtype.str, "fortran_order": False, "shape": (self.count, 2)}
        np.lib.format.write_array_header_1_0(self.file, header)
