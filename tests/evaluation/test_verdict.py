"""The verdict on a run, and the graph loss at chance: in the log, in the report and in the rows of a run."""

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from accelerate import Accelerator
from bokeh.document import Document
from conftest import line_with, lines_with, newest, read_metrics, settings, write_pending_log

from mmgraph.checkpoints.progress import Progress
from mmgraph.cli import train_main
from mmgraph.config import Config
from mmgraph.evaluation.verdict import judge, mrr_at_start
from mmgraph.report.charts import Chart, curves
from mmgraph.report.history import read_run
from mmgraph.report.page import Shown, page
from mmgraph.training.run_log import RunLog

BASELINES = {"text_only": 0.2, "image_only": 0.1, "concat": 0.3, "random": 0.04}
BATCH = 12


def table(mrr: float, baselines: dict[str, float] | None = None) -> dict[str, Any]:
    """Return an evaluation. Its ``fused`` is no baseline."""
    values = {"z_graph": mrr, "fused": 0.9, **(BASELINES if baselines is None else baselines)}
    return {"embeddings": {name: {"mrr": value, "hits@1": 0.0} for name, value in values.items()}}


class TestJudge:
    def test_better(self) -> None:
        """The text has the ratio to each value, and the value."""
        verdict = judge(table(0.6), {"z_graph": 0.05, **BASELINES})
        assert verdict.mrr == 0.6 and verdict.others == {"before training": 0.05, **BASELINES}
        assert verdict.not_beaten == []
        for name, ratio, value in (
            ("before training", "12.00", "0.0500"), ("text_only", "3.00", "0.2000"), ("image_only", "6.00", "0.1000"),
            ("concat", "2.00", "0.3000"), ("random", "15.00", "0.0400"),
        ):  # fmt: skip
            assert lines_with(str(verdict), "z_graph", "0.6000", ratio, name, value)
        assert "not better" not in str(verdict)

    @pytest.mark.parametrize(
        ("mrr", "before", "not_beaten"),
        [
            (0.25, 0.05, ["concat"]),
            (0.25, 0.26, ["before training", "concat"]),
            (0.03, 0.02, ["text_only", "image_only", "concat", "random"]),
            (0.3, 0.05, ["concat"]),  # equal is not better
            (0.31, 0.31, ["before training"]),
        ],
    )
    def test_not_better(self, mrr: float, before: float, not_beaten: list[str]) -> None:
        verdict = judge(table(mrr), {"z_graph": before, **BASELINES})
        assert verdict.not_beaten == not_beaten
        assert str(verdict).endswith(f"not better than {', '.join(not_beaten)}")

    def test_without_an_evaluation_at_step_0(self) -> None:
        verdict = judge(table(0.6), None)
        assert verdict.others == BASELINES and "before training" not in str(verdict)

    @pytest.mark.parametrize(
        "other", [{**BASELINES, "random": 0.041}, {**BASELINES, "text_only": 0.1}, {"concat": 0.3}]
    )
    def test_step_0_on_other_held_out_edges_is_left_out(self, other: dict[str, float]) -> None:
        """Training does not change a baseline, so another value was measured on other edges."""
        assert judge(table(0.6), {"z_graph": 0.9, **other}).others == BASELINES
        rounded = {name: value * (1 + 1e-12) for name, value in BASELINES.items()}  # summed in another order
        assert judge(table(0.6), {"z_graph": 0.9, **rounded}).not_beaten == ["before training"]

    def test_an_mrr_of_zero_has_no_ratio(self) -> None:
        zero = {**BASELINES, "random": 0.0}
        verdict = judge(table(0.6, zero), {"z_graph": 0.0, **zero})
        assert verdict.not_beaten == [] and "random" not in str(verdict) and "before training" not in str(verdict)
        assert judge(table(0.0, zero), {"z_graph": 0.0, **zero}).not_beaten == ["before training", *zero]

    def test_some_baselines(self) -> None:
        some = {"concat": 0.3, "random": 0.04}
        assert judge(table(0.6, some), {"z_graph": 0.05, **some}).others == {"before training": 0.05, **some}


def test_mrr_at_start_is_in_the_first_row(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    row = {"step": 0, "epoch": 1, "eval/z_graph/mrr": 0.1, "eval/fused/mrr": 0.3, "eval/concat/mrr": 0.2}
    later = json.dumps({"step": 1, "loss": 2.0})
    path.write_text(f"{json.dumps(row)}\n{later}\n")
    assert mrr_at_start(path) == {"z_graph": 0.1, "concat": 0.2}
    assert mrr_at_start(tmp_path / "none.jsonl") is None
    others = [{"step": 0}, {**row, "step": 5}, {**row, "eval/z_graph/mrr": None}]
    for text in (later, "", "{", "[1]", "null", *map(json.dumps, others)):
        path.write_text(text)
        assert mrr_at_start(path) is None, text
    path.write_bytes(b"\xff\n")
    assert mrr_at_start(path) is None


@pytest.fixture(scope="module")
def better(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch on twelve pairs of nodes, whose edges are also the edges to rank."""
    folder = tmp_path_factory.mktemp("better")
    pairs = pd.DataFrame([(f"{i:03d}", f"{i + 12:03d}") for i in range(12)] * 16, columns=["src_id", "dst_id"])
    pairs.to_csv(folder / "edges.csv", index=False)
    pairs[:12].to_csv(folder / "eval.csv", index=False)
    tables = [f"--edges={folder / 'edges.csv'}", f"--eval_edges={folder / 'eval.csv'}", "--epochs=1"]
    assert train_main(settings(graph, folder / "run", *tables, "--false_negatives=mask_neighbors")) == 0
    return folder / "run"


@pytest.fixture(scope="module")
def edges(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """The flags of a table with four steps per epoch and of edges to rank, and a learning rate that changes nothing."""
    folder = tmp_path_factory.mktemp("edges")
    table = pd.read_csv(graph / "edges.csv", dtype=str)
    table[: 4 * BATCH].to_csv(folder / "edges.csv", index=False)
    table[48:60].to_csv(folder / "eval.csv", index=False)
    return [f"--edges={folder / 'edges.csv'}", f"--eval_edges={folder / 'eval.csv'}", "--learning_rate=1e-9"]


@pytest.fixture(scope="module")
def untrained(graph: Path, edges: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one epoch that changes the weights by nearly nothing."""
    output = tmp_path_factory.mktemp("untrained") / "run"
    assert train_main(settings(graph, output, *edges, "--epochs=1")) == 0
    return output


@pytest.fixture(scope="module")
def masked(graph: Path, edges: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same run, with neighbors masked in the graph loss."""
    output = tmp_path_factory.mktemp("masked") / "run"
    assert train_main(settings(graph, output, *edges, "--epochs=1", "--false_negatives=mask_neighbors")) == 0
    return output


def log_of(run: Path) -> str:
    return (run / "training_log.txt").read_text()


def mrr(run: Path, step: int, name: str) -> float:
    [value] = [row[f"eval/{name}/mrr"] for row in read_metrics(run) if row["step"] == step]
    return value


def test_a_run_that_is_not_better_has_a_warning(untrained: Path) -> None:
    """The log does not recommend to write the embeddings."""
    line = line_with(log_of(untrained), "verdict:", f"{mrr(untrained, 4, 'z_graph'):.4f}")
    assert line.startswith("warning: verdict: ")
    assert lines_with(line, "not better than", "before training", "random")
    assert f"before training ({mrr(untrained, 0, 'z_graph'):.4f})" in line
    for name in BASELINES:
        assert f"{name} ({mrr(untrained, 4, name):.4f})" in line
    assert line_with(log_of(untrained), "done:", "multimodal_encoder_final.pt")
    assert "mmgraph encode" not in log_of(untrained)


def test_a_better_run_has_a_verdict_without_a_warning(better: Path) -> None:
    before, after = mrr(better, 0, "z_graph"), mrr(better, 16, "z_graph")
    assert after > max(before, *(mrr(better, 16, name) for name in BASELINES))
    line = line_with(log_of(better), "verdict:", f"{after:.4f}")
    assert line.startswith("verdict: ") and "not better" not in line
    assert f"{after / before:.2f} times before training ({before:.4f})" in line
    assert f"mmgraph encode {better}" in line_with(log_of(better), "done:", "multimodal_encoder_final.pt")


def test_the_report_has_the_verdict_of_the_log(better: Path, untrained: Path) -> None:
    """Without step 0, the verdict has only the baselines. With step 0 only, or without z_graph, there is none."""
    run, other = read_run(better), read_run(untrained)
    assert run.table is not None
    later = {name: values[1:] for name, values in run.evaluations.items()}
    only = {name: {"only": run.table[name]["fused"]} for name in ("embeddings", "sampled")}
    tables = (None, {**run.table, "step": 0}, {**run.table, **only, "relations": {}})
    runs = [run, other, run._replace(evaluations=later), *(run._replace(table=table) for table in tables)]
    text = page([Shown(run._replace(name=f"run {number}"), None, "no map") for number, run in enumerate(runs)])
    notes = re.findall(r'<p class="note">Verdict at step (\d+): (.*?)\.</p>', text)
    assert [step for step, _ in notes] == ["16", "4", "16"] and text.count("Verdict at") == 3
    for run_folder, (_, note) in zip((better, untrained), notes, strict=False):
        assert line_with(log_of(run_folder), "verdict:").partition("verdict: ")[2].startswith(note)
    assert "before training" not in notes[2][1] and "better than each of them" in notes[2][1]


def chance_warnings(run: Path) -> list[str]:
    return lines_with(log_of(run), "warning: the mean graph loss of epoch")


def test_a_graph_loss_at_chance_has_a_warning(untrained: Path) -> None:
    """Without masks, chance is ln(batch size), and the rows do not repeat it."""
    losses = [row["loss_graph"] for row in read_metrics(untrained) if "loss" in row]
    assert len(losses) == 4 and np.mean(losses) > 0.98 * math.log(BATCH)
    [line] = chance_warnings(untrained)
    assert lines_with(line, "epoch 1", f"{np.mean(losses):.4f}", f"{math.log(BATCH):.4f}")
    assert not any("chance_graph" in row for row in read_metrics(untrained))


@pytest.mark.parametrize(
    ("weight", "loss", "chance", "warns"),
    [
        (1.0, 2.0, 2.0, True),
        (1.0, 1.961, 2.0, True),
        (1.0, 1.959, 2.0, False),
        (1.0, 3.0, 2.0, True),
        (0.0, 2.0, 2.0, False),  # the graph loss is not trained
        (1.0, 0.0, 0.0, False),  # all candidates are masked, or the batch has one edge
        (1.0, math.nan, 2.0, False),  # all steps were skipped
    ],
)
def test_the_margin_of_chance_is_two_percent(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], weight: float, loss: float, chance: float, warns: bool
) -> None:
    run_log = RunLog(Config(graph_loss_weight=weight), Accelerator(cpu=True), Progress(), None, 4)
    run_log.epoch(1, {"loss": 5.0, "loss_mm": 3.0, "loss_graph": loss}, 4, chance)
    assert bool(lines_with(capsys.readouterr().out, "warning:", "epoch 1")) == warns
    write_pending_log(tmp_path / "log.txt")


def test_a_graph_loss_below_chance_has_no_warning(better: Path) -> None:
    rows = [row for row in read_metrics(better) if "loss" in row]
    means = [np.mean([row[name] for row in rows]) for name in ("loss_graph", "chance_graph")]
    assert len(rows) == 16 and means[0] < 0.9 * means[1] and not chance_warnings(better)
    assert line_with(log_of(better), "epoch 1/1 done:", f"{means[0]:.4f}")


def chance_of(run: Path) -> list[float]:
    return [row["chance_graph"] for row in read_metrics(run) if "loss" in row]


def test_masked_candidates_lower_the_chance_of_the_warning(masked: Path) -> None:
    """The warning has the mean over the epoch's steps."""
    chance = chance_of(masked)
    assert len({*chance}) == 4 and max(chance) < math.log(BATCH)
    losses = [row["loss_graph"] for row in read_metrics(masked) if "loss" in row]
    [line] = chance_warnings(masked)
    assert lines_with(line, f"{np.mean(losses):.4f}", f"{np.mean(chance):.4f}")


def test_a_state_without_chance_is_not_mixed(graph: Path, edges: list[str], masked: Path, tmp_path: Path) -> None:
    """The first steps of the epoch were summed by an older version, so the warning has ln(batch size)."""
    flags = settings(graph, tmp_path / "run", *edges, "--false_negatives=mask_neighbors")
    assert train_main([*flags, "--max_steps=2"]) == 0
    file = newest(tmp_path / "run") / "state.json"
    record = json.loads(file.read_text())
    del record["epoch_sums"]["chance_graph"], record["sha256"]["state.json"]
    assert record["epoch_sums"]["steps"] == 2
    file.write_text(json.dumps(record, indent=1))
    assert train_main([*flags, "--max_steps=6"]) == 0
    assert chance_of(tmp_path / "run")[:4] == chance_of(masked)
    [line] = chance_warnings(tmp_path / "run")
    assert lines_with(line, "epoch 1", f"{math.log(BATCH):.4f}")


def test_epoch_sums_have_only_losses_of_all_steps() -> None:
    progress = Progress(epoch_sums={"loss": 3.0, "loss_graph": 2.0, "steps": 2})
    progress.add_losses({"loss": 1.0, "loss_graph": 0.5, "chance_graph": 2.0})
    assert progress.epoch_sums == {"loss": 4.0, "loss_graph": 2.5, "steps": 3}
    progress.begin_epoch()
    for _ in range(2):
        progress.add_losses({"loss": 1.0, "loss_graph": 0.5, "chance_graph": 2.0})
    assert progress.epoch_sums == {"loss": 2.0, "loss_graph": 1.0, "chance_graph": 4.0, "steps": 2}


def lines_of(charts: list[Chart], key: str) -> dict[str, tuple[list[float], list[float], bool]]:
    """Return the lines of a chart by name: their steps, values, and whether they are dashed."""
    [item] = [json.loads(chart.item) for chart in charts if chart.key == key]
    [plot] = Document.from_json(item["doc"]).roots
    return {
        line.name: (
            np.asarray(line.data_source.data["step"]).tolist(),
            np.asarray(line.data_source.data["value"]).tolist(),
            bool(line.glyph.line_dash),
        )
        for line in plot.renderers
        if line.name
    }


def test_chance_is_a_dashed_line_of_the_graph_loss(untrained: Path, masked: Path, better: Path) -> None:
    """Without masks it is ln(batch size). It is in no other chart."""
    runs = [read_run(run)._replace(name=name) for run, name in ((untrained, "u"), (masked, "m"), (better, "b"))]
    charts, _ = curves(runs)
    lines = lines_of(charts, "loss_graph")
    assert list(lines) == ["u", "u: chance", "m", "m: chance", "b", "b: chance"]
    assert [dashed for *_, dashed in lines.values()] == [False, True] * 3
    assert lines["u: chance"][:2] == ([1, 2, 3, 4], [math.log(BATCH)] * 4)
    assert lines["m: chance"][:2] == ([1, 2, 3, 4], chance_of(masked))
    assert lines["b: chance"][1] == chance_of(better)
    assert list(lines_of(charts, "loss")) == list(lines_of(charts, "loss_mm")) == ["u", "m", "b"]


def test_chance_of_a_run_whose_settings_do_not_tell_it(untrained: Path) -> None:
    run = read_run(untrained)
    settings = {name: value for name, value in run.settings.items() if name != "global_batch_size"}
    charts, _ = curves([run._replace(settings=settings)])
    assert list(lines_of(charts, "loss_graph")) == ["run"]
    steps = {**run.steps, "chance_graph": np.array([np.nan, 1.5, np.nan, 2.0])}
    charts, _ = curves([run._replace(steps=steps)])
    assert lines_of(charts, "loss_graph")["run: chance"][1] == [math.log(BATCH), 1.5, math.log(BATCH), 2.0]
