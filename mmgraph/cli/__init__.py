"""The command lines: ``launch.py`` trains, ``mmgraph VERB`` does everything else. Errors are printed as one line."""

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
    """Train a model.

    Returns:
        The exit code: 0; 1 for a failed run; 2 for wrong usage or bad input; 130 for a keyboard interrupt; 143 for a
        run that was stopped by a signal.
    """
    return run(lambda: run_training(list(sys.argv[1:] if arguments is None else arguments)))


def main(arguments: Sequence[str] | None = None) -> int:
    """Run ``mmgraph VERB`` and return the exit code. ``mmgraph --help`` lists the verbs."""
    return run(lambda: run_verb(list(sys.argv[1:] if arguments is None else arguments)))


def leave(code: int) -> NoReturn:
    """Run the exit hooks and end this process. A launched rank skips Python's teardown.

    DeepSpeed never releases its process groups. If a gloo thread releases a collective's tensors during the teardown,
    the process aborts (pytorch issue 190489), and the launcher would report a finished run as failed. If an exit hook
    of another package may hang, mmgraph's own clean-up runs instead of the exit hooks.
    """
    if hooks_may_hang():
        from mmgraph.data.table_cache import remove_temporary_folders

        end_process(code, end_workers, remove_temporary_folders, flush_log)
    if "RANK" not in os.environ:
        sys.exit(code)
    # No public function runs the exit hooks without the teardown, so this calls a private one. The alternative would be
    # sys.exit, with a last hook that ends the process. But sys.exit waits for all threads before it runs any hook, even
    # for a thread that is stuck in a collective or on a disk.
    end_process(code, atexit._run_exitfuncs)
