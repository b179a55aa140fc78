"""What is known of each edge (its ends as rows of the node table, its relation), in memory-mapped .npy files."""

import math
import mmap
from pathlib import Path
from typing import BinaryIO

import numpy as np

AT_ONCE = 64


class EdgeTable:
    """An integer or a row of them for each of E edges; ``table[numbers]``, with int64 numbers (b,), is (b, ...) int64.

    Of ends, (E, 2), a row is that of the source and that of the destination; of relations, (E,), it is their places
    among the names. A pickled table is its path, opened anew; a forked one goes on with the map it has.

    Args:
        path: a .npy file of (E, ...) integers.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()
        with self.path.open("rb") as file:
            np.lib.format.read_magic(file)
            shape, _, kind = np.lib.format.read_array_header_1_0(file)
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
            self._rows = np.frombuffer(self._map, kind, math.prod(shape), file.tell()).reshape(shape)

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        rows = np.empty((len(numbers), *self._rows.shape[1:]), dtype=np.int64)
        for start in range(0, len(numbers), AT_ONCE):
            part = slice(start, start + AT_ONCE)
            rows[part] = self._rows[numbers[part]]
            self._map.madvise(mmap.MADV_DONTNEED)  # as NodeTable._release; each of these may have mapped 64 KiB
        return rows

    def __reduce__(self) -> tuple[type["EdgeTable"], tuple[Path]]:
        return EdgeTable, (self.path,)


class RemainingEdges:
    """The entries of an :class:`EdgeTable` without those of some edges; indexed as one, by their place among the rest.

    Args:
        left_out: (M,) int64 numbers of edges, ascending; 8 bytes of memory each.
    """

    def __init__(self, table: EdgeTable, left_out: np.ndarray):
        self.table, self._before = table, left_out - np.arange(len(left_out))  # how many of the rest precede each

    def __len__(self) -> int:
        return len(self.table) - len(self._before)

    def __getitem__(self, numbers: np.ndarray) -> np.ndarray:
        return self.table[numbers + np.searchsorted(self._before, numbers, side="right")]


class EdgeWriter:
    """Writes (E, 2) rows to a .npy file in parts, when E is not known yet.

    Args:
        file: empty, and to be read and written.
        num_nodes: rows are below this; int32 if that can hold them, else int64.
    """

    def __init__(self, file: BinaryIO, num_nodes: int):
        self.file, self.kind, self.count = file, np.dtype(np.int32 if num_nodes <= 2**31 else np.int64), 0
        self._write_header()

    def write(self, rows: np.ndarray) -> None:
        self.file.write(np.ascontiguousarray(rows, self.kind).data)
        self.count += len(rows)

    def finish(self) -> None:
        self.file.seek(0)
        self._write_header()  # NumPy's has room for a count of any size, so it is as long as the first one
        self.file.seek(0, 2)

    def _write_header(self) -> None:
        header = {"descr": self.kind.str, "fortran_order": False, "shape": (self.count, 2)}
        np.lib.format.write_array_header_1_0(self.file, header)
