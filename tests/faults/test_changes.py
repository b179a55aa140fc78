"""Resume with another number of ranks, workers or caches: the same edges in each step, and losses within 1e-5."""

import itertools
import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import LOSSES, read_metrics
from runs import STEPS, Fault, brief, check_same, each, run

Cases = Callable[[int], None]
LAUNCHES: dict[str, tuple[int, list[str]]] = {  # ranks, flags
    "1 rank, stored": (1, []),
    "2 ranks, stored": (2, []),
    "3 ranks, live": (3, ["--tower_cache=off"]),
    "1 rank, live, 2 workers": (1, ["--tower_cache=off", "--num_workers=2", "--cache_size=4", "--image_cache_gb=0"]),
    "2 ranks, in micro batches": (2, ["--micro_batch_size=5"]),
}
PAIRS = list(itertools.permutations(LAUNCHES, 2))
# Each launch is once the first and once the second of a pair.
CORE = list(zip(LAUNCHES, [*LAUNCHES][1:] + [*LAUNCHES][:1], strict=True))
BOUND = 1e-5  # of the losses, in float32


def recording(folder: Path) -> Fault:
    """Create ``folder``, and return the fault that writes the edges of each step to it."""
    folder.mkdir(exist_ok=True)
    return "note_edges", {"folder": str(folder)}


def edges_by_step(folder: Path) -> dict[int, list[int]]:
    """Return the sorted edges of each step over all ranks. Check that each step has 48 different edges."""
    edges: dict[int, list[int]] = {}
    for path in folder.iterdir():
        for line in path.read_text().splitlines():
            step, rank_edges = json.loads(line)
            edges.setdefault(step, []).extend(rank_edges)
    assert all(len(set(of_step)) == len(of_step) == 48 for of_step in edges.values())
    return {step: sorted(of_step) for step, of_step in edges.items()}


@pytest.mark.fault(
    "world size, workers, store, caches or micro batches changed on resume: the same edges, losses within 1e-5"
)
@pytest.mark.parametrize("some", [CORE[::2], pytest.param(PAIRS, marks=pytest.mark.slow)], ids=["core", "all"])
def test_changed_on_resume(graph: Path, tmp_path: Path, cases: Cases, some: list[tuple[str, str]]) -> None:
    reference = tmp_path / "whole"
    assert run(brief(graph, reference), recording(tmp_path / "edges")).code == 0
    expected, rows = edges_by_step(tmp_path / "edges"), read_metrics(reference)
    assert sorted(expected) == list(range(1, STEPS + 1))

    def check(pair: tuple[str, str]) -> None:
        output, (first, second) = tmp_path / " to ".join(pair), (LAUNCHES[name] for name in pair)
        folder = tmp_path / f"edges of {output.name}"
        kill = ("after_step", {"step": 7, "action": "SIGTERM"})
        assert run(brief(graph, output, *first[1]), recording(folder), kill, ranks=first[0]).codes == [143] * first[0]
        before = edges_by_step(folder)
        for path in folder.iterdir():
            path.unlink()
        assert run(brief(graph, output, *second[1]), recording(folder), ranks=second[0]).codes == [0] * second[0]
        assert before | edges_by_step(folder) == expected and not before.keys() & edges_by_step(folder).keys()
        resumed = read_metrics(output)
        assert [row["step"] for row in resumed] == list(range(1, STEPS + 1))
        for row, other in zip(resumed, rows, strict=True):
            assert max(abs(row[name] - other[name]) for name in LOSSES) < BOUND, (pair, row["step"])

    cases(each(some, check))


@pytest.mark.fault("the same launch with other workers, caches and logging: equal to the bit")
@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_flags_that_keep_results_equal(graph: Path, tmp_path: Path, cases: Cases, every: int) -> None:
    live = ["--tower_cache=off"]
    reference = tmp_path / "whole"
    assert run(brief(graph, reference, *live)).code == 0
    flags = [["--num_workers=1"], ["--num_workers=3", "--cache_size=0"], ["--image_cache_gb=0"], ["--log_every=1"],
             ["--max_skipped_steps=3", "--max_bad_images=0.9"]]  # fmt: skip

    def check(number: int) -> None:
        output = tmp_path / f"{number}"
        kill = ("after_step", {"step": 5, "action": "SIGKILL"})
        assert run(brief(graph, output, *live), kill).code == -9
        assert run(brief(graph, output, *live, *flags[number])).code == 0
        check_same(output, reference)

    cases(each(range(0, len(flags), every), check))
