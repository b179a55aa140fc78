"""kill -9 and power cuts at any point: the same command resumes, with the result of an uninterrupted run."""

import itertools
import random
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import targets
from runs import SAVE_EVERY, STEPS, Fault, brief, check_log, check_same, count, each, run, valid_steps

EPOCH = 4  # steps
EVALUATED = ("--eval_fraction=0.1", "--eval_every=3", "--batch_size=44", "--keep_best=z_graph/mrr")
SAVING = [targets.SAVE]
EVALUATING = [targets.EVALUATE]
PREPARING = [targets.OPEN_GRAPH, targets.LOAD_CONTENT_HASHES, targets.OPEN_STORE]
Cases = Callable[[int], None]


@pytest.fixture(scope="module")
def reference(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run without faults."""
    output = tmp_path_factory.mktemp("reference") / "run"
    assert run(brief(graph, output)).code == 0
    return output


@pytest.fixture(scope="module")
def evaluated(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run without faults, with evaluations."""
    output = tmp_path_factory.mktemp("reference") / "evaluated"
    assert run(brief(graph, output, *EVALUATED)).code == 0
    return output


@pytest.fixture(scope="module")
def all_states(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with all states of a run without faults."""
    output = tmp_path_factory.mktemp("reference") / "states"
    assert run(brief(graph, output, "--keep_last=99")).code == 0
    return output / "state"


def after(step: int) -> Fault:
    """Return the fault that kills a run after a step."""
    return "after_step", {"step": step, "action": "SIGKILL"}


def log_of(output: Path) -> str:
    """Return the text log of a run; empty if it does not exist."""
    path = output / "training_log.txt"
    return path.read_text() if path.exists() else ""


def check_resumed(graph: Path, output: Path, reference: Path, *more: str) -> None:
    """Run the same command again. Check that its result equals ``reference``, and that the log names the state."""
    before, steps = log_of(output), valid_steps(output)
    ended = run(brief(graph, output, *more))
    assert ended.code == 0, ended.said
    check_same(output, reference, was_done=steps[:1] == [STEPS])
    if (output / "evaluation.json").exists():
        assert (output / "evaluation.json").read_bytes() == (reference / "evaluation.json").read_bytes()
    if not steps or steps[0] < STEPS:
        check_log(before, log_of(output), steps[0] if steps else 0)


@pytest.mark.fault("kill -9 after each step of a run")
@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_after_a_step(graph: Path, reference: Path, tmp_path: Path, cases: Cases, every: int) -> None:
    def check(step: int) -> None:
        output = tmp_path / f"{step}"
        assert run(brief(graph, output), after(step)).code == -signal.SIGKILL
        saved = [s for s in range(1, step) if s % SAVE_EVERY == 0 or s % EPOCH == 0]
        assert valid_steps(output) == saved[-1:-3:-1]
        check_resumed(graph, output, reference)

    cases(each(range(1, STEPS + 1, every), check))


@pytest.mark.fault("kill -9 three times in one epoch")
@pytest.mark.parametrize("count", [2, pytest.param(12, marks=pytest.mark.slow)])
def test_three_kills_in_an_epoch(graph: Path, reference: Path, tmp_path: Path, cases: Cases, count: int) -> None:
    epochs = [range(first, first + EPOCH) for first in range(1, STEPS + 1, EPOCH)]
    triples = [triple for epoch in epochs for triple in itertools.combinations_with_replacement(epoch, 3)]

    def check(steps: tuple[int, int, int]) -> None:
        output = tmp_path / "-".join(map(str, steps))
        for step in steps:
            run(brief(graph, output), after(step))  # completes without a kill if it resumes at or after this step
        check_resumed(graph, output, reference)

    cases(each(random.Random(0).sample(triples, count), check))


@pytest.mark.fault("kill -9 at the end of an epoch: before its file, between file and state, after the state")
def test_at_the_end_of_an_epoch(graph: Path, reference: Path, tmp_path: Path, cases: Cases) -> None:
    points = [  # function, number of its call, whether the kill is after the call
        (targets.WRITE_CHECKPOINT, 1, False),
        (targets.WRITE_CHECKPOINT, 1, True),
        (targets.WRITE_STATE, 2, False),
        (targets.WRITE_STATE, 2, True),
    ]

    def check(point: tuple[str, int, bool]) -> None:
        target, number, after_call = point
        output = tmp_path / f"{target}-{after_call}"
        fault = ("at_call", {"target": target, "number": number, "action": "SIGKILL", "after": after_call})
        assert run(brief(graph, output), fault).code == -signal.SIGKILL
        check_resumed(graph, output, reference)

    cases(each(points, check))


@pytest.mark.fault("kill -9 or a power cut before each write, sync and rename during saves")
@pytest.mark.parametrize("every", [50, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("action", ["SIGKILL", "power"])
def test_in_a_save(
    graph: Path, reference: Path, all_states: Path, tmp_path: Path, cases: Cases, action: str, every: int
) -> None:
    def check(number: int) -> None:
        output = tmp_path / f"{number}"
        fault = ("at_file_call", {"inside": SAVING, "number": number, "action": action})
        assert run(brief(graph, output), fault).code == -signal.SIGKILL
        for step in valid_steps(output):
            for name in ("trainable.safetensors", "optimizer.safetensors"):
                folder = f"step-{step:08d}"
                assert (output / "state" / folder / name).read_bytes() == (all_states / folder / name).read_bytes()
        if (output / "checkpoints" / "multimodal_encoder_epoch_1.pt").exists():
            assert valid_steps(output)  # the newest earlier state is kept until a newer one is complete
        check_resumed(graph, output, reference)

    cases(each(range(1, count(graph, tmp_path, SAVING) + 1, every), check))


@pytest.mark.fault("kill -9 before each write, sync and rename around an evaluation")
@pytest.mark.parametrize("every", [25, pytest.param(1, marks=pytest.mark.slow)])
def test_in_an_evaluation(graph: Path, evaluated: Path, tmp_path: Path, cases: Cases, every: int) -> None:
    def check(number: int) -> None:
        output = tmp_path / f"{number}"
        fault = ("at_file_call", {"inside": EVALUATING, "number": number, "action": "SIGKILL"})
        assert run(brief(graph, output, *EVALUATED), fault).code == -signal.SIGKILL
        check_resumed(graph, output, evaluated, *EVALUATED)

    cases(each(range(1, count(graph, tmp_path, EVALUATING, *EVALUATED) + 1, every), check))


@pytest.mark.fault("kill -9 while tables are converted and the tower store is built")
@pytest.mark.parametrize("every", [30, pytest.param(1, marks=pytest.mark.slow)])
def test_in_the_store_build(graph: Path, reference: Path, tmp_path: Path, cases: Cases, every: int) -> None:
    def check(number: int) -> None:
        output, cache = tmp_path / f"{number}", {"MMGRAPH_CACHE": str(tmp_path / f"cache-{number}")}
        fault = ("at_file_call", {"inside": PREPARING, "number": number, "action": "SIGKILL"})
        assert run(brief(graph, output), fault, environment=cache).code == -signal.SIGKILL
        ended = run(brief(graph, output), environment=cache)
        assert ended.code == 0, ended.said
        check_same(output, reference)
        # Small temporary files may remain: their names are random, and another process may still be writing them.
        leftovers = [path for path in Path(cache["MMGRAPH_CACHE"]).rglob(".*") if path.stat().st_size > 10_000]
        assert not leftovers

    calls = count(graph, tmp_path, PREPARING, MMGRAPH_CACHE=str(tmp_path / "cache"))
    cases(each(range(1, calls + 1, every), check))


@pytest.mark.fault("kill -9 of both ranks after a step, and of the main process during a save")
@pytest.mark.parametrize("every", [6, pytest.param(1, marks=pytest.mark.slow)])
def test_two_ranks(graph: Path, tmp_path: Path, cases: Cases, every: int) -> None:
    without_faults = tmp_path / "whole"
    assert run(brief(graph, without_faults), ranks=2).codes == [0, 0]

    def check(number: int) -> None:
        output = tmp_path / f"{number}"
        fault = after(number)
        if number > STEPS:  # the number of a call that changes files; only the main process makes such calls
            fault = ("at_file_call", {"inside": SAVING, "number": number, "action": "SIGKILL", "rank": 0})
        ended = run(brief(graph, output), fault, ranks=2, timeout=60)  # shorter than --collective_timeout (600 s)
        assert -signal.SIGKILL in ended.codes and None not in ended.codes, ended.said
        assert run(brief(graph, output), ranks=2).codes == [0, 0]
        check_same(output, without_faults)

    # Numbers up to STEPS are steps, larger ones file calls.
    cases(each([2, 4, 7, 11, 40, 60, 80, 100, 120, 140][1::every], check))
