"""Trackers that raise, hang, or cannot write: training goes on, with one line about it."""

import itertools
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import brief, check_same, each, run

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
