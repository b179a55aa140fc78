"""Ranks and workers that die, raise or hang, and signals at any time.

All ranks end within seconds, the reason is printed, and the run can be resumed.
"""

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
import targets
from conftest import PACKAGE, line_with, lines_with, stop_lines
from launches import launch_command
from runs import STEPS, Fault, brief, check_same, each, run, valid_steps

Cases = Callable[[int], None]
LIVE = ("--tower_cache=off", "--num_workers=2")
FLAGS = ("--eval_fraction=0.1", "--eval_every=4", "--batch_size=44")
# Seconds, with --collective_timeout=8. If rank 0 ends before it opens its store, PyTorch on rank 1 tries to connect
# twice, with a random delay between the attempts. This alone takes 8 to 24 s.
ENDS_WITHIN = 60
PLACES = {  # place: function, number of its call
    "dataset": (targets.EDGE_ROWS, 3),
    "collator": (targets.COLLATE_EDGES, 3),
    "forward": (targets.FORWARD, 3),
    "loss": (targets.LOSSES, 3),
    "main process, saving": (targets.WRITE_STATE, 1),
    "main process, recording": (targets.WRITE_ROW, 3),
    "main process, evaluating": (targets.RECORD_EVALUATION, 2),
    "evaluation": (targets.RANK_HELD_OUT, 2),
    "start": (targets.OPEN_GRAPH, 1),
    "towers": (targets.OPEN_STORE, 1),
}
RAISING = [(place, rank) for place in PLACES for rank in (0, 1) if rank == 0 or "main" not in place]


@pytest.fixture(scope="module")
def reference(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The output folder of a run of two ranks without faults."""
    output = tmp_path_factory.mktemp("reference") / "run"
    assert run(brief(graph, output, *FLAGS), ranks=2).codes == [0, 0]
    return output


def shared_memory() -> set[str]:
    """Return the names of PyTorch's files in /dev/shm."""
    return {path.name for path in Path("/dev/shm").iterdir() if path.name.startswith("torch")}


@pytest.mark.fault(
    "a rank that raises in the dataset, collator, forward pass, loss, evaluation, start, or main-process code"
)
@pytest.mark.parametrize("some", [RAISING[3::6], pytest.param(RAISING, marks=pytest.mark.slow)], ids=["some", "all"])
def test_a_rank_that_raises(
    graph: Path, reference: Path, tmp_path: Path, cases: Cases, some: list[tuple[str, int]]
) -> None:
    def check(case: tuple[str, int]) -> None:
        place, rank = case
        target, number = PLACES[place]
        output = tmp_path / f"{place}-{rank}".replace(" ", "")
        fault = ("at_call", {"target": target, "number": number, "action": "raise", "rank": rank})
        # A launcher would end the other rank immediately. Here it must detect the error itself.
        flags = brief(graph, output, *FLAGS, "--collective_timeout=8")
        ended = run(flags, fault, ranks=2, timeout=ENDS_WITHIN)
        assert all(code in (1, 2) for code in ended.codes), (place, rank, ended)
        assert "ValueError: injected by the test" in ended.said
        # The other rank's error line: it lost a rank, waited for it until the timeout, or got its error message.
        [line] = [line for line in ended.said.splitlines() if "mmgraph: error: " in line]
        assert lines_with(line, f"rank {1 - rank}") or lines_with(line, f"rank {rank}", "ValueError: injected"), line
        assert not list(output.rglob("*.tmp*"))
        assert run(brief(graph, output, *FLAGS), ranks=2).codes == [0, 0]
        check_same(output, reference)

    before = shared_memory()
    cases(each(some, check))
    assert shared_memory() == before


@pytest.mark.fault("the launcher's SIGTERM to a remaining rank before it printed its error: the error is still printed")
def test_error_is_printed_after_the_launchers_sigterm(graph: Path, tmp_path: Path) -> None:
    killed = ("after_step", {"step": 5, "action": "SIGKILL", "rank": 1})
    signalled = ("at_call", {"target": targets.FAIL, "number": 1, "action": "SIGTERM", "rank": 0})
    ended = run(brief(graph, tmp_path / "run"), killed, signalled, ranks=2)
    assert ended.codes == [1, -9] and line_with(ended.said, "mmgraph: error:", "rank 0"), ended


@pytest.mark.fault("a DataLoader worker that is killed, runs out of memory, raises or hangs")
@pytest.mark.parametrize(
    ("ranks", "every"), [(2, 3), pytest.param(1, 1, marks=pytest.mark.slow), pytest.param(2, 1, marks=pytest.mark.slow)]
)
def test_lost_workers(graph: Path, tmp_path: Path, cases: Cases, ranks: int, every: int) -> None:
    without_faults = tmp_path / "whole"
    assert run(brief(graph, without_faults, *LIVE), ranks=ranks).codes == [0] * ranks
    error, rank = "mmgraph: error:", ranks - 1
    facts = {
        "SIGKILL": (error, f"rank {rank}", "DataLoader", "--num_workers", "--cache_size"),
        "SIGSEGV": (error, f"rank {rank}", "DataLoader", "--num_workers", "--cache_size"),
        "memory": ("MemoryError: no memory left",),
        "raise": ("ValueError: injected by the test",),
        "sleep": (error, f"rank {rank}", "--collective_timeout", "DataLoader"),
    }

    def check(action: str) -> None:
        output = tmp_path / action
        flags = brief(graph, output, *LIVE)
        fault = ("in_a_worker", {"action": action, "rank": rank})
        timeout = ["--collective_timeout=3"] if action == "sleep" else []
        start = time.monotonic()
        ended = run([*flags, *timeout], fault, ranks=ranks, timeout=40)
        assert all(code == 1 for code in ended.codes), (action, ended)
        assert time.monotonic() - start < 40 and lines_with(ended.said, *facts[action]), (action, ended.said)
        assert ("Traceback" in ended.said) == (action in ("memory", "raise")), ended.said
        assert run(flags, ranks=ranks).codes == [0] * ranks
        check_same(output, without_faults)

    before = shared_memory()
    cases(each([*facts][::every], check))
    assert shared_memory() == before


SIGNAL_PLACES = {  # place: function of injection.py, and its settings
    "start": ("at_call", {"target": targets.OPEN_GRAPH, "number": 1}),
    "build": ("at_call", {"target": targets.BUILD_STORE, "number": 1}),
    "first evaluation": ("at_call", {"target": targets.RANK_HELD_OUT, "number": 1}),
    "step": ("after_step", {"step": 6}),
    "save": ("at_call", {"target": targets.CONSOLIDATE, "number": 3}),
    "end of an epoch": ("after_step", {"step": 8}),
    "evaluation": ("at_call", {"target": targets.RANK_HELD_OUT, "number": 2}),
    "last step": ("after_step", {"step": STEPS}),
}


SIGNALLED = [(place, ranks) for place in SIGNAL_PLACES for ranks in ((0,), (1,), (0, 1))]


@pytest.mark.fault(
    "SIGTERM and SIGUSR1 to one or all ranks: at start, in the store's build, a step, a save, an evaluation"
)
@pytest.mark.parametrize(
    ("name", "some"),
    [
        ("SIGTERM", SIGNALLED[4::11]),
        ("SIGUSR1", SIGNALLED[10:11]),
        *(pytest.param(name, SIGNALLED, marks=pytest.mark.slow) for name in ("SIGTERM", "SIGUSR1")),
    ],
    ids=["SIGTERM", "SIGUSR1", "SIGTERM everywhere", "SIGUSR1 everywhere"],
)
def test_signals(
    graph: Path, reference: Path, tmp_path: Path, cases: Cases, name: str, some: list[tuple[str, tuple[int, ...]]]
) -> None:
    def check(case: tuple[str, tuple[int, ...]]) -> None:
        place, ranks = case
        output = tmp_path / f"{place}-{len(ranks)}{ranks[0]}".replace(" ", "")
        cache = {"MMGRAPH_CACHE": str(tmp_path / f"cache-{output.name}")} if place == "build" else {}
        function, settings = SIGNAL_PLACES[place]
        faults: list[Fault] = [(function, {**settings, "action": name, "rank": rank}) for rank in ranks]
        flags = brief(graph, output, *FLAGS, "--collective_timeout=8")
        ended = run(flags, *faults, ranks=2, timeout=ENDS_WITHIN, environment=cache)
        assert None not in ended.codes and "Traceback" not in ended.said, (case, ended)
        if place in ("start", "build"):  # there is no state to write yet
            assert -getattr(signal, name) in ended.codes and 0 not in ended.codes, (case, ended)
        elif place == "last step":
            assert ended.codes == [0, 0], (case, ended)
        else:
            assert ended.codes == [143, 143], (case, ended)
            assert len(stop_lines(ended.said, valid_steps(output)[0])) == 1, (case, ended)
        assert run(brief(graph, output, *FLAGS), ranks=2, environment=cache).codes == [0, 0]
        check_same(output, reference)

    cases(each(some, check))


def launch_with_faults(*flags: str, faults: list[Fault], within: float) -> subprocess.CompletedProcess[str]:
    """Launch two ranks with ``accelerate launch`` and faults.

    Check that they end within ``within`` seconds, and that no process is left 5 s later.

    Args:
        faults: faults to inject. Their setting ``rank`` is a string.
    """
    command = launch_command("cpu_2proc.yaml")[:-1]
    script = str(Path(__file__).parent / "launched.py")
    environment = {**os.environ, "FAULTS": json.dumps(faults), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, script, *flags], env=environment, capture_output=True, text=True, timeout=within)
    for _ in range(50):
        left = [process for process in psutil.process_iter() if script in _command(process)]
        if not left:
            return done
        time.sleep(0.1)
    raise AssertionError(f"left behind: {left}")


def _command(process: psutil.Process) -> list[str]:
    try:
        return process.cmdline()
    except psutil.Error:
        return []


@pytest.mark.slow
@pytest.mark.fault(
    "accelerate launch: a rank killed in a step or a save, or hanging: all ranks end, and the message names it"
)
def test_real_launches(graph: Path, reference: Path, tmp_path: Path, cases: Cases) -> None:
    consolidating = {"target": targets.CONSOLIDATE, "number": 3}
    in_a_save = {"inside": [targets.WRITE_STATE], "number": 9, "action": "SIGKILL", "rank": "0"}
    kills: list[tuple[str, Fault]] = [
        ("0", ("after_step", {"step": 6, "action": "SIGKILL", "rank": "0"})),
        ("1", ("after_step", {"step": 6, "action": "SIGKILL", "rank": "1"})),
        ("0", ("at_file_call", in_a_save)),
        ("1", ("at_call", {**consolidating, "action": "SIGKILL", "rank": "1"})),
    ]  # fmt: skip
    for number, (rank, fault) in enumerate(kills):
        output = tmp_path / f"{number}"
        done = launch_with_faults(*brief(graph, output, *FLAGS), faults=[fault], within=40)
        assert done.returncode == 1 and "exitcode  : -9" in done.stderr and f"rank      : {rank}" in done.stderr
        assert PACKAGE not in done.stderr  # no traceback from this package
        assert run(brief(graph, output, *FLAGS), ranks=2).codes == [0, 0]
        check_same(output, reference)
    output = tmp_path / "asleep"
    fault = ("after_step", {"step": 6, "action": "sleep", "rank": "1"})
    done = launch_with_faults(*brief(graph, output, *FLAGS, "--collective_timeout=4"), faults=[fault], within=60)
    assert done.returncode == 1 and line_with(done.stderr, "mmgraph: error:", "rank 0", "--collective_timeout")
    assert run(brief(graph, output, *FLAGS), ranks=2).codes == [0, 0]
    check_same(output, reference)
    cases(len(kills) + 1)
