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

    Rows are buffered. The buffer is written to the file when it has 10 rows, when a row is added more than 1 s after
    the last write, and by :meth:`sync` and :meth:`close`.

    Args:
        path: the file. It is created if it does not exist.
        keep: number of bytes to keep at the start of an existing file. The rest is removed.
    """

    def __init__(self, path: Path, keep: int = 0):
        self._file = path.open("ab")
        self._file.truncate(min(keep, path.stat().st_size))  # min(), because truncate() fills a shorter file with zeros
        self._path, self._buffered, self._last_write = path, 0, time.monotonic()

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row."""
        self._file.write((json.dumps(dict(row)) + "\n").encode())
        self._buffered += 1
        if self._buffered >= 10 or time.monotonic() - self._last_write > 1:
            self._flush()

    def sync(self) -> int:
        """Write all buffered rows and sync the file to disk. Return the file's size in bytes."""
        self._flush()
        sync(self._path)
        return self._path.stat().st_size

    def close(self) -> None:
        """Write all buffered rows and close the file. Ignore errors of the operating system."""
        with suppress(OSError):  # no resume state covers the lost rows, so a resumed run repeats their steps
            self._file.close()

    def _flush(self) -> None:
        self._file.flush()
        self._buffered, self._last_write = 0, time.monotonic()
