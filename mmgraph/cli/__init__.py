"""The command lines: ``launch.py`` trains, ``mmgraph VERB`` does the rest. Errors become one line here."""

import atexit
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import NoReturn

from mmgraph.cli.failures import run
from mmgraph.cli.train import run_training
from mmgraph.cli.verbs import run_verb


def train_main(arguments: Sequence[str] | None = None) -> int:
    """Train. Returns the exit code: 0, 2 for wrong usage or bad input, 143 for a run that was stopped."""
    return run(lambda: run_training(list(sys.argv[1:] if arguments is None else arguments)))


def main(arguments: Sequence[str] | None = None) -> int:
    """``mmgraph VERB``: demo, cache, encode, evaluate, convert, bench."""
    return run(lambda: run_verb(list(sys.argv[1:] if arguments is None else arguments)))


def leave(code: int) -> NoReturn:
    """End this process; a rank without Python's own teardown, after all that is registered for the exit.

    DeepSpeed never lets go of its process groups. Where a thread of gloo gives back a collective's tensors while Python
    is torn down, the process aborts (pytorch issue 190489), and a run that is done would be told as failed.
    """
    if "RANK" not in os.environ:
        sys.exit(code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        with suppress(OSError):  # nobody reads it any more
            stream.flush()
    os._exit(code)
