"""Run functions on all ranks or on the main process, and propagate failures to all ranks."""

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import (
    broadcast_object_list,
    gather_object,
)

from mmgraph.errors import RunError, UserError
from mmgraph.utils.error_text import describe_error
from mmgraph.utils.files import explain_disk_errors

Result = TypeVar("Result")


SYNC_SECONDS = 5  # time between two syncs in work_on_all_ranks()


def raise_on_all_ranks(accelerator: Accelerator, function: Callable[[], Result]) -> Result:
    """Call ``function`` on every rank. If it fails on one rank, raise on all, so that no rank waits forever.

    Returns:
        The result of this rank's call.

    Raises:
        UserError: the call failed on another rank with a user error; the message names the rank.
        RunError: the call failed on another rank with any other error; the message names the rank.
        Exception: the call failed on this rank; the error of the call is raised unchanged.
    """
    error: Exception | None = None
    try:
        result = function()
    except Exception as caught:
        error = caught
    text = None if error is None else str(error) if isinstance(error, UserError) else describe_error(error)
    outcome = text, getattr(error, "exit_code", 1)
    failures = [outcome] if accelerator.num_processes == 1 else gather_object([outcome])
    if error is not None:
        raise error
    for rank, (failure, code) in enumerate(failures):
        if failure is not None:
            raise (RunError if code == RunError.exit_code else UserError)(f"rank {rank}: {failure}")
    return result


def broadcast_from_main_process(accelerator: Accelerator, function: Callable[[], Result]) -> Result:
    """Call ``function`` on the main process and return its result on every rank.

    If the call fails, every rank raises (see :func:`raise_on_all_ranks`).
    """
    result = [raise_on_all_ranks(accelerator, function if accelerator.is_main_process else lambda: None)]
    if accelerator.num_processes > 1:
        broadcast_object_list(result)
    return result[0]  # type: ignore[return-value]


def on_main_process(accelerator: Accelerator, function: Callable[[], object]) -> None:
    """Call ``function`` on the main process only. If it fails, every rank raises (see :func:`raise_on_all_ranks`)."""
    raise_on_all_ranks(accelerator, function if accelerator.is_main_process else lambda: None)


def write_on_main_process(accelerator: Accelerator, folder: Path, write: Callable[[], object]) -> None:
    """Call ``write``, which writes to a run's ``folder``, on the main process only. If it fails, every rank raises.

    Raises:
        RunError: the disk is full or fails. The message contains the remedy.
    """

    def write_or_explain() -> None:
        with explain_disk_errors(
            folder,
            "existing files are intact. Free disk space, then run the same command to resume from the last state",
        ):
            write()

    on_main_process(accelerator, write_or_explain)


def work_on_all_ranks(accelerator: Accelerator, counts: Iterator[int]) -> Iterator[int]:
    """Do this rank's work, and sync with the other ranks every few seconds, so that all learn of a failure early.

    Args:
        counts: iterator that does this rank's work. It yields the number of items done since its last yield, or 0
            while it waits for other ranks.

    Yields:
        At each sync, the number of items that the other ranks have done since the previous sync. Ends when all ranks
        are done.

    Raises:
        UserError: the work of another rank fails. An error of this rank's work is raised unchanged.
    """
    with closing(_sums_between_syncs(counts)) as work:  # type: ignore[type-var]
        done: list[int | None] = [0]
        while any(count is not None for count in done):
            own_count = raise_on_all_ranks(accelerator, lambda: next(work, None))
            done = gather_object([own_count])
            yield sum(filter(None, done)) - (own_count or 0)


def _sums_between_syncs(counts: Iterator[int]) -> Iterator[int]:
    """Every ``SYNC_SECONDS`` and after each count of 0, yield the sum of the ``counts`` since the last yield.

    The rank syncs at each yield. One sync per shard of a tower store would not be enough: with large towers, a shard
    can take minutes on one rank and seconds on another. The faster rank would then wait for minutes in its sync.
    """
    total, start = 0, time.monotonic()
    for count in counts:
        total += count
        if count == 0 or time.monotonic() - start > SYNC_SECONDS:
            yield total
            total, start = 0, time.monotonic()
    yield total
