"""The run's text log: printed at once, written to the file in batches, by the main process alone.

``log()`` and ``flush_log()`` are module functions, as in the original, so that any module can log without being
handed a logger. Outside a run there is no file: lines are printed, and the last thousand wait for a run to open one.

``logging.handlers.MemoryHandler`` is no base for this: its ``flush`` writes record by record, prints a failure instead
of raising it and then drops the lines; it undoes no half-written line, has no bound and keeps its lines in a fork.
"""

import atexit
import os
import sys
import threading
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch.utils.data import get_worker_info
from tqdm import tqdm

_waiting: deque[str] = deque(maxlen=1000)
_path: Path | None = None
_size = 10
_lock = threading.RLock()  # trackers log from threads of their own


def log(*args: object, **kwargs: object) -> None:
    """Print a line now and append it to the run's log file later.

    Args:
        *args, **kwargs: as for :func:`print`; ``sep`` and ``end`` are honoured.

    Silent in processes whose ``RANK`` is not 0 and in DataLoader workers. What cannot be printed, to a terminal or a
    pipe that is gone, is in the file still. That is written when ``log_buffer_size`` lines wait, on :func:`flush_log`,
    and at exit.
    """
    if not is_main_process():
        return
    text = str(kwargs.get("sep", " ")).join(map(str, args)) + str(kwargs.get("end", "\n"))
    with suppress(OSError):
        tqdm.write(text, end="")  # a plain print would tear a progress bar
    with _lock:
        _waiting.append(text)
        if _path is not None and len(_waiting) >= _size:
            with suppress(OSError):  # the lines wait, and the next flush_log() tells
                flush_log()


def flush_log() -> None:
    """Write all waiting lines to the log file, in one write. Without an open file the lines go on waiting.

    Raises:
        OSError: they cannot be written, as on a full disk. They go on waiting, and the file is as it was.
    """
    with _lock:
        if _path is None or not _waiting:
            return
        with _path.open("ab", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            lines = memoryview("".join(_waiting).encode())
            try:
                while lines:
                    lines = lines[file.write(lines) :]
            except OSError:
                with suppress(OSError):
                    file.truncate(size)  # no part of a line, which would be written twice
                raise
        _waiting.clear()


@contextmanager
def log_file(path: str | Path, size: int = 10) -> Iterator[None]:
    """Write the log to ``path`` (appended) while the block runs, ``size`` lines at a time; flushed however it ends.

    Lines that cannot be written at the end are told on stderr: they were printed, and what ended the block counts more.
    """
    global _path, _size, _waiting
    _path, _size = Path(path), size
    _waiting = deque(_waiting)
    try:
        yield
    finally:
        try:
            flush_log()
        except OSError as error:
            print(f"mmgraph: {path} lacks its last {len(_waiting)} lines: {error.strerror}", file=sys.stderr)
        finally:
            _path, _waiting = None, deque(maxlen=1000)


def is_main_process() -> bool:
    """True in the process that may write: rank 0 (by the launcher's ``RANK``) and no DataLoader worker."""
    return os.environ.get("RANK", "0") == "0" and get_worker_info() is None


def _drop() -> None:
    """In a child: the parent writes the lines that wait, and whoever had the lock is no thread of the child's."""
    global _lock
    _lock = threading.RLock()
    _waiting.clear()


atexit.register(flush_log)
os.register_at_fork(after_in_child=_drop)
