"""NaN and infinity on one rank: no rank makes the update, and which edges it was is written down."""

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
STEP = 6  # the second of the second epoch


def zero(stage: int, precision: str) -> dict[str, str]:
    return {
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(REPOSITORY / f"ds_configs/zero{stage}.json"),
        "ACCELERATE_MIXED_PRECISION": precision,
    }


SCALED = "fp16, scaled"
PRECISIONS = {name: {"ACCELERATE_MIXED_PRECISION": name} for name in ("no", "bf16", "fp16")}
PRECISIONS[SCALED] = PRECISIONS["fp16"]
ZERO = {f"ZeRO-{stage} {precision}": zero(stage, precision) for stage in (1, 2, 3) for precision in ("no", "bf16")}
LAUNCHES = PRECISIONS | ZERO
CORE = {"no": 5, SCALED: 5, "ZeRO-3 no": 1}  # every which case


def fault(what: str, value: str, rank: int) -> Fault:
    return "not_finite", {"step": STEP, "what": what, "value": value, "rank": rank}


def batch_of(graph: Path, step: int) -> list[list[str]]:
    """The ids of the edges of a global batch of a brief run."""
    edges = pd.read_csv(graph / "edges.csv", dtype=str)
    sampler = GlobalBatchSampler(len(edges), 48, 42)
    epoch, place = divmod(step - 1, len(sampler))
    sampler.begin(epoch + 1)
    return edges.iloc[list(sampler)[place]][["src_id", "dst_id"]].to_numpy().tolist()


@pytest.mark.fault("NaN or infinity in a loss or gradient, on one of one or two ranks: the run ends, or skips the step")
@pytest.mark.parametrize(
    ("launch", "every"),
    [*CORE.items(), *(pytest.param(name, 1, marks=pytest.mark.slow) for name in LAUNCHES)],
)
def test_no_rank_makes_the_update(graph: Path, tmp_path: Path, cases: Cases, launch: str, every: int) -> None:
    environment = LAUNCHES[launch]
    kinds = list(itertools.product(("loss", "gradient"), ("nan", "inf"), ((1, 0), (2, 0), (2, 1))))
    kinds = [kind for kind in kinds if kind[2][0] == 2 or launch in PRECISIONS]
    if launch not in PRECISIONS:
        kinds = [kinds[0], kinds[-1]]  # each of these imports DeepSpeed

    def check(kind: tuple[str, str, tuple[int, int]]) -> None:
        what, value, (ranks, rank) = kind
        output = tmp_path / f"{what}-{value}-{ranks}-{rank}"
        flags = brief(graph, output, "--save_every=1", "--keep_last=99")
        scaler: list[Fault] = [("loss_scaler", {})] if launch == SCALED else []
        scaled = launch == SCALED and what == "gradient"  # what fp16 looks for its loss scale by
        if not scaled:
            ended = run(flags, fault(what, value, rank), *scaler, ranks=ranks, environment=environment)
            assert ended.codes == [1] * ranks, ended.said
            assert "Traceback" not in ended.said, ended.said
            errors = [line for line in ended.said.splitlines() if line.startswith("mmgraph: error: ")]
            named = [f"rank {rank}"] if ranks > 1 and what == "loss" else []
            for line in errors:  # each rank's
                line = line.removeprefix("mmgraph: error: ").removeprefix("rank 1: ")
                assert lines_with(line, "step 6", what, *named, "not_finite.jsonl"), line
                assert named == re.findall(r"rank \d", line), line
            assert len(errors) == ranks, ended.said
            [told] = [json.loads(line) for line in (output / "not_finite.jsonl").read_text().splitlines()]
            assert told["edges"] == batch_of(graph, STEP) and told["step"] == STEP
            assert told["ranks"] == ([rank] if what == "loss" else [])
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
        assert read_record(after)["components"].get("not_finite_steps") == (None if scaled else 1)

    cases(each(kinds[::every], check))


@pytest.mark.fault("a run killed after it skipped a step: resumes with the same result")
def test_left_out_steps_are_counted_over_starts(graph: Path, tmp_path: Path) -> None:
    flags, bad = ("--max_skipped_steps=1", "--save_every=1"), fault("loss", "nan", 0)
    whole, output = tmp_path / "whole", tmp_path / "run"
    assert run(brief(graph, whole, *flags), bad).code == 0
    kill = ("after_step", {"step": STEP + 2, "action": "SIGKILL"})
    assert run(brief(graph, output, *flags), bad, kill).code == -signal.SIGKILL
    assert run(brief(graph, output, *flags)).code == 0
    check_same(output, whole)
    again = fault("gradient", "inf", 0)
    again[1]["step"] = 13
    ended = run(brief(graph, output, *flags, "--max_steps=14"), again)
    assert ended.code == 1 and error_of(ended.said, "step 13", "gradient", "not_finite.jsonl", "--max_skipped_steps 2")


@pytest.mark.fault("gradients that overflow fp16 at every loss scale: the run ends instead of scaling down forever")
def test_a_loss_scale_that_leads_nowhere(graph: Path, tmp_path: Path) -> None:
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
