"""Runs of launch.py with injected faults, and comparisons with a run without faults."""

import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from conftest import read_metrics
from launches import PARALLEL_RUNS, SCRIPT, Ended, Fault, run_warm

from mmgraph.checkpoints.resume_state import read_record, state_folders
from mmgraph.errors import UserError

Case = TypeVar("Case")
STEPS, SAVE_EVERY = 12, 3  # of the runs of brief(); 4 steps per epoch


def brief(graph: Path, output: Path, *more: str) -> list[str]:
    """Return the flags of a run of 12 steps in three epochs that saves every 3 steps."""
    return [
        f"--nodes={graph / 'nodes.csv'}", f"--edges={graph / 'edges.csv'}", f"--model_name={graph / 'towers'}",
        f"--output_dir={output}", "--fused_dim=16", "--proj_dim=8", "--batch_size=48", "--num_workers=0",
        "--learning_rate=1e-3", f"--max_steps={STEPS}", f"--save_every={SAVE_EVERY}", "--report_to=none", "--no_report",
        *more,
    ]  # fmt: skip


def run(
    arguments: list[str],
    *faults: Fault,
    ranks: int = 1,
    timeout: float = 120,
    environment: dict[str, str] | None = None,
) -> Ended:
    """Run launch.py with faults in warm processes, one for each rank."""
    config = "cpu.yaml" if ranks == 1 else f"cpu_2proc.yaml --num_processes {ranks}"
    return run_warm([SCRIPT, *arguments], config, faults, timeout=timeout, no_launcher=True, **(environment or {}))


def each(cases: Iterable[Case], check: Callable[[Case], object]) -> int:
    """Check all cases, ``PARALLEL_RUNS`` at a time, and return their number. Raises the error of the first failure."""
    with ThreadPoolExecutor(PARALLEL_RUNS) as threads:
        return len(list(threads.map(check, cases)))


def count(graph: Path, folder: Path, inside: list[str], *more: str, **environment: str) -> int:
    """Return how many calls that change files a complete run makes inside some functions."""
    calls = folder / "calls"
    fault = ("at_file_call", {"inside": inside, "number": 0, "action": "SIGKILL", "told": str(calls)})
    assert run(brief(graph, folder / "counted", *more), fault, environment=environment).code == 0
    return len(calls.read_text().splitlines())


def valid_steps(output: Path) -> list[int]:
    """Return the steps of a run's valid states, the newest first."""
    steps = []
    for path in state_folders(output / "state"):
        with suppress(UserError):
            steps.append(read_record(path)["step"])
    return steps


def check_same(output: Path, reference: Path, was_done: bool = False) -> None:
    """Check that a run left the same files as ``reference``, a run without faults.

    Each step must have one row, in order, with equal losses, norms and learning rates. Checkpoints and the newest state
    must be equal to the bit. There must be no temporary files.

    Args:
        was_done: the fault came after the last state, so that no later save removed older states or temporary files.
    """
    rows, expected = ([steady(row) for row in read_metrics(folder)] for folder in (output, reference))
    assert rows == expected
    names, expected = (sorted(path.name for path in (folder / "state").iterdir()) for folder in (output, reference))
    assert names[-1] == expected[-1] and (was_done or len(names) == len(expected)), (names, expected)
    names, expected = (
        sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (output, reference)
    )
    assert was_done or names == expected, (names, expected)
    for path in (reference / "checkpoints").iterdir():
        assert (output / "checkpoints" / path.name).read_bytes() == path.read_bytes(), path.name
    for path in sorted((reference / "state").iterdir())[-1].glob("*.safetensors"):
        assert (output / "state" / path.parent.name / path.name).read_bytes() == path.read_bytes(), path
    hidden = [str(path) for path in output.rglob(".*") if path.name not in (".lock",)]
    assert was_done or not hidden


def steady(row: dict[str, Any]) -> dict[str, Any]:
    """Return a row of ``metrics.jsonl`` without times and memory, which differ from run to run."""
    measured = ("edges_per_s", "data_wait", "peak_memory")
    return {name: value for name, value in row.items() if not name.startswith(measured)}


def check_log(before: str, after: str, step: int) -> None:
    """Check that the log only grew, and that it names the state of the resume (none if the run started again)."""
    assert after.startswith(before)
    resumed = re.findall(r"step (\d+) .*/state/step-(\d{8})\b", after[len(before) :])
    assert [tuple(map(int, steps)) for steps in resumed] == [(step, step)] * (step > 0)
