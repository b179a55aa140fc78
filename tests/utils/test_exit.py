"""The end of a process where a tracker hangs."""

import sys
from pathlib import Path

import pytest
from conftest import settings
from launches import run

# wandb registers a hook for the exit, then hangs. Hooks of a process that ends as usual are called.
HANGING = """
import atexit, sys, time
import wandb
from mmgraph.cli import leave
from mmgraph.cli.failures import run
from mmgraph.cli.train import run_training
from mmgraph.training import trackers
trackers.START_SECONDS = 2
def init(**_):
    atexit.register(time.sleep, 3600)
    time.sleep(3600)
wandb.init = init
def action():
    code = run_training(sys.argv[1:])
    if {fails}:
        raise ValueError("a bug")
    return code
leave(run(action))
"""


@pytest.mark.parametrize(("environment", "fails"), [({}, False), ({"RANK": "0", "ACCELERATE_USE_CPU": "true"}, True)])
def test_a_tracker_that_hangs_does_not_keep_the_process(
    environment: dict[str, str], fails: bool, graph: Path, tmp_path: Path
) -> None:
    """Neither after a run that is done, nor after a bug; :func:`conftest.run` waits for less than an hour."""
    flags = settings(graph, tmp_path / "run", "--max_steps=2", "--report_to=wandb", "--tower_cache=off")
    cache = {"MMGRAPH_CACHE": "/proc/none", "TMPDIR": str(tmp_path)}  # converted tables are in a temporary folder
    done = run([sys.executable, "-c", HANGING.format(fails=fails), *flags], **environment, **cache)
    assert done.returncode == fails, done.stdout + done.stderr
    assert done.stdout.count("wandb is off from here: it has not started") == 1
    assert ("Traceback" in done.stderr and "ValueError: a bug" in done.stderr) == fails
    assert "converted tables are kept for this run only" in done.stdout
    assert not list(tmp_path.glob("mmgraph_tables_*"))
    assert "wandb is off from here" in (tmp_path / "run/training_log.txt").read_text()


ENDING = """
import atexit
from mmgraph.utils.exit import end_process, hook_may_hang, hooks_may_hang
assert not hooks_may_hang()
hook_may_hang()
assert hooks_may_hang()
atexit.register(print, "a hook")
def broken():
    raise ValueError("a clean-up that fails")
end_process(5, broken, lambda: print("a clean-up", end=""))
"""


def test_a_process_ends_with_its_clean_ups_alone() -> None:
    done = run([sys.executable, "-c", ENDING])
    assert (done.returncode, done.stdout) == (5, "a clean-up")
    assert "ValueError: a clean-up that fails" in done.stderr
