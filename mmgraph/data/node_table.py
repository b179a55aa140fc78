"""A node table in a memory-mapped Arrow file."""

import mmap
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path
from typing import Any

import pyarrow as pa
from torch.utils.data import Dataset

from mmgraph.data.readers import arrow_batches

SCAN_CHUNK = 1024  # rows read at a time


class NodeTable(Dataset[dict[str, Any]]):
    """Dataset of nodes in the order of the table. Each row is read from the file when it is accessed.

    ``table[i]`` is a dict of row i's columns without ``node_id``; a missing value is None. A pickled table contains
    only the path, and unpickling opens the file again. A forked process uses the memory map of its parent. The file
    must not change while it is open.

    Args:
        path: an Arrow IPC file or stream.

    Raises:
        ValueError: the file is not an Arrow file or stream (pyarrow's ArrowInvalid), or it is compressed.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path).absolute()
        with self.path.open("rb") as file:
            self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        self._buffer = pa.py_buffer(self._map)
        batches = [self._mapped(batch) for batch in arrow_batches(self._buffer)]
        self._length = sum(batch.num_rows for batch in batches)
        self._table = pa.Table.from_batches(batches)
        self._starts = list(accumulate((batch.num_rows for batch in batches[:-1]), initial=0))
        self._batches = [
            {name: batch.column(name) for name in batch.schema.names if name != "node_id"} for batch in batches
        ]
        self._release()

    @property
    def schema(self) -> pa.Schema:
        return self._table.schema

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} is out of range for a table of {len(self)} nodes")
        row %= len(self)
        number = bisect_right(self._starts, row) - 1
        columns, index = self._batches[number], row - self._starts[number]
        values = {name: column[index].as_py() for name, column in columns.items()}
        self._release()
        return values

    def scan(self, rows: range, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Yield some columns of consecutive rows as dicts. Many times faster than indexing row by row."""
        table = self._table.select(list(columns))
        for start in range(rows.start, rows.stop, SCAN_CHUNK):
            yield from table.slice(start, min(SCAN_CHUNK, rows.stop - start)).to_pylist()
            self._release()

    @contextmanager
    def column(self, name: str) -> Iterator[pa.ChunkedArray]:
        """Yield a complete column, to be used only inside the ``with`` block."""
        try:
            yield self._table[name]
        finally:
            self._release()

    def ids(self, rows: Iterable[int]) -> list[Any]:
        """Return the ``node_id`` of each row: text, or integers if the Arrow file stores integers."""
        with self.column("node_id") as column:  # not take(), which may copy all chunks into one
            return [column[int(row)].as_py() for row in rows]

    def _release(self) -> None:
        """Unmap the pages that were read.

        The kernel maps 64 KiB around every address that is read, and counts them as memory of this process until
        memory is short. Without this method, the memory of each process would grow over an epoch by the size of the
        file. Unmapped pages stay in the page cache, which all processes share and which the kernel can reclaim. While
        a page is in the page cache, reading it again costs a page fault, not a disk read.
        """
        self._map.madvise(mmap.MADV_DONTNEED)

    def _mapped(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """Return the batch if all of its data is in the memory map.

        Raises:
            ValueError: the batch is compressed, so pyarrow has decompressed it to a copy in memory.
        """
        first, last = self._buffer.address, self._buffer.address + self._buffer.size
        for column in batch.columns:
            for buffer in column.buffers():
                if buffer is not None and buffer.size and not first <= buffer.address < last:
                    raise ValueError(
                        f"{self.path}: is compressed, so it cannot be memory-mapped; write it uncompressed"
                    )
        return batch

    def __reduce__(self) -> tuple[type["NodeTable"], tuple[Path]]:
        return NodeTable, (self.path,)
