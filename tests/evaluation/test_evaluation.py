"""Evaluation before, during and after training, and by ``mmgraph evaluate``, on one and two processes."""

import json
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from conftest import LOSSES, newest, read_metrics, same_state, settings
from launches import REPOSITORY, SCRIPT, ZERO3, launch, run_warm
from targets import RANKS_OF_EMBEDDINGS

from mmgraph.checkpoints.progress import Progress
from mmgraph.cli import main, train_main
from mmgraph.config import Config
from mmgraph.data.adjacency import Adjacency, pair_keys
from mmgraph.data.input_rules import InputRules
from mmgraph.data.split import HeldOut
from mmgraph.evaluation.evaluator import Evaluation, derangement
from mmgraph.towers.tokens import Tokens
from mmgraph.training.early_stopping import EarlyStopping

EVALUATED = ("--eval_fraction=0.2", "--max_steps=12", "--eval_every=5", "--keep_best=z_graph/hits@10", "--save_every=6")


@pytest.fixture(scope="module")
def evaluated(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 12 steps on one process that holds out a fifth of the edges."""
    output = tmp_path_factory.mktemp("evaluated") / "run"
    launch("cpu.yaml", *settings(graph, output, *EVALUATED))
    return output


def evaluations(output: Path) -> dict[int, dict[str, float]]:
    """Return the evaluation metrics of a run, by step."""
    by_step = {}
    for row in read_metrics(output):
        values = {name: value for name, value in row.items() if name.startswith("eval")}
        by_step |= {int(row["step"]): values} if values else {}
    return by_step


def starts(output: Path) -> list[int]:
    """Return the step from which each launch of a run started."""
    return [start["from_step"] for start in json.loads((output / "environment.json").read_text())]


def test_evaluation_before_during_and_after_training(evaluated: Path) -> None:
    rows = read_metrics(evaluated)
    assert [row["step"] for row in rows] == list(range(13)) and "loss" not in rows[0]
    by_step = evaluations(evaluated)
    assert list(by_step) == [0, 5, 10, 12] and all(values.keys() == by_step[0].keys() for values in by_step.values())
    fixed = [name for name in by_step[0] if name.split("/")[1] in ("text_only", "image_only", "concat", "random")]
    assert len(fixed) == 2 * 4 * 4 and all(
        by_step[step][name] == by_step[0][name] for step in by_step for name in fixed
    )
    assert by_step[12]["eval/z_graph/mrr"] != by_step[0]["eval/z_graph/mrr"]
    log = (evaluated / "training_log.txt").read_text().splitlines()
    logged = [line for line in log if all(name in line for name in ("z_graph", "fused", "random"))]
    for line, (step, values) in zip(logged, by_step.items(), strict=True):
        assert re.search(rf"\b{step}\b.* {values['eval/z_graph/mrr']:.4f}\b", line)
    last = json.loads((evaluated / "evaluation.json").read_text())
    assert last["step"] == 12 and last["embeddings"]["fused"]["hits@3"] == by_step[12]["eval/fused/hits@3"]
    best = max(by_step, key=lambda step: (by_step[step]["eval/z_graph/hits@10"], -step))
    state = json.loads(sorted((evaluated / "state").glob("step-*"))[-1].joinpath("state.json").read_text())
    assert state["components"]["best"]["step"] == best


def test_two_processes_match_one(graph: Path, evaluated: Path, tmp_path: Path) -> None:
    """Equal weights have exactly equal metrics: before the first step, and when ``evaluate`` ranks one checkpoint.

    After training, weights and metrics may differ slightly.
    """
    launch("cpu_2proc.yaml", *settings(graph, tmp_path / "two", *EVALUATED))
    one, two = evaluations(evaluated), evaluations(tmp_path / "two")
    assert list(one) == list(two) and one[0] == two[0]
    for step, values in one.items():
        assert two[step] == pytest.approx(values, abs=0.02)  # weights that differ by 1e-6 may reverse near ties
    tables = []
    for config in ("cpu.yaml", "cpu_2proc.yaml"):
        file = tmp_path / f"{config}.json"
        done = run_warm(["-m", "mmgraph", "evaluate", str(evaluated), f"--json={file}"], config)
        assert done.returncode == 0, done.stderr[-3000:]
        # Only one rank prints the table.
        assert sum(line.startswith("z_graph ") for line in done.stdout.splitlines()) == 1
        tables.append(json.loads(file.read_text()))
    assert tables[0] == tables[1]
    last = json.loads((evaluated / "evaluation.json").read_text())
    del last["step"]
    assert last == tables[0]


def test_evaluate_reads_a_single_checkpoint_and_all_feature_formats(
    graph: Path, evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A final checkpoint outside a run folder, and features in every format, have the metrics of the run."""
    last = json.loads((evaluated / "evaluation.json").read_text())
    edges = [f"--nodes={graph / 'nodes.csv'}", f"--edges={graph / 'edges.csv'}", "--eval_fraction=0.2"]
    checkpoint = shutil.copy(evaluated / "checkpoints/multimodal_encoder_final.pt", tmp_path / "original.pt")
    more = [f"--model_name={graph / 'towers'}", f"--json={tmp_path / 'alone.json'}"]
    assert main(["evaluate", str(checkpoint), *edges, *more]) == 0
    table = json.loads((tmp_path / "alone.json").read_text())
    assert all(table[name] == last[name] for name in ("embeddings", "sampled", "retrieval", "retrieval_shuffled"))
    for suffix in ("pt", "npy", "safetensors", "parquet"):
        assert main(["encode", str(evaluated), f"--output_dir={tmp_path / suffix}", f"--format={suffix}"]) == 0
        assert main(["evaluate", str(tmp_path / suffix), *edges, f"--json={tmp_path / 'f.json'}"]) == 0
        table = json.loads((tmp_path / "f.json").read_text())
        assert table["embeddings"] == last["embeddings"] and "retrieval" not in table
    shuffled = pd.read_parquet(tmp_path / "parquet/features_fused.parquet").sample(frac=1, random_state=0)
    shuffled.to_parquet(tmp_path / "features_shuffled.parquet")
    assert main(["evaluate", str(tmp_path / "features_shuffled.parquet"), *edges, f"--json={tmp_path / 'f.json'}"]) == 0
    table = json.loads((tmp_path / "f.json").read_text())
    assert table["embeddings"]["shuffled"] == last["embeddings"]["fused"]  # rows are matched by node id
    assert "z_graph" in capsys.readouterr().out
    both = [str(tmp_path / f"{suffix}/features_fused.{suffix}") for suffix in ("pt", "npy")]
    # Two files with the same feature name are listed by their paths.
    assert main(["evaluate", *both, *edges, f"--json={tmp_path / 'f.json'}"]) == 0
    embeddings = json.loads((tmp_path / "f.json").read_text())["embeddings"]
    assert list(embeddings) == [*both, "random"] and embeddings[both[0]] == last["embeddings"]["fused"]
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "pt"), str(checkpoint), *edges, f"--json={tmp_path / 'mixed.json'}"]) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith("mmgraph: error: ") and not (tmp_path / "mixed.json").exists()


def test_mrr_against_an_independent_computation(graph: Path, evaluated: Path, tmp_path: Path) -> None:
    """The MRR of z_graph equals one that is computed from the exported features and the tables, without mmgraph."""
    assert main(["encode", str(evaluated), f"--output_dir={tmp_path}"]) == 0
    z = torch.load(tmp_path / "features_z_graph.pt").double().numpy()
    edges = pd.read_csv(graph / "edges.csv", dtype=str)[["src_id", "dst_id"]].astype(int).to_numpy()
    [split] = [
        np.load(path) for path in (graph / "mmgraph_cache/tables").glob("split*-0.2-42-*.held_out.npy")
    ]  # tests/data/test_split.py checks which edges are held out
    neighbours: dict[int, set[int]] = {}
    for a, b in edges.tolist():
        neighbours.setdefault(a, set()).add(b)
        neighbours.setdefault(b, set()).add(a)
    reciprocal = []
    for a, b in {tuple(edge) for edge in edges[split].tolist()}:
        for query, target in ((a, b), (b, a)):
            scores = z @ z[query]
            removed = list((neighbours[query] | {query}) - {target})
            scores[removed] = -np.inf
            reciprocal.append(1 / (1 + (scores > scores[target]).sum()))
    last = json.loads((evaluated / "evaluation.json").read_text())
    assert last["embeddings"]["z_graph"]["mrr"] == pytest.approx(np.mean(reciprocal), abs=1e-3)
    assert last["edges"] == len(reciprocal) / 2


def test_evaluation_changes_no_loss(graph: Path, one_process: Path, tmp_path: Path) -> None:
    """A run with ``--eval_edges`` has exactly the losses and weights of a run without evaluation.

    Live towers have the metrics of stored tower outputs, within 0.02.
    """
    edges = pd.read_csv(graph / "edges.csv", dtype=str).sample(30, random_state=0)
    edges.assign(rel_id=["a", "b", "c"] * 10).to_csv(tmp_path / "eval.csv", index=False)
    more = ("--max_steps=30", f"--eval_edges={tmp_path / 'eval.csv'}", "--eval_every=4")
    output = launch("cpu.yaml", *settings(graph, tmp_path / "run", *more)).stdout
    last = json.loads((tmp_path / "run/evaluation.json").read_text())
    warnings = [re.findall(r"\d+", line) for line in output.splitlines() if line.startswith("warning: ")]
    assert warnings.count([str(last["edges"])] * 2) == 1  # every held-out edge is also a training edge
    rows = [row for row in read_metrics(tmp_path / "run") if row["step"] > 0]
    for row, other in zip(rows, read_metrics(one_process), strict=True):
        assert all(row[name] == other[name] for name in LOSSES)
    assert same_state(tmp_path / "run", one_process)
    assert (
        sum(values["edges"] for values in last["relations"].values()) == last["edges"] and len(last["relations"]) == 3
    )
    live = settings(graph, tmp_path / "live", "--max_steps=4", *more[1:], "--tower_cache=off")
    launch("cpu_2proc.yaml", *live)
    assert evaluations(tmp_path / "live")[4] == pytest.approx(evaluations(tmp_path / "run")[4], abs=0.02)


def test_a_resumed_run_has_the_same_evaluations(graph: Path, evaluated: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    for steps in (7, 12):
        launch("cpu.yaml", *settings(graph, output, *EVALUATED, f"--max_steps={steps}"))
    rows, expected = read_metrics(output), read_metrics(evaluated)
    assert [row["step"] for row in rows] == list(range(13))
    uninterrupted, resumed = evaluations(evaluated), evaluations(output)
    assert list(resumed) == [0, 5, 7, 10, 12]  # the first launch ended at step 7
    assert all(resumed[step] == uninterrupted[step] for step in uninterrupted)
    assert [row.get("loss") for row in rows] == [row.get("loss") for row in expected]
    done = run_warm([SCRIPT, *settings(graph, output, *EVALUATED, "--eval_fraction=0.3")])
    [error] = [line for line in done.stderr.splitlines() if "mmgraph: error: " in line]
    assert done.returncode != 0 and re.search(r"\beval_fraction 0\.2\b.*\b0\.3\b", error)
    assert read_metrics(output) == rows


KILLED = f"""import os, pkgutil, runpy, sys, time
import pytest
ranks = pkgutil.resolve_name({RANKS_OF_EMBEDDINGS!r})
call, how = int(sys.argv.pop(1)), sys.argv.pop(1)
def killed(self, vectors):
    killed.calls += 1
    if killed.calls == call:
        if how == "hang":
            print("hangs", flush=True)
            time.sleep(120)
        os.kill(os.getpid(), 9)
    return ranks(self, vectors)
killed.calls = 0
pytest.MonkeyPatch().setattr({RANKS_OF_EMBEDDINGS!r}, killed)
runpy.run_path({str(REPOSITORY / "launch.py")!r}, run_name="__main__")
"""


@pytest.mark.parametrize("call", [2, 7, 9, 11], ids=["before step 1", "step 5", "step 10", "the end"])
def test_killed_in_an_evaluation(graph: Path, evaluated: Path, tmp_path: Path, call: int) -> None:
    """The same command resumes with the interrupted evaluation. The metrics file has each step once."""
    (tmp_path / "run.py").write_text(KILLED)
    flags = settings(graph, tmp_path / "run", *EVALUATED)
    done = run_warm([str(tmp_path / "run.py"), str(call), "kill", *flags])
    assert done.code == -signal.SIGKILL
    step = {2: 0, 7: 5, 9: 10, 11: 12}[call]
    # A step's row is written after its evaluation.
    assert len(read_metrics(tmp_path / "run")) == (0 if step == 0 else step)
    launch("cpu.yaml", *flags)
    assert starts(tmp_path / "run") == [0, step]
    assert evaluations(tmp_path / "run") == evaluations(evaluated)
    losses = [[row.get(name) for name in LOSSES] for row in read_metrics(evaluated)]
    assert [[row.get(name) for name in LOSSES] for row in read_metrics(tmp_path / "run")] == losses
    assert same_state(tmp_path / "run", evaluated)
    best, expected = (
        torch.load(folder / "checkpoints/multimodal_encoder_best.pt") for folder in (tmp_path / "run", evaluated)
    )
    assert all(torch.equal(tensor, expected[name]) for name, tensor in best.items())


@pytest.mark.slow
def test_stopped_in_a_long_evaluation(graph: Path, evaluated: Path, tmp_path: Path) -> None:
    """A run that gets SIGTERM does not wait for the evaluation, because the state of its step is already saved."""
    (tmp_path / "run.py").write_text(KILLED)
    flags = settings(graph, tmp_path / "run", *EVALUATED, "--stop_grace=1")
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py"), "7", "hang", *flags],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    while "hangs" not in process.stdout.readline():
        assert process.poll() is None
    sent = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143 and time.monotonic() - sent < 20 and "--stop_grace" in stderr
    assert newest(tmp_path / "run").name == "step-00000005" and "Traceback" not in stderr
    launch("cpu.yaml", *flags)
    assert starts(tmp_path / "run") == [0, 5]
    assert evaluations(tmp_path / "run") == evaluations(evaluated)


@pytest.mark.parametrize(
    "config", ["cpu.yaml --mixed_precision bf16", pytest.param(ZERO3, marks=pytest.mark.slow)], ids=["bf16", "ZeRO-3"]
)
def test_other_precisions_and_backends(graph: Path, evaluated: Path, tmp_path: Path, config: str) -> None:
    """Under bf16 (float16 tokens in the store) and ZeRO-3, the metrics before the first step are those of float32."""
    flags = [*EVALUATED, "--max_steps=3", f"--tower_cache={tmp_path / 'store'}"]
    launch(config, *settings(graph, tmp_path / "run", *flags))
    by_step = evaluations(tmp_path / "run")
    assert list(by_step) == [0, 3] and by_step[0] == pytest.approx(evaluations(evaluated)[0], abs=0.02)


def test_a_graph_with_one_image(graph: Path, tmp_path: Path) -> None:
    """A graph whose text-image retrieval has a single candidate is evaluated on two ranks."""
    nodes = pd.read_csv(graph / "nodes.csv", dtype=str)
    nodes["image_path"] = [str(graph / nodes["image_path"][0].replace("\\", "/")), *[""] * 39]
    nodes.to_csv(tmp_path / "nodes.csv", index=False)
    flags = [*EVALUATED, "--max_steps=2", f"--nodes={tmp_path / 'nodes.csv'}"]
    launch("cpu_2proc.yaml", *settings(graph, tmp_path / "run", *flags))
    by_step = evaluations(tmp_path / "run")
    assert list(by_step) == [0, 2] and 0 < by_step[2]["eval/z_graph/mrr"] <= 1
    assert main(["evaluate", str(tmp_path / "run")]) == 0


def test_early_stopping_and_the_best_weights(graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Training stops after two evaluations without improvement. The learning rate is so high that metrics get worse."""
    flags = settings(graph, tmp_path / "run", "--eval_fraction=0.2", "--eval_every=3", "--early_stopping_patience=2")
    assert train_main([*flags, "--learning_rate=3"]) == 0
    out = capsys.readouterr().out
    by_step = evaluations(tmp_path / "run")
    values = [by_step[step]["eval/z_graph/mrr"] for step in by_step]
    best = int(np.argmax(values))
    assert len(values) == best + 3  # the best evaluation and two that were not better
    [line] = [line for line in out.splitlines() if "z_graph/mrr" in line]
    assert re.search(rf"\b2\b.*z_graph/mrr {values[best]:.4f}\b.*\b{list(by_step)[best]}\b", line)
    assert str(tmp_path / "run/checkpoints/multimodal_encoder_best.pt") in line
    assert (tmp_path / "run/checkpoints/multimodal_encoder_final.pt").is_file()
    file = tmp_path / "run/checkpoints/multimodal_encoder_best.pt"
    assert main(["evaluate", str(file), f"--json={tmp_path / 'best.json'}"]) == 0
    table = json.loads((tmp_path / "best.json").read_text())
    assert table["embeddings"]["z_graph"]["mrr"] == values[best]
    capsys.readouterr()
    assert train_main([*flags, "--learning_rate=3"]) == 0
    assert "--early_stopping_patience" in capsys.readouterr().out
    assert evaluations(tmp_path / "run") == by_step and starts(tmp_path / "run") == [0]
    assert train_main([*flags, "--learning_rate=3", "--early_stopping_patience=3"]) == 0
    assert len(evaluations(tmp_path / "run")) > len(by_step)


def test_invalid_settings_file_of_a_run(evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_folder = shutil.copytree(evaluated, tmp_path / "run")
    for text in ("seed: abc", "nodes: [a]", "truncated_images: foo", "nodes: 5"):
        (run_folder / "config.yaml").write_text(text)
        for verb in ("evaluate", "encode"):
            assert (
                main([verb, str(run_folder), "--nodes=none.csv"] if "nodes" not in text else [verb, str(run_folder)])
                == 2
            )
            assert capsys.readouterr().err.count("\n") == 1
    (run_folder / "config.yaml").write_bytes(b"\xff\xfe\x00")
    assert main(["encode", str(run_folder)]) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith(f"mmgraph: error: {run_folder}/checkpoints/") and "--nodes" in error


def test_best_value_is_dropped_for_other_held_out_edges(capsys: pytest.CaptureFixture[str]) -> None:
    config, progress = Config(eval_fraction=0.1, keep_best="fused/mrr"), Progress()
    best = EarlyStopping(config, progress, "edges 1")
    assert [best.improves(step, {"fused": {"mrr": mrr}}) for step, mrr in enumerate((0.2, 0.2, 0.3))] == [
        True,
        False,
        True,
    ]
    restored = Progress.from_record(json.loads(json.dumps(progress.to_record())))
    resumed = EarlyStopping(config, restored, "edges 1")
    assert not resumed.improves(3, {"fused": {"mrr": 0.3}}) and resumed.value["step"] == 2
    assert EarlyStopping(config, progress, "edges 2").improves(4, {"fused": {"mrr": 0.1}})
    [line] = capsys.readouterr().out.splitlines()
    assert "--keep_best" in line and "fused/mrr" in line and "edges 1" in line


class Outputs:
    """Replaces NodeOutputs: 12 nodes whose texts and images are one-hot vectors."""

    nodes = range(12)

    class inputs:  # noqa: N801 - an attribute of NodeOutputs
        rules = InputRules()

    def of(self, parts: list[range], image_rows: np.ndarray | None = None) -> Any:
        rows = np.concatenate([np.arange(part.start, part.stop) for part in parts])
        images = rows if image_rows is None else image_rows[rows]
        mask = torch.full((len(rows), 4), 1)
        mask[5] = torch.tensor([1, 1, 0, 0])  # node 5 has no words
        status = np.where(images == 7, 2, 0)  # image 7 is missing
        eye = torch.eye(12)
        tokens = Tokens(eye, mask, eye, text_pooled=eye[rows], image_pooled=eye[images])
        yield type("O", (), {"tokens": tokens, "image_status": status})


def test_shuffled_images_show_a_shortcut() -> None:
    """Retrieval with shuffled images stays perfect for an encoder that copies the image into z_text.

    It drops to 0 for an encoder whose z_text depends only on the text.
    """
    held_out = HeldOut(np.array([[0, 1], [2, 3]]), None, [], "")
    known = Adjacency(torch.from_numpy(pair_keys(np.array([[4, 5]]), 12)), 12)
    evaluation = Evaluation(Accelerator(cpu=True), known, held_out, seed=1)

    def shortcut(tokens: Tokens) -> dict[str, torch.Tensor]:
        text, image = tokens.text_pooled, tokens.image_pooled
        names = ("z_graph", "fused", "text_only", "image_only", "concat")
        return {"z_text": image, "z_vis": image, **dict.fromkeys(names, text)}

    def honest(tokens: Tokens) -> dict[str, torch.Tensor]:
        return {**shortcut(tokens), "z_text": tokens.text_pooled}

    first = evaluation.evaluate(shortcut, Outputs())  # type: ignore[arg-type]
    assert first["retrieval"] == {"texts": 10, "images": 10, "r@1": 1.0, "r@10": 1.0}
    assert first["retrieval_shuffled"]["r@1"] == 1.0
    second = evaluation.evaluate(honest, Outputs())  # type: ignore[arg-type]
    assert second["retrieval"]["r@1"] == 1.0 and second["retrieval_shuffled"]["r@1"] == 0.0


@pytest.mark.parametrize("count", [2, 3, 12_842])
def test_derangement_has_no_fixed_point(count: int) -> None:
    image_rows = derangement(count, seed=4)
    assert np.array_equal(np.sort(image_rows), np.arange(count)) and not (image_rows == np.arange(count)).any()


@pytest.mark.slow
def test_a_graph_of_12842_nodes_in_seconds() -> None:
    """Rank 8,900 held-out edges among all nodes by vectors of width 256, filtered by 80,100 training edges."""
    generator = np.random.default_rng(0)
    rows = (12_842 * generator.random((89_000, 2)) ** 2).astype(np.int64)
    known = Adjacency(torch.from_numpy(pair_keys(rows[8_900:], 12_842)), 12_842)
    evaluation = Evaluation(Accelerator(cpu=True), known, HeldOut(rows[:8_900], None, [], ""), seed=0)
    vectors = torch.randn(12_842, 256, generator=torch.Generator().manual_seed(0))
    start = time.perf_counter()
    ranks = evaluation.ranks(vectors)
    seconds = time.perf_counter() - start
    print(f"{ranks.filtered.size:,} queries in {seconds:.1f} s")
    assert seconds < 60


@pytest.mark.parametrize(
    ("arguments", "facts"),
    [
        (["{run}", "{run}"], ["evaluate "]),
        (["{run}", "--eval_edges=/none.csv"], ["/none.csv: "]),
        (["{graph}/nodes.csv"], ["{graph}/nodes.csv"]),
        (["{run}/checkpoints/multimodal_encoder_final.pt", "--eval_fraction=0"], ["--eval_edges", "--eval_fraction"]),
        (
            ["{short}", "--nodes={graph}/nodes.csv", "--edges={graph}/edges.csv", "--eval_fraction=0.2"],
            ["{short} ", " 3 ", "{graph}/nodes.csv ", " 40 "],
        ),
    ],
)
def test_evaluate_rejects_wrong_arguments(
    graph: Path,
    evaluated: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    facts: list[str],
) -> None:
    torch.save(torch.zeros(3, 4), tmp_path / "features_short.pt")
    names = {"run": evaluated, "graph": graph, "short": tmp_path / "features_short.pt"}
    assert main(["evaluate", *(argument.format(**names) for argument in arguments)]) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith("mmgraph: error: ") and all(fact.format(**names) in error for fact in facts)
