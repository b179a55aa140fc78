"""Trackers that raise, hang, or cannot write: training goes on, with one line about it."""

import itertools
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import Fault, brief, check_same, each, run

Cases = Callable[[int], None]


@pytest.fixture(scope="module")
def reference(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    output = tmp_path_factory.mktemp("reference") / "run"
    assert run(brief(graph, output)).code == 0
    return output


@pytest.mark.fault("wandb that raises or hangs at init, log or finish: training goes on, one line")
def test_wandb_that_raises_or_hangs(graph: Path, reference: Path, tmp_path: Path, cases: Cases) -> None:
    def check(case: tuple[str, str]) -> None:
        where, action = case
        output = tmp_path / f"{where}-{action}"
        begun = time.monotonic()
        faults = [("bad_wandb", {"where": where, "action": action}), ("slow_steps", {"seconds": 0.4})]
        ended = run(brief(graph, output, "--report_to=wandb"), *faults, timeout=60)
        assert ended.code == 0, ended.said
        assert ended.said.count("wandb is off") == 1 and "Traceback" not in ended.said, ended.said
        assert ("injected by the test" in ended.said) == (action == "raise")
        assert ("hangs" in ended.said or "has not" in ended.said) == (action == "sleep")
        assert time.monotonic() - begun < 40
        check_same(output, reference)

    cases(each(itertools.product(("init", "log", "finish"), ("raise", "sleep")), check))


@pytest.mark.fault("wandb that hangs at init, while another rank waits for less long: training goes on")
def test_wandb_that_hangs_beside_a_rank(graph: Path, tmp_path: Path) -> None:
    fault: Fault = ("bad_wandb", {"where": "init", "action": "sleep", "patience": 90, "rank": 0})
    flags = brief(graph, tmp_path / "run", "--report_to=wandb", "--collective_timeout=8")
    ended = run(flags, fault, ranks=2, timeout=60)
    assert ended.codes == [0, 0] and "wandb is off from here: it has not started within 4 s" in ended.said, ended


@pytest.mark.fault("wandb that hangs, where workers are to end and a temporary folder is to be removed: both are done")
def test_what_is_to_be_done_at_the_exit(graph: Path, tmp_path: Path) -> None:
    def folders() -> set[Path]:
        return set(Path(tempfile.gettempdir()).glob("mmgraph_tables_*"))

    before = folders()
    flags = brief(graph, tmp_path / "run", "--report_to=wandb", "--tower_cache=off", "--num_workers=2")
    cache = {"MMGRAPH_CACHE": "/proc/none"}  # so converted tables are in a temporary folder
    ended = run(flags, ("bad_wandb", {"where": "init", "action": "sleep"}), timeout=60, environment=cache)
    assert ended.code == 0 and ended.said.count("wandb is off") == 1, ended
    assert "converted tables are kept for this run only" in ended.said and folders() == before


@pytest.mark.fault("a TensorBoard folder that cannot be written, or is full: training goes on, one line")
def test_tensorboard_that_cannot_write(graph: Path, reference: Path, tmp_path: Path, cases: Cases) -> None:
    output = tmp_path / "file"
    output.mkdir()
    (output / "tensorboard").write_text("a file")
    ended = run(brief(graph, output, "--report_to=tensorboard"))
    assert ended.code == 0 and ended.said.count("tensorboard is off") == 1 and "Traceback" not in ended.said, ended.said
    check_same(output, reference)
    output = tmp_path / "broken"
    fault = ("at_call", {"target": "accelerate.tracking.TensorBoardTracker.log", "number": 3, "action": "full"})
    ended = run(brief(graph, output, "--report_to=tensorboard"), fault)
    assert ended.code == 0 and ended.said.count("tensorboard is off from here: OSError") == 1, ended.said
    check_same(output, reference)
    cases(2)
