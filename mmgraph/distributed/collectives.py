"""Agreement between ranks: work that all do or one does, and failures that all learn of."""

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
from mmgraph.utils.files import explain_disk_errors

Result = TypeVar("Result")


SYNC_SECONDS = 5


def raise_on_all_ranks(accelerator: Accelerator, function: Callable[[], Result]) -> Result:
    """Call ``function`` on every rank; where it fails on one, fail on all, so that none waits for ever.

    Raises:
        UserError: naming the rank, on ranks where the call itself went well. A rank's own error is raised there as is.
    """
    error: Exception | None = None
    try:
        result = function()
    except Exception as caught:
        error = caught
    text = None if error is None else str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    own = text, getattr(error, "exit_code", 1)
    failures = [own] if accelerator.num_processes == 1 else gather_object([own])
    if error is not None:
        raise error
    for rank, (failure, code) in enumerate(failures):
        if failure is not None:
            raise (RunError if code == RunError.exit_code else UserError)(f"rank {rank}: {failure}")
    return result


def broadcast_from_main_process(accelerator: Accelerator, function: Callable[[], Result]) -> Result:
    """What ``function`` returns on the main process, on every rank; its failure is every rank's."""
    result = [raise_on_all_ranks(accelerator, function if accelerator.is_main_process else lambda: None)]
    if accelerator.num_processes > 1:
        broadcast_object_list(result)
    return result[0]  # type: ignore[return-value]


def on_main_process(accelerator: Accelerator, function: Callable[[], object]) -> None:
    """Call ``function`` on the main process alone; its failure is every rank's (see :func:`raise_on_all_ranks`)."""
    raise_on_all_ranks(accelerator, function if accelerator.is_main_process else lambda: None)


def write_on_main_process(accelerator: Accelerator, folder: Path, write: Callable[[], object]) -> None:
    """Have the main process write to a run's ``folder``; its failure is every rank's (see :func:`raise_on_all_ranks`).

    Raises:
        RunError: what is to be done where the disk is full, or fails.
    """

    def told() -> None:
        with explain_disk_errors(
            folder, "what was there stands. Make room, and the same command goes on from the last state"
        ):
            write()

    on_main_process(accelerator, told)


def work_on_all_ranks(accelerator: Accelerator, counts: Iterator[int]) -> Iterator[int]:
    """Have each rank do work of its own, a few seconds between meetings, so that all learn of a failure at once.

    Args:
        counts: does the rank's work, and yields how much of it is done, or 0 where it waits for others.

    Yields:
        How much of their work the other ranks have done since, until all are done.

    Raises:
        UserError: a rank fails; as :func:`raise_on_all_ranks`.
    """
    with closing(_sums_between_syncs(counts)) as work:  # type: ignore[type-var]
        done: list[int | None] = [0]
        while any(count is not None for count in done):
            own = raise_on_all_ranks(accelerator, lambda: next(work, None))
            done = gather_object([own])
            yield sum(filter(None, done)) - (own or 0)


def _sums_between_syncs(counts: Iterator[int]) -> Iterator[int]:
    """Sums of counts over ``SYNC_SECONDS``, sooner where one is 0: how long a rank works before it meets the others.

    Whole shards or blocks would be too long: with large towers one takes minutes where another rank's takes seconds.
    """
    total, begun = 0, time.monotonic()
    for count in counts:
        total += count
        if count == 0 or time.monotonic() - begun > SYNC_SECONDS:
            yield total
            total, begun = 0, time.monotonic()
    yield total
