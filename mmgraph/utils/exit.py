"""The end of a process where exit hooks of other packages may hang."""

import os
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

_may_hang = False


def hook_may_hang() -> None:
    """Note that an exit hook may not return, such as one of a tracker that hangs."""
    global _may_hang
    _may_hang = True


def hooks_may_hang() -> bool:
    """Whether :func:`hook_may_hang` was called: the process must then end by :func:`end_process`."""
    return _may_hang


def end_process(code: int, *clean_ups: Callable[[], object]) -> NoReturn:
    """Call ``clean_ups``, then end this process without Python's exit hooks and teardown."""
    for clean_up in clean_ups:
        try:
            clean_up()
        except Exception:  # the others are still to be called, as atexit does it
            traceback.print_exc()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(code)
