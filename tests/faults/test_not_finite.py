"""NaN and infinity in a loss or gradient on one rank: no rank applies the update, and the edges are recorded."""

import itertools
import json
import re
import signal
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
from conftest import error_of, lines_with, read_metrics
from launches import REPOSITORY
from runs import Fault, brief, check_same, each, run, steady

from mmgraph.checkpoints.resume_state import read_record
from mmgraph.data.sampler import GlobalBatchSampler

Cases = Callable[[int], None]
STEP = 6  # the second step of the second epoch


def zero(stage: int, precision: str) -> dict[str, str]:
    """Return the environment of a launch with ZeRO."""
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(REPOSITORY / f"ds_configs/zero{stage}.json"),
        "ACCELERATE_MIXED_PRECISION": precision,
    }


SCALED = "fp16, scaled"  # with a loss scaler, as on a GPU
PRECISIONS = {name: {"ACCELERATE_MIXED_PRECISION": name} for name in ("no", "bf16", "fp16")}
PRECISIONS[SCALED] = PRECISIONS["fp16"]
ZERO = {f"ZeRO-{stage} {precision}": zero(stage, precision) for stage in (1, 2, 3) for precision in ("no", "bf16")}
LAUNCHES = PRECISIONS | ZERO
CORE = {"no": 5, SCALED: 5}  # launch: n, if every n-th of its cases is tried


def fault(what: str, value: str, rank: int) -> Fault:
    """Return the fault that makes the loss or gradient of step ``STEP`` nan or inf on a rank."""
    return "not_finite", {"step": STEP, "what": what, "value": value, "rank": rank}


def batch_of(graph: Path, step: int) -> list[list[str]]:
    """Return the node ids of the edges in the global batch of a step of a run with the flags of ``brief``."""
    edges = pd.read_csv(graph / "edges.csv", dtype=str)
    sampler = GlobalBatchSampler(len(edges), 48, 42)
    epoch, index = divmod(step - 1, len(sampler))
    sampler.begin(epoch + 1)
    return edges.iloc[list(sampler)[index]][["src_id", "dst_id"]].to_numpy().tolist()


@pytest.mark.fault(
    "NaN or infinity in a loss or gradient on one rank, in a run of one or two: the run ends, or skips the step"
)
@pytest.mark.parametrize(
    ("launch", "every"),
    [*CORE.items(), *(pytest.param(name, 1, marks=pytest.mark.slow) for name in LAUNCHES)],
)
def test_no_rank_applies_the_update(graph: Path, tmp_path: Path, cases: Cases, launch: str, every: int) -> None:
    environment = LAUNCHES[launch]
    # what is not finite, its value, (number of ranks, rank of the fault)
    faults = list(itertools.product(("loss", "gradient"), ("nan", "inf"), ((1, 0), (2, 0), (2, 1))))
    faults = [case for case in faults if case[2][0] == 2 or launch in PRECISIONS]
    if launch not in PRECISIONS:
        faults = [faults[0], faults[-1]]  # only two, because each run imports DeepSpeed

    def check(case: tuple[str, str, tuple[int, int]]) -> None:
        what, value, (ranks, rank) = case
        output = tmp_path / f"{what}-{value}-{ranks}-{rank}"
        flags = brief(graph, output, "--save_every=1", "--keep_last=99")
        scaler: list[Fault] = [("loss_scaler", {})] if launch == SCALED else []
        finding_scale = launch == SCALED and what == "gradient"  # the scaler skips such a step to lower its loss scale
        if not finding_scale:
            ended = run(flags, fault(what, value, rank), *scaler, ranks=ranks, environment=environment)
            assert ended.codes == [1] * ranks, ended.said
            assert "Traceback" not in ended.said, ended.said
            errors = [line for line in ended.said.splitlines() if line.startswith("mmgraph: error: ")]
            named = [f"rank {rank}"] if ranks > 1 and what == "loss" else []
            for line in errors:  # one line from each rank
                line = line.removeprefix("mmgraph: error: ").removeprefix("rank 1: ")
                assert lines_with(line, "step 6", what, *named, "not_finite.jsonl"), line
                assert named == re.findall(r"rank \d", line), line
            assert len(errors) == ranks, ended.said
            [entry] = [json.loads(line) for line in (output / "not_finite.jsonl").read_text().splitlines()]
            assert entry["edges"] == batch_of(graph, STEP) and entry["step"] == STEP
            assert entry["ranks"] == ([rank] if what == "loss" else [])
            assert [row["step"] for row in read_metrics(output)] == [1, 2, 3, 4, 5]
            assert sorted(path.name for path in (output / "state").iterdir())[-1] == "step-00000005"
        limit = "--max_skipped_steps=1"
        ended = run([*flags, limit], fault(what, value, rank), *scaler, ranks=ranks, environment=environment)
        assert ended.codes == [0] * ranks, ended.said
        before, after = (output / "state" / f"step-{step:08d}" for step in (STEP - 1, STEP))
        for name in ("trainable.safetensors", "optimizer.safetensors"):
            assert (before / name).read_bytes() == (after / name).read_bytes(), name
        rows = {row["step"]: row for row in read_metrics(output)}
        assert rows[STEP]["skipped"] and rows[STEP]["grad_norm"] is None and list(rows) == list(range(1, 13))
        assert (rows[STEP]["loss"] is None) == (what == "loss")
        assert all(rows[step]["loss"] is not None for step in rows if step != STEP)
        assert read_record(after)["components"].get("not_finite_steps") == (None if finding_scale else 1)

    cases(each(faults[::every], check))


@pytest.mark.fault("a run killed after it skipped a step: resumes with the same result")
def test_skipped_steps_are_counted_across_resumes(graph: Path, tmp_path: Path) -> None:
    flags, bad = ("--max_skipped_steps=1", "--save_every=1"), fault("loss", "nan", 0)
    reference, output = tmp_path / "whole", tmp_path / "run"
    assert run(brief(graph, reference, *flags), bad).code == 0
    kill = ("after_step", {"step": STEP + 2, "action": "SIGKILL"})
    assert run(brief(graph, output, *flags), bad, kill).code == -signal.SIGKILL
    assert run(brief(graph, output, *flags)).code == 0
    check_same(output, reference)
    again = fault("gradient", "inf", 0)
    again[1]["step"] = 13
    ended = run(brief(graph, output, *flags, "--max_steps=14"), again)
    assert ended.code == 1 and error_of(ended.said, "step 13", "gradient", "not_finite.jsonl", "--max_skipped_steps 2")


@pytest.mark.fault("gradients that overflow fp16 at every loss scale: the run ends instead of scaling down forever")
def test_gradients_that_overflow_at_every_loss_scale(graph: Path, tmp_path: Path) -> None:
    every_step = [("not_finite", {"step": step, "what": "gradient", "value": "inf"}) for step in range(1, 40)]
    ended = run(
        brief(graph, tmp_path / "run", "--max_steps=40"),
        *every_step,
        ("loss_scaler", {}),
        environment=PRECISIONS["fp16"],
    )
    rows = [steady(row) for row in read_metrics(tmp_path / "run")]
    assert ended.code == 1 and error_of(ended.said, f"step {len(rows) + 1}", "gradient", "not_finite.jsonl")
    assert 10 < len(rows) < 30 and all(row["skipped"] for row in rows)
