"""The exit of a process in which a tracker or an exit hook may hang."""

import sys
from pathlib import Path

import pytest
from conftest import settings
from launches import run

# wandb.init registers an exit hook that sleeps for an hour, then hangs. A normal exit would wait for the hook.
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


@pytest.mark.slow
@pytest.mark.parametrize(
    ("environment", "fails"),
    [({}, False), ({"RANK": "0", "ACCELERATE_USE_CPU": "true"}, True)],
)
def test_the_process_exits_if_a_tracker_hangs(
    environment: dict[str, str], fails: bool, graph: Path, tmp_path: Path
) -> None:
    """The process exits after a finished run and after a bug. :func:`launches.run` fails after 300 s otherwise."""
    flags = settings(graph, tmp_path / "run", "--max_steps=2", "--report_to=wandb", "--tower_cache=off")
    cache = {"MMGRAPH_CACHE": "/proc/none", "TMPDIR": str(tmp_path)}  # tables are converted in a temporary folder
    done = run([sys.executable, "-c", HANGING.format(fails=fails), *flags], **environment, **cache)
    assert done.returncode == fails, done.stdout + done.stderr
    assert done.stdout.count("wandb is disabled for the rest of the run: it did not start") == 1
    assert ("Traceback" in done.stderr and "ValueError: a bug" in done.stderr) == fails
    assert "converted tables are kept for this run only" in done.stdout
    assert not list(tmp_path.glob("mmgraph_tables_*"))
    assert "wandb is disabled for the rest of the run" in (tmp_path / "run/training_log.txt").read_text()


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


def test_end_process_runs_only_its_clean_ups() -> None:
    done = run([sys.executable, "-c", ENDING])
    assert (done.returncode, done.stdout) == (5, "a clean-up")
    assert "ValueError: a clean-up that fails" in done.stderr
