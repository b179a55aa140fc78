"""``metrics.jsonl``: one JSON object per optimizer step."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmgraph.utils.files import sync


class MetricsFile:
    """Appends rows; on disk at the latest after 10 rows or the row after 1 s, and at :meth:`sync`.

    Args:
        path: the file.
        keep: bytes of an existing file to go on from; what stands behind them is cut off.
    """

    def __init__(self, path: Path, keep: int = 0):
        self._file = path.open("ab")
        self._file.truncate(min(keep, path.stat().st_size))  # a file that lost rows must not be filled up with zeros
        self._path, self._waiting, self._written = path, 0, time.monotonic()

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write((json.dumps(dict(row)) + "\n").encode())
        self._waiting += 1
        if self._waiting >= 10 or time.monotonic() - self._written > 1:
            self._flush()

    def sync(self) -> int:
        """Put all rows on the disk. Returns the bytes of the file."""
        self._flush()
        sync(self._path)
        return self._path.stat().st_size

    def close(self) -> None:
        with suppress(OSError):  # of rows that no state counts on
            self._file.close()

    def _flush(self) -> None:
        self._file.flush()
        self._waiting, self._written = 0, time.monotonic()
