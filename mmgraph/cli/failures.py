"""Errors become one line and an exit code."""

import errno
import multiprocessing
import os
import re
import signal
import sys
import time
import traceback
from collections.abc import Callable

from mmgraph.errors import UserError
from mmgraph.utils.exit import hooks_may_hang
from mmgraph.utils.log import is_main_process

OTHERS_WAIT_SECONDS = 5  # most errors are every rank's: the main one says it, and the launcher then ends the others
# What the machine causes: any other OSError, such as EBADF, or ENOENT of a path that no user gave, is a bug.
ENVIRONMENT_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG,  # no room
    errno.EACCES, errno.EPERM, errno.EROFS,  # not permitted
    errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ENOLCK, errno.ENOTCONN, errno.ETIMEDOUT,  # disks, also of a network
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN,  # limits on files, memory and processes
    errno.ENAMETOOLONG, errno.ELOOP,  # paths that a user gave
    errno.EPIPE,  # nobody reads what is printed
}  # fmt: skip


def run(action: Callable[[], int]) -> int:
    """Call ``action``. An error that a user or the machine causes ends in one line, from the main process alone."""
    try:
        return action()
    except Exception as error:
        end_workers()
        code = _report(error)
        if code is None:
            if not hooks_may_hang():
                raise
            traceback.print_exc()  # the interpreter's own end after an error would run the hooks
            return 1
        return code
    except KeyboardInterrupt:
        end_workers()
        return 130


def _report(error: Exception) -> int | None:
    """Print one line about an error that a user or the machine causes. Returns the exit code; None of any other."""
    rank = os.environ.get("RANK", "0")
    if isinstance(error, UserError):
        if not is_main_process():
            time.sleep(OTHERS_WAIT_SECONDS)
        print(f"mmgraph: error: {'' if is_main_process() else f'rank {rank}: '}{error}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, RuntimeError):
        lost = _lost_contact(error) or _lost_worker(error)
        if lost is not None:
            print(f"mmgraph: error: rank {rank} {lost}; the last state stands", file=sys.stderr)
            return 1
    if isinstance(error, OSError) and error.errno in ENVIRONMENT_ERRORS:
        print(f"mmgraph: error: {error}", file=sys.stderr)
        return 1
    return None


def end_workers() -> None:
    """End the DataLoader workers. They ignore SIGTERM, which at a stop is for ranks: Python would wait for ever."""
    workers = multiprocessing.active_children()
    if not workers:
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's raises where a worker dies
    for worker in workers:
        worker.kill()
        worker.join()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)


def _lost_worker(error: RuntimeError) -> str | None:
    """What happened, where a DataLoader worker is gone or hangs."""
    reason = " ".join(str(error).split())
    if reason.startswith("DataLoader timed out"):
        return f"waited --collective_timeout for a DataLoader worker, which hangs ({reason})"
    if reason.startswith("DataLoader worker"):
        return f"lost a DataLoader worker: out of memory? Then --num_workers or --cache_size is too large ({reason})"
    return None


def _lost_contact(error: RuntimeError) -> str | None:
    """What happened, where a collective failed because another rank is gone or hangs; the cause is that rank's."""
    from torch.distributed import DistError

    reason = " ".join(str(error).split())
    if not isinstance(error, DistError) and "gloo" not in reason:  # gloo raises plain ones, with its files' names
        return None
    reason = re.sub(r"\[\S+:\d+\] ", "", reason).split(". ")[0][:200]
    if "timed out" in reason.lower() or "timeout" in reason.lower():
        return f"waited --collective_timeout for another rank, which hangs or is gone ({reason})"
    return f"lost another rank, whose own words or the launcher's summary say why ({reason})"
