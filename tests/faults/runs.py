"""Runs of launch.py with faults in them, and what a run that went through one must be equal to."""

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
STEPS, SAVE_EVERY = 12, 3  # of `brief` runs; 4 steps an epoch


def brief(graph: Path, output: Path, *more: str) -> list[str]:
    """Flags of a run of 12 steps in three epochs, with a state every 3 steps; without towers to run."""
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
    """Run launch.py with faults in warm processes, one per rank."""
    config = "cpu.yaml" if ranks == 1 else f"cpu_2proc.yaml --num_processes {ranks}"
    return run_warm([SCRIPT, *arguments], config, faults, timeout=timeout, no_launcher=True, **(environment or {}))


def each(cases: Iterable[Case], check: Callable[[Case], object]) -> int:
    """Check all cases, as many at once as there are cores. Returns how many there were; the first failure is raised."""
    with ThreadPoolExecutor(PARALLEL_RUNS) as threads:
        return len(list(threads.map(check, cases)))


def count(graph: Path, folder: Path, inside: list[str], *more: str, **environment: str) -> int:
    """How many calls that change files a whole run makes in the functions ``inside``."""
    told = folder / "calls"
    fault = ("at_file_call", {"inside": inside, "number": 0, "action": "SIGKILL", "told": str(told)})
    assert run(brief(graph, folder / "counted", *more), fault, environment=environment).code == 0
    return len(told.read_text().splitlines())


def valid_steps(output: Path) -> list[int]:
    """The steps of a run's valid states, the newest first."""
    steps = []
    for path in state_folders(output / "state"):
        with suppress(UserError):
            steps.append(read_record(path)["step"])
    return steps


def check_same(output: Path, reference: Path, was_done: bool = False) -> None:
    """Insist that a run left what ``reference``, which nothing happened to, has left: equal to the bit.

    Every step once, in order, with the same losses, norms and rates; the same files of the original's format, the same
    newest state; and no temporary files.

    Args:
        was_done: the fault came after the last state: there was nothing to go on with, and no later save to sweep up.
    """
    rows, expected = ([steady(row) for row in read_metrics(folder)] for folder in (output, reference))
    assert rows == expected
    found, expected = (sorted(path.name for path in (folder / "state").iterdir()) for folder in (output, reference))
    assert found[-1] == expected[-1] and (was_done or len(found) == len(expected)), (found, expected)
    found, expected = (
        sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (output, reference)
    )
    assert was_done or found == expected, (found, expected)
    for path in (reference / "checkpoints").iterdir():
        assert (output / "checkpoints" / path.name).read_bytes() == path.read_bytes(), path.name
    for path in sorted((reference / "state").iterdir())[-1].glob("*.safetensors"):
        assert (output / "state" / path.parent.name / path.name).read_bytes() == path.read_bytes(), path
    hidden = [str(path) for path in output.rglob(".*") if path.name not in (".lock",)]
    assert was_done or not hidden


def steady(row: dict[str, Any]) -> dict[str, Any]:
    """What of a row of ``metrics.jsonl`` does not depend on the machine's mood."""
    moody = ("edges_per_s", "data_wait", "peak_memory")
    return {name: value for name, value in row.items() if not name.startswith(moody)}


def check_log(before: str, after: str, step: int) -> None:
    """Insist that the log only grew, and says where the run went on (nothing, where it began anew)."""
    assert after.startswith(before)
    went_on = re.findall(r"step (\d+) .*/state/step-(\d{8})\b", after[len(before) :])
    assert [tuple(map(int, found)) for found in went_on] == [(step, step)] * (step > 0)
