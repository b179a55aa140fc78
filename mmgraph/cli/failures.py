"""Turn errors into one line and an exit code."""

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
from mmgraph.utils.error_text import describe_missing_package, describe_out_of_memory, one_line
from mmgraph.utils.exit import hooks_may_hang
from mmgraph.utils.log import is_main_process

# Most user errors occur on all ranks. All ranks except rank 0 wait before they print such an error, so that rank 0
# prints it first, and the launcher ends the waiting ranks before they print it too.
OTHERS_WAIT_SECONDS = 5
# Errors of the machine or of a user's paths. Other OSErrors, such as EBADF and ENOENT, are bugs. (If a user's file is
# missing, the code raises UserError.)
ENVIRONMENT_ERRORS = {
    errno.ENOSPC, errno.EDQUOT, errno.EFBIG,  # no disk space
    errno.EACCES, errno.EPERM, errno.EROFS,  # no permission
    errno.EIO, errno.EREMOTEIO, errno.ESTALE, errno.ENOLCK, errno.ENOTCONN, errno.ETIMEDOUT,  # disk or network disk
    errno.EMFILE, errno.ENFILE, errno.ENOMEM, errno.EAGAIN,  # limits on files, memory and processes
    errno.ENAMETOOLONG, errno.ELOOP,  # invalid paths from a user
    errno.EPIPE,  # the reader of the output is gone
}  # fmt: skip


def run(action: Callable[[], int]) -> int:
    """Call ``action`` and return its exit code. Print an error of the user or the machine as one line.

    Other errors are bugs and keep their traceback.
    """
    try:
        return action()
    except Exception as error:
        end_workers()
        code = _report(error)
        if code is None:
            if not hooks_may_hang():
                raise
            traceback.print_exc()  # raise would run the exit hooks, which may hang; the caller's leave() skips them
            return 1
        return code
    except KeyboardInterrupt:
        end_workers()
        return 130


def _report(error: Exception) -> int | None:
    """Print an error of the user or the machine as one line and return the exit code. Return None for other errors."""
    rank = os.environ.get("RANK", "0")
    if isinstance(error, UserError):
        if not is_main_process():
            time.sleep(OTHERS_WAIT_SECONDS)
        print(f"mmgraph: error: {'' if is_main_process() else f'rank {rank}: '}{error}", file=sys.stderr)
        return error.exit_code
    if isinstance(error, RuntimeError):
        description = _lost_contact(error) or _lost_worker(error)
        if description is not None:
            print(f"mmgraph: error: rank {rank} {description}; the last resume state is intact", file=sys.stderr)
            return 1
    if (description := describe_out_of_memory(error)) is not None:
        remedy = "use a device with more memory, or a smaller --global_batch_size; the last resume state is intact"
        print(f"mmgraph: error: rank {rank}: {description}; {remedy}", file=sys.stderr)
        return 1
    if (description := describe_missing_package(error)) is not None:
        print(f"mmgraph: error: {description}", file=sys.stderr)
        return UserError.exit_code
    if isinstance(error, OSError) and error.errno in ENVIRONMENT_ERRORS:
        print(f"mmgraph: error: {error}", file=sys.stderr)
        return 1
    return None


def end_workers() -> None:
    """Kill the DataLoader workers.

    At exit, Python would send SIGTERM to the workers and wait for them forever: they ignore SIGTERM, because it is a
    stop request to the ranks.
    """
    workers = multiprocessing.active_children()
    if not workers:
        return
    handler = signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # PyTorch's handler raises if a worker dies
    for worker in workers:
        worker.kill()
        worker.join()
    signal.signal(signal.SIGCHLD, signal.SIG_DFL if handler is None else handler)


def _lost_worker(error: RuntimeError) -> str | None:
    """Return a description of a DataLoader worker that died or hangs, or None for other errors."""
    reason = one_line(error)
    if reason.startswith("DataLoader timed out"):
        return f"waited longer than --collective_timeout for a DataLoader worker, which hangs ({reason})"
    if reason.startswith("DataLoader worker"):
        return f"lost a DataLoader worker ({reason}); if it ran out of memory, lower --num_workers or --cache_size"
    return None


def _lost_contact(error: RuntimeError) -> str | None:
    """Return a description of a collective that failed because another rank died or hangs, or None for other errors.

    The cause is on that other rank.
    """
    from torch.distributed import DistError

    reason = one_line(error)
    if (
        not isinstance(error, DistError) and "gloo" not in reason
    ):  # gloo raises plain RuntimeErrors, whose text contains paths of gloo's source
        return None
    reason = re.sub(r"\[\S+:\d+\] ", "", reason).split(". ")[0][:200]
    if "timed out" in reason.lower() or "timeout" in reason.lower():
        return f"waited longer than --collective_timeout for another rank, which hangs or has died ({reason})"
    return f"lost another rank ({reason}): for the cause, see that rank's error or the launcher's summary"
