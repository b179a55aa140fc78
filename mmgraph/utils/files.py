"""Atomic, durable writes, file locks and cache folders."""

import errno
import fcntl
import hashlib
import os
import stat
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import numpy as np

from mmgraph.errors import RunError
from mmgraph.utils.log import log

POLL_SECONDS = 0.2


def write_durably(path: Path, write: Callable[[Path], object], shared: bool = False) -> None:
    """Write ``path`` atomically: fill a temporary file beside it, sync it to disk, and rename it to ``path``.

    Args:
        path: file to write.
        write: called with the path of the temporary file, which it fills.
        shared: other processes may write ``path`` at the same time; the last rename wins.

    Raises:
        OSError: the file cannot be written, or ``path`` is a folder or a device.
    """
    if path.exists() and not path.is_file():  # such as /dev/null, which the rename would replace
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex if shared else ''}.tmp")
    try:
        write(temporary)
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file durably. Other processes may write the same file at the same time."""

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            try:
                np.save(file, array)
            except OSError as error:
                if error.errno is not None:
                    raise
                # NumPy sees only that fewer items were written, so its error has no errno.
                raise OSError(errno.EIO, "NumPy could not write all data (is the disk full?)", str(path)) from error

    write_durably(path, save, shared=True)


def create_once(path: Path, make: Callable[[BinaryIO], object]) -> None:
    """Create ``path``, or wait until another process has created it.

    Args:
        path: file to create once. The first process to claim it creates it.
        make: called with the open, empty file, which it fills.
    """
    while not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with claim_file(path) as file:
            if file is not None:
                make(file)
        if file is None:
            time.sleep(POLL_SECONDS)  # another process is creating it; if that process fails, this one can claim it


@contextmanager
def claim_file(path: Path) -> Iterator[BinaryIO | None]:
    """Yield an empty temporary file. If the block ends without an error, sync the file and rename it to ``path``.

    Yield None if ``path`` exists or another process is creating it. A claim is a lock on the temporary file, so it ends
    when its process ends or is killed. The next process to claim ``path`` empties the temporary file and starts over.

    If the file system has no locks, or the temporary file belongs to another user and cannot be opened, each process
    writes a separate temporary file. The first process to finish wins.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    publish: Callable[[Path, Path], object] = Path.replace
    try:
        file = _locked(temporary)
    except NotImplementedError:
        temporary, publish = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp"), _publish_first
        file = temporary.open("w+b")
    if file is None or path.exists():
        if file is not None:
            temporary.unlink(missing_ok=True)
            file.close()
        yield None
        return
    with file:
        try:
            yield file
            file.flush()
            os.fsync(file.fileno())
            publish(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    sync(path.parent)


def _publish_first(temporary: Path, path: Path) -> None:
    """Rename ``temporary`` to ``path`` unless ``path`` exists.

    An existing file is not replaced, because processes may have mapped it into memory. The exception is a file system
    without hard links, where the last process to finish replaces it.
    """
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        pass
    except OSError:  # no hard links on this file system: the last to finish wins
        temporary.replace(path)
        return
    temporary.unlink()


def _locked(path: Path) -> BinaryIO | None:
    """Open and lock ``path``, and empty it. Return None if another process holds the lock.

    Raises:
        NotImplementedError: the file system has no locks, or the file belongs to another user.
    """
    while True:
        created = not path.exists()
        try:
            # Open for reading too, so that the caller can read back what it wrote.
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")
        except PermissionError as error:
            raise NotImplementedError from error
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            file.close()
            return None
        except OSError as error:
            file.close()
            if created:
                path.unlink(missing_ok=True)
            raise NotImplementedError from error
        with suppress(FileNotFoundError):
            if path.stat().st_ino == os.fstat(file.fileno()).st_ino:
                file.truncate(0)
                return file
        file.close()  # another process renamed or removed the file before this process got the lock


def lock_folder(folder: Path, stack: ExitStack) -> bool:
    """Lock ``folder`` for this process. The lock ends when ``stack`` closes, or when the process ends or is killed.

    Returns:
        False if another process holds the lock, else True. On a file system without locks, the result is True, and a
        warning is logged.
    """
    file = stack.enter_context((folder / ".lock").open("w"))
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        log(f"{folder}: this file system has no locks; do not use the folder in two processes at the same time")
    return True


def file_signature(path: str | Path, min_age_ns: int) -> bytes | None:
    """Return a 16-byte signature of a file: a digest of its absolute path, size, mtime and ctime.

    Args:
        path: file to look up.
        min_age_ns: minimum age of the last change, in nanoseconds. If a file changed more recently, another change
            could leave mtime and ctime as they are, and the signature would not show it.

    Returns:
        ``b""`` if ``path`` is not a regular file, None if the file changed too recently.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 - not Path.stat: it is slow for millions of files
    except (OSError, ValueError):  # ValueError: the path has a NUL byte
        return b""
    if not stat.S_ISREG(status.st_mode):
        return b""
    now = time.time_ns()
    if any(abs(now - changed) < min_age_ns for changed in (status.st_mtime_ns, status.st_ctime_ns)):
        return None
    times = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} "  # the path comes last: it may contain spaces
    return hashlib.blake2b(times.encode() + os.fsencode(os.path.abspath(path)), digest_size=16).digest()  # noqa: PTH100


def cache_folder(table: str | Path) -> Path:
    """Return the cache folder of a node or edge table: ``$MMGRAPH_CACHE``, else ``mmgraph_cache`` beside the table."""
    return Path(os.environ.get("MMGRAPH_CACHE") or Path(table).parent / "mmgraph_cache")


@contextmanager
def explain_disk_errors(folder: Path, remedy: str) -> Iterator[None]:
    """Turn an ``OSError`` in the block into a :class:`RunError` that names the folder, the cause and ``remedy``."""
    try:
        yield
    except OSError as error:
        name = f" ({Path(error.filename).name})" if error.filename else ""
        raise RunError(f"{folder}: {error.strerror or error}{name}; {remedy}") from None


def sync(path: Path) -> None:
    """Sync a file, or the entries of a folder, to disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
