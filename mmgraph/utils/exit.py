"""Ends a process in which exit hooks of other packages may hang."""

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

_may_hang = False


def hook_may_hang() -> None:
    """Record that an exit hook may never return, such as the hook of a tracker that hangs."""
    global _may_hang
    _may_hang = True


def hooks_may_hang() -> bool:
    """Whether :func:`hook_may_hang` was called. If so, end the process with :func:`end_process`."""
    return _may_hang


def end_process(code: int, *clean_ups: Callable[[], object]) -> NoReturn:
    """Call ``clean_ups``, then end this process without running Python's exit hooks and teardown."""
    for clean_up in clean_ups:
        try:
            clean_up()
        except Exception:  # call the remaining clean-ups anyway, as atexit does
            traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # the reader has closed the pipe
            stream.flush()
    os._exit(code)
