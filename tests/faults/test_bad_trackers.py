"""Trackers that raise, hang or cannot write: training continues, and the log has one line about the failure."""

import errno
import itertools
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import line_with, lines_with
from runs import Fault, brief, check_same, each, run

Cases = Callable[[int], None]


def failure_line(said: str) -> str:
    """Return the only line about wandb, apart from the line with the address of the run."""
    [line] = [line for line in lines_with(said, "wandb") if "https://wandb.example" not in line]
    return line


@pytest.fixture(scope="module")
def reference(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output folder of a run without a tracker."""
    output = tmp_path_factory.mktemp("reference") / "run"
    assert run(brief(graph, output)).code == 0
    return output


FAILURES = list(itertools.product(("init", "log", "finish"), ("raise", "sleep")))


@pytest.mark.fault("wandb raises or hangs at init, log or finish: training continues, one line")
@pytest.mark.parametrize("some", [FAILURES[2:3], pytest.param(FAILURES, marks=pytest.mark.slow)], ids=["some", "all"])
def test_wandb_that_raises_or_hangs(
    graph: Path, reference: Path, tmp_path: Path, cases: Cases, some: list[tuple[str, str]]
) -> None:
    def check(case: tuple[str, str]) -> None:
        where, action = case
        output = tmp_path / f"{where}-{action}"
        start = time.monotonic()
        faults = [("bad_wandb", {"where": where, "action": action}), ("slow_steps", {"seconds": 0.4})]
        ended = run(brief(graph, output, "--report_to=wandb"), *faults, timeout=60)
        assert ended.code == 0, ended.said
        line = failure_line(ended.said)
        assert "Traceback" not in ended.said, ended.said
        assert ("ValueError: injected by the test" in line) == (action == "raise"), line
        assert bool(lines_with(line, "2 s")) == (action == "sleep"), line  # the time limit
        assert time.monotonic() - start < 40
        check_same(output, reference)

    cases(each(some, check))


@pytest.mark.fault("wandb hangs at init, longer than another rank waits: training continues")
def test_wandb_that_hangs_while_another_rank_waits(graph: Path, tmp_path: Path) -> None:
    fault: Fault = ("bad_wandb", {"where": "init", "action": "sleep", "patience": 90, "rank": 0})
    flags = brief(graph, tmp_path / "run", "--report_to=wandb", "--collective_timeout=8")
    ended = run(flags, fault, ranks=2, timeout=60)
    assert ended.codes == [0, 0] and lines_with(failure_line(ended.said), "4 s"), ended


@pytest.mark.fault("wandb hangs at exit: DataLoader workers still end, and temporary folders are removed")
def test_cleanup_if_wandb_hangs_at_exit(graph: Path, tmp_path: Path) -> None:
    def folders() -> set[Path]:
        return set(Path(tempfile.gettempdir()).glob("mmgraph_tables_*"))

    before = folders()
    flags = brief(graph, tmp_path / "run", "--report_to=wandb", "--tower_cache=off", "--num_workers=2")
    cache = {"MMGRAPH_CACHE": "/proc/none"}  # not writable, so the converted tables are in a temporary folder
    ended = run(flags, ("bad_wandb", {"where": "init", "action": "sleep"}), timeout=60, environment=cache)
    assert ended.code == 0 and lines_with(failure_line(ended.said), "2 s"), ended
    assert lines_with(ended.said, "/proc/none") and folders() == before


@pytest.mark.fault("a TensorBoard folder that is not writable, or full: training continues, one line")
def test_tensorboard_that_cannot_write(graph: Path, reference: Path, tmp_path: Path, cases: Cases) -> None:
    output = tmp_path / "file"
    output.mkdir()
    (output / "tensorboard").write_text("a file")
    ended = run(brief(graph, output, "--report_to=tensorboard"))
    assert ended.code == 0 and "Traceback" not in ended.said, ended.said
    assert "Error: " in line_with(ended.said, "tensorboard")
    check_same(output, reference)
    output = tmp_path / "broken"
    fault = ("at_call", {"target": "accelerate.tracking.TensorBoardTracker.log", "number": 3, "action": "full"})
    ended = run(brief(graph, output, "--report_to=tensorboard"), fault)
    assert ended.code == 0 and line_with(ended.said, "tensorboard", "OSError", os.strerror(errno.ENOSPC)), ended.said
    check_same(output, reference)
    cases(2)
