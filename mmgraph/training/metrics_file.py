"""The file ``metrics.jsonl``: one JSON object per optimizer step."""

import json
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from mmgraph.utils.files import sync


class MetricsFile:
    """Appends rows to ``metrics.jsonl``.

    Rows are buffered. They are written to the file when 10 rows are buffered, when a row is added more than 1 s after
    the last write, and by :meth:`sync`.

    Args:
        path: the file. It is created if it does not exist.
        keep: number of bytes to keep of an existing file. The rest is cut off.
    """

    def __init__(self, path: Path, keep: int = 0):
        self._file = path.open("ab")
        self._file.truncate(min(keep, path.stat().st_size))  # min: truncate() would fill a shorter file with zeros
        self._path, self._buffered, self._last_write = path, 0, time.monotonic()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        self._file.write((json.dumps(dict(row)) + "\n").encode())
        self._buffered += 1
        if self._buffered >= 10 or time.monotonic() - self._last_write > 1:
            self._flush()

    def sync(self) -> int:
        """Write all rows and sync the file to disk. Return its size in bytes."""
        self._flush()
        sync(self._path)
        return self._path.stat().st_size

    def close(self) -> None:
        """Write all rows and close the file. Ignore errors."""
        with suppress(OSError):  # no state includes the lost rows, so a resumed run writes them again
            self._file.close()

    def _flush(self) -> None:
        self._file.flush()
        self._buffered, self._last_write = 0, time.monotonic()
