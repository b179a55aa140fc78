"""Writing so that nothing half-written is ever found under its final name, and where caches lie."""

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
    """Let ``write`` fill a temporary file beside ``path``, sync it, and rename it to ``path``.

    Args:
        shared: other processes may write ``path`` at the same time; the last to rename wins.
    """
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex if shared else ''}.tmp")
    try:
        write(temporary)
        sync(temporary)
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    sync(path.parent)


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file durably, which other processes may write at the same time."""

    def save(temporary: Path) -> None:
        with temporary.open("wb") as file:
            try:
                np.save(file, array)
            except OSError as error:
                if error.errno is not None:
                    raise
                # NumPy counts what was written, and does not know why it is less.
                raise OSError(errno.EIO, "NumPy could not write all of it, as on a full disk", str(path)) from error

    write_durably(path, save, shared=True)


def make_once(path: Path, make: Callable[[BinaryIO], object]) -> None:
    """Have ``path`` made by whichever process comes first, and wait until it is there."""
    while not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        with claim_file(path) as file:
            if file is not None:
                make(file)
        if file is None:
            time.sleep(POLL_SECONDS)  # another process is at it: it will be there, or free for this one to make


@contextmanager
def claim_file(path: Path) -> Iterator[BinaryIO | None]:
    """An empty file to fill, which is synced and renamed to ``path`` when the block ends without an error.

    None where ``path`` is there already, or another process is making it: a claim is a lock on the temporary file, so
    it ends with its process, killed or not, and the next claim begins the same file anew. Where there are no locks, or
    another user's claim cannot be opened, each makes a file of its own; the first to be done wins.
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
    """Give a file its name if no other has it: one that is mapped already must stay, also on a network file system."""
    try:
        path.hardlink_to(temporary)
    except FileExistsError:
        pass
    except OSError:  # no links here
        temporary.replace(path)
        return
    temporary.unlink()


def _locked(path: Path) -> BinaryIO | None:
    """Open ``path`` empty, for this process alone; None where another has it.

    Raises:
        NotImplementedError: there are no locks here, or it is another user's.
    """
    while True:
        created = not path.exists()
        try:
            file = os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT, 0o666), "r+b")  # what was written can be read again
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
        file.close()  # its maker renamed or removed it before the lock was this process's


def locked(folder: Path, stack: ExitStack) -> bool:
    """Take ``folder`` for this process alone, until ``stack`` closes or the process ends, killed or not.

    False where another process has it. Where there are no locks, a line in the log says so.
    """
    file = stack.enter_context((folder / ".lock").open("w"))
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError):
        return False
    except OSError:
        log(f"{folder} is on a file system without locks: start nothing else in it")
    return True


def file_signature(path: str | Path, min_age_ns: int) -> bytes | None:
    """The state of a file, 16 bytes: a digest of its absolute path, its size and its times.

    Args:
        min_age_ns: how long ago the last change must be, in nanoseconds. A file that changed more recently may change
            again while its times stay the same.

    Returns:
        ``b""`` where there is no regular file, None where it changed too recently.
    """
    try:
        status = os.stat(path)  # noqa: PTH116 - Path would be made anew for each of millions of files
    except (OSError, ValueError):  # the latter of a NUL byte
        return b""
    if not stat.S_ISREG(status.st_mode):
        return b""
    now = time.time_ns()
    if any(abs(now - changed) < min_age_ns for changed in (status.st_mtime_ns, status.st_ctime_ns)):
        return None
    times = f"{status.st_size} {status.st_mtime_ns} {status.st_ctime_ns} "  # the path is last: it may hold anything
    return hashlib.blake2b(times.encode() + os.fsencode(os.path.abspath(path)), digest_size=16).digest()  # noqa: PTH100


def cache_folder(table: str | Path) -> Path:
    """Where what is derived from a node or edge table is kept: ``$MMGRAPH_CACHE``, else beside the table."""
    return Path(os.environ.get("MMGRAPH_CACHE") or Path(table).parent / "mmgraph_cache")


@contextmanager
def explain_disk_errors(folder: Path, remedy: str) -> Iterator[None]:
    """Say of an ``OSError`` in the block, as of a full disk, where, why and what to do, as a :class:`RunError`."""
    try:
        yield
    except OSError as error:
        name = f" ({Path(error.filename).name})" if error.filename else ""
        raise RunError(f"{folder}: {error.strerror or error}{name}; {remedy}") from None


def sync(path: Path) -> None:
    """Force a file, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
