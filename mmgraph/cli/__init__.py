"""The command lines: ``launch.py`` trains, ``mmgraph VERB`` does the rest. Errors become one line here."""

import atexit
import os
import sys
from collections.abc import Sequence
from typing import NoReturn

from mmgraph.cli.failures import end_workers, run
from mmgraph.cli.train import run_training
from mmgraph.cli.verbs import run_verb
from mmgraph.utils.exit import end_process, hooks_may_hang
from mmgraph.utils.log import flush_log


def train_main(arguments: Sequence[str] | None = None) -> int:
    """Train. Returns the exit code: 0, 2 for wrong usage or bad input, 143 for a run that was stopped."""
    return run(lambda: run_training(list(sys.argv[1:] if arguments is None else arguments)))


def main(arguments: Sequence[str] | None = None) -> int:
    """``mmgraph VERB``: demo, cache, encode, evaluate, convert, bench."""
    return run(lambda: run_verb(list(sys.argv[1:] if arguments is None else arguments)))


def leave(code: int) -> NoReturn:
    """End this process after its exit hooks; a rank without Python's own teardown.

    DeepSpeed never lets go of its process groups. Where a thread of gloo gives back a collective's tensors while Python
    is torn down, the process aborts (pytorch issue 190489), and the launcher would report a run that is done as failed.
    Where a hook of another package may hang, only the clean-ups of mmgraph are done.
    """
    if hooks_may_hang():
        from mmgraph.data.table_cache import remove_temporary_folders

        end_process(code, end_workers, remove_temporary_folders, flush_log)
    if "RANK" not in os.environ:
        sys.exit(code)
    # No public function runs the hooks without the teardown. A first hook that ends the process would run last, but
    # sys.exit waits for all threads before any hook, also for one that is stuck in a collective or on a disk.
    end_process(code, atexit._run_exitfuncs)
