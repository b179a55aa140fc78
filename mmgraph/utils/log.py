"""The text log of a run: printed immediately and written to a file in batches, by the main process only.

``log()`` and ``flush_log()`` are module functions, as in the original trainer (the single-GPU research trainer that
mmgraph grew from), so that any module can log without a logger object. Outside a run there is no file: lines are
printed, and the last 1,000 are buffered until a run opens a file.

``logging.handlers.MemoryHandler`` does not work here. Its ``flush`` writes record by record, prints errors instead of
raising them, and then drops the lines. It does not undo a partial write, its buffer has no limit, and a forked child
keeps the buffered lines.
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
_lock = threading.RLock()  # trackers call log() from other threads


def log(*args: object, **kwargs: object) -> None:
    """Print a line immediately, and buffer it for the run's log file.

    Only the main process logs: on other ranks and in DataLoader workers, this function does nothing. A line that cannot
    be printed, because the terminal or pipe is closed, is still written to the file. The buffered lines are written
    when there are ``--log_buffer_size`` of them, on :func:`flush_log`, and at exit.

    Args:
        *args, **kwargs: as for :func:`print`; only ``sep`` and ``end`` are used.
    """
    if not is_main_process():
        return
    text = str(kwargs.get("sep", " ")).join(map(str, args)) + str(kwargs.get("end", "\n"))
    with suppress(OSError):
        tqdm.write(text, end="")  # print() would break a progress bar
    with _lock:
        _waiting.append(text)
        if _path is not None and len(_waiting) >= _size:
            with suppress(OSError):  # the lines stay buffered; a direct call of flush_log() reports the error
                flush_log()


def flush_log() -> None:
    """Write all buffered lines to the log file in one write. Without an open file they stay buffered.

    Raises:
        OSError: the lines cannot be written, for example on a full disk. They stay buffered; the file is unchanged.
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
                    file.truncate(size)  # remove a partial write: the next flush writes all lines again
                raise
        _waiting.clear()


@contextmanager
def log_file(path: str | Path, size: int = 10) -> Iterator[None]:
    """While the block runs, append the log to ``path``, ``size`` lines at a time. At the end, flush the log.

    If this last flush fails, the number of lost lines is printed to stderr, and no error is raised: the lines were
    already printed, and an error of the block must not be hidden.
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
            print(f"mmgraph: {path}: could not write the last {len(_waiting)} lines: {error.strerror}", file=sys.stderr)
        finally:
            _path, _waiting = None, deque(maxlen=1000)


def is_main_process() -> bool:
    """Whether this process is rank 0 (the launcher sets ``RANK``) and not a DataLoader worker."""
    return os.environ.get("RANK", "0") == "0" and get_worker_info() is None


def _reset_in_child() -> None:
    """Reset the log in a forked child.

    The parent writes the buffered lines, so the child drops them. The lock is replaced, because a thread of the parent
    may have held it at the fork.
    """
    global _lock
    _lock = threading.RLock()
    _waiting.clear()


atexit.register(flush_log)
os.register_at_fork(after_in_child=_reset_in_child)
