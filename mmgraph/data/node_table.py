"""A node table that stays on the disk: rows of a memory-mapped Arrow file."""

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

SCAN_CHUNK = 1024  # rows


class NodeTable(Dataset[dict[str, Any]]):
    """Nodes in the order of the table, read from the disk when they are asked for.

    ``table[i]`` is a dict of row i's columns without ``node_id``; a missing value is None. A pickled table is its path,
    opened anew; a forked one goes on with the map it has. The file must not be changed while it is open.

    Args:
        path: an Arrow IPC file or stream.

    Raises:
        ValueError: it is none (pyarrow's ArrowInvalid), or it is compressed.
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
            raise IndexError(f"row {row} of a table of {len(self)} nodes")
        row %= len(self)
        number = bisect_right(self._starts, row) - 1
        columns, place = self._batches[number], row - self._starts[number]
        values = {name: column[place].as_py() for name, column in columns.items()}
        self._release()
        return values

    def scan(self, rows: range, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
        """Some columns of consecutive rows; many times as fast as row by row."""
        table = self._table.select(list(columns))
        for start in range(rows.start, rows.stop, SCAN_CHUNK):
            yield from table.slice(start, min(SCAN_CHUNK, rows.stop - start)).to_pylist()
            self._release()

    @contextmanager
    def column(self, name: str) -> Iterator[pa.ChunkedArray]:
        """A whole column, to be scanned in a ``with`` block."""
        try:
            yield self._table[name]
        finally:
            self._release()

    def ids(self, rows: Iterable[int]) -> list[Any]:
        """The ``node_id`` of each row: text, or of the type that an Arrow file has."""
        with self.column("node_id") as column:  # one by one: take() may put all of its chunks together
            return [column[int(row)].as_py() for row in rows]

    def _release(self) -> None:
        """Let go of the pages that were read.

        The kernel maps 64 KiB around every place that is read, and counts them to this process until memory is short:
        in an epoch each process would come to hold the whole file. After this the pages stay in the page cache, which
        all processes share and which is free to be used otherwise; to read one again costs a page fault, not the disk.
        """
        self._map.madvise(mmap.MADV_DONTNEED)

    def _mapped(self, batch: pa.RecordBatch) -> pa.RecordBatch:
        """The batch, if all of it is read from the map itself: what was compressed is a copy in memory."""
        first, last = self._buffer.address, self._buffer.address + self._buffer.size
        for column in batch.columns:
            for buffer in column.buffers():
                if buffer is not None and buffer.size and not first <= buffer.address < last:
                    raise ValueError(f"{self.path} is compressed")
        return batch

    def __reduce__(self) -> tuple[type["NodeTable"], tuple[Path]]:
        return NodeTable, (self.path,)
