"""Evaluation in real runs and by ``mmgraph evaluate``: on any number of processes, before, while and after training."""

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
from mmgraph.data.split import HeldOut
from mmgraph.evaluation.evaluator import Evaluation, derangement
from mmgraph.towers.tokens import Tokens
from mmgraph.training.early_stopping import EarlyStopping

EVALUATED = ("--eval_fraction=0.2", "--max_steps=12", "--eval_every=5", "--keep_best=z_graph/hits@10", "--save_every=6")


@pytest.fixture(scope="module")
def evaluated(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """12 steps on four fifths of the edges, on one process."""
    output = tmp_path_factory.mktemp("evaluated") / "run"
    launch("cpu.yaml", *settings(graph, output, *EVALUATED))
    return output


def evaluations(output: Path) -> dict[int, dict[str, float]]:
    """Of each evaluated step, what it found."""
    found = {}
    for row in read_metrics(output):
        values = {name: value for name, value in row.items() if name.startswith("eval")}
        found |= {int(row["step"]): values} if values else {}
    return found


def starts(output: Path) -> list[int]:
    """The step that each start of a run went on from."""
    return [start["from_step"] for start in json.loads((output / "environment.json").read_text())]


def test_a_run_is_evaluated_before_while_and_after(evaluated: Path) -> None:
    rows = read_metrics(evaluated)
    assert [row["step"] for row in rows] == list(range(13)) and "loss" not in rows[0]
    found = evaluations(evaluated)
    assert list(found) == [0, 5, 10, 12] and all(values.keys() == found[0].keys() for values in found.values())
    fixed = [name for name in found[0] if name.split("/")[1] in ("text_only", "image_only", "concat", "random")]
    assert len(fixed) == 2 * 4 * 4 and all(found[step][name] == found[0][name] for step in found for name in fixed)
    assert found[12]["eval/z_graph/mrr"] != found[0]["eval/z_graph/mrr"]
    log = (evaluated / "training_log.txt").read_text().splitlines()
    told = [line for line in log if all(kind in line for kind in ("z_graph", "fused", "random"))]
    for line, (step, values) in zip(told, found.items(), strict=True):
        assert re.search(rf"\b{step}\b.* {values['eval/z_graph/mrr']:.4f}\b", line)
    last = json.loads((evaluated / "evaluation.json").read_text())
    assert last["step"] == 12 and last["embeddings"]["fused"]["hits@3"] == found[12]["eval/fused/hits@3"]
    best = max(found, key=lambda step: (found[step]["eval/z_graph/hits@10"], -step))
    state = json.loads(sorted((evaluated / "state").glob("step-*"))[-1].joinpath("state.json").read_text())
    assert state["components"]["best"]["step"] == best


def test_on_two_processes_the_same(graph: Path, evaluated: Path, tmp_path: Path) -> None:
    """To the bit where the weights are the same: before the first step; and of a checkpoint, also under evaluate."""
    launch("cpu_2proc.yaml", *settings(graph, tmp_path / "two", *EVALUATED))
    one, two = evaluations(evaluated), evaluations(tmp_path / "two")
    assert list(one) == list(two) and one[0] == two[0]
    for step, values in one.items():
        assert two[step] == pytest.approx(values, abs=0.02)  # weights that differ by 1e-6 may turn near ties
    tables = []
    for config in ("cpu.yaml", "cpu_2proc.yaml"):
        file = tmp_path / f"{config}.json"
        done = run_warm(["-m", "mmgraph", "evaluate", str(evaluated), f"--json={file}"], config)
        assert done.returncode == 0, done.stderr[-3000:]
        assert sum(line.startswith("z_graph ") for line in done.stdout.splitlines()) == 1  # one table of all ranks
        tables.append(json.loads(file.read_text()))
    assert tables[0] == tables[1]
    last = json.loads((evaluated / "evaluation.json").read_text())
    del last["step"]
    assert last == tables[0]


def test_evaluate_takes_checkpoints_and_features_of_anyone(
    graph: Path, evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A final file that lies in no run, and features of every format, give the run's own figures."""
    last = json.loads((evaluated / "evaluation.json").read_text())
    edges = [f"--nodes={graph / 'nodes.csv'}", f"--edges={graph / 'edges.csv'}", "--eval_fraction=0.2"]
    alone = shutil.copy(evaluated / "checkpoints/multimodal_encoder_final.pt", tmp_path / "original.pt")
    more = [f"--model_name={graph / 'towers'}", f"--json={tmp_path / 'alone.json'}"]
    assert main(["evaluate", str(alone), *edges, *more]) == 0
    found = json.loads((tmp_path / "alone.json").read_text())
    assert all(found[name] == last[name] for name in ("embeddings", "sampled", "retrieval", "retrieval_shuffled"))
    for kind in ("pt", "npy", "safetensors", "parquet"):
        assert main(["encode", str(evaluated), f"--output_dir={tmp_path / kind}", f"--format={kind}"]) == 0
        assert main(["evaluate", str(tmp_path / kind), *edges, f"--json={tmp_path / 'f.json'}"]) == 0
        found = json.loads((tmp_path / "f.json").read_text())
        assert found["embeddings"] == last["embeddings"] and "retrieval" not in found
    shuffled = pd.read_parquet(tmp_path / "parquet/features_fused.parquet").sample(frac=1, random_state=0)
    shuffled.to_parquet(tmp_path / "features_shuffled.parquet")
    assert main(["evaluate", str(tmp_path / "features_shuffled.parquet"), *edges, f"--json={tmp_path / 'f.json'}"]) == 0
    found = json.loads((tmp_path / "f.json").read_text())
    assert found["embeddings"]["shuffled"] == last["embeddings"]["fused"]  # by id, not by row
    assert "z_graph" in capsys.readouterr().out
    both = [str(tmp_path / f"{kind}/features_fused.{kind}") for kind in ("pt", "npy")]
    assert main(["evaluate", *both, *edges, f"--json={tmp_path / 'f.json'}"]) == 0  # of one name
    found = json.loads((tmp_path / "f.json").read_text())["embeddings"]
    assert list(found) == [*both, "random"] and found[both[0]] == last["embeddings"]["fused"]
    capsys.readouterr()
    assert main(["evaluate", str(tmp_path / "pt"), str(alone), *edges, f"--json={tmp_path / 'mixed.json'}"]) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith("mmgraph: error: ") and not (tmp_path / "mixed.json").exists()


def test_against_numbers_made_from_the_features(graph: Path, evaluated: Path, tmp_path: Path) -> None:
    """MRR of z_graph, from the exported file and the tables, with nothing of mmgraph's."""
    assert main(["encode", str(evaluated), f"--output_dir={tmp_path}"]) == 0
    z = torch.load(tmp_path / "features_z_graph.pt").double().numpy()
    edges = pd.read_csv(graph / "edges.csv", dtype=str)[["src_id", "dst_id"]].astype(int).to_numpy()
    [split] = [
        np.load(path) for path in (graph / "mmgraph_cache/tables").glob("split*-0.2-42-*.held_out.npy")
    ]  # which edges is test_held_out.py's
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
    """To the bit, with held-out edges of a table of their own; live towers evaluate as stored ones do."""
    edges = pd.read_csv(graph / "edges.csv", dtype=str).sample(30, random_state=0)
    edges.assign(rel_id=["a", "b", "c"] * 10).to_csv(tmp_path / "eval.csv", index=False)
    more = ("--max_steps=30", f"--eval_edges={tmp_path / 'eval.csv'}", "--eval_every=4")
    said = launch("cpu.yaml", *settings(graph, tmp_path / "run", *more)).stdout
    last = json.loads((tmp_path / "run/evaluation.json").read_text())
    warnings = [re.findall(r"\d+", line) for line in said.splitlines() if line.startswith("warning: ")]
    assert warnings.count([str(last["edges"])] * 2) == 1  # all of them are trained on as well
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


def test_a_resumed_run_is_evaluated_alike(graph: Path, evaluated: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    for steps in (7, 12):
        launch("cpu.yaml", *settings(graph, output, *EVALUATED, f"--max_steps={steps}"))
    rows, expected = read_metrics(output), read_metrics(evaluated)
    assert [row["step"] for row in rows] == list(range(13))
    whole, resumed = evaluations(evaluated), evaluations(output)
    assert list(resumed) == [0, 5, 7, 10, 12]  # 7 was an end
    assert all(resumed[step] == whole[step] for step in whole)
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
    """The same command goes on with that evaluation; nothing is lost, and each step stands once."""
    (tmp_path / "run.py").write_text(KILLED)
    flags = settings(graph, tmp_path / "run", *EVALUATED)
    done = run_warm([str(tmp_path / "run.py"), str(call), "kill", *flags])
    assert done.code == -signal.SIGKILL
    step = {2: 0, 7: 5, 9: 10, 11: 12}[call]
    assert len(read_metrics(tmp_path / "run")) == (0 if step == 0 else step)  # the step's own row waits
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


def test_stopped_in_a_long_evaluation(graph: Path, evaluated: Path, tmp_path: Path) -> None:
    """It is not waited for: the state of its step is there."""
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
    asked = time.monotonic()
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143 and time.monotonic() - asked < 20 and "--stop_grace" in said
    assert newest(tmp_path / "run").name == "step-00000005" and "Traceback" not in said
    launch("cpu.yaml", *flags)
    assert starts(tmp_path / "run") == [0, 5]
    assert evaluations(tmp_path / "run") == evaluations(evaluated)


@pytest.mark.parametrize("config", ["cpu.yaml --mixed_precision bf16", ZERO3])
def test_other_precisions_and_backends(graph: Path, evaluated: Path, tmp_path: Path, config: str) -> None:
    """A store of float16 tokens, and weights in parts: before the first step they rank as float32 ones do."""
    flags = [*EVALUATED, "--max_steps=3", f"--tower_cache={tmp_path / 'store'}"]
    launch(config, *settings(graph, tmp_path / "run", *flags))
    found = evaluations(tmp_path / "run")
    assert list(found) == [0, 3] and found[0] == pytest.approx(evaluations(evaluated)[0], abs=0.02)


def test_a_graph_with_one_whole_node(graph: Path, tmp_path: Path) -> None:
    """Nobody to find among shuffled images; a graph of few nodes over two ranks."""
    nodes = pd.read_csv(graph / "nodes.csv", dtype=str)
    nodes["image_path"] = [str(graph / nodes["image_path"][0].replace("\\", "/")), *[""] * 39]
    nodes.to_csv(tmp_path / "nodes.csv", index=False)
    flags = [*EVALUATED, "--max_steps=2", f"--nodes={tmp_path / 'nodes.csv'}"]
    launch("cpu_2proc.yaml", *settings(graph, tmp_path / "run", *flags))
    found = evaluations(tmp_path / "run")
    assert list(found) == [0, 2] and 0 < found[2]["eval/z_graph/mrr"] <= 1
    assert main(["evaluate", str(tmp_path / "run")]) == 0


def test_early_stopping_and_the_best_weights(graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With a rate that ruins the embeddings the first evaluation stays the best."""
    flags = settings(graph, tmp_path / "run", "--eval_fraction=0.2", "--eval_every=3", "--early_stopping_patience=2")
    assert train_main([*flags, "--learning_rate=3"]) == 0
    out = capsys.readouterr().out
    found = evaluations(tmp_path / "run")
    values = [found[step]["eval/z_graph/mrr"] for step in found]
    best = int(np.argmax(values))
    assert len(values) == best + 3  # two later ones were no better
    [line] = [line for line in out.splitlines() if "z_graph/mrr" in line]
    assert re.search(rf"\b2\b.*z_graph/mrr {values[best]:.4f}\b.*\b{list(found)[best]}\b", line)
    assert str(tmp_path / "run/checkpoints/multimodal_encoder_best.pt") in line
    assert (tmp_path / "run/checkpoints/multimodal_encoder_final.pt").is_file()
    file = tmp_path / "run/checkpoints/multimodal_encoder_best.pt"
    assert main(["evaluate", str(file), f"--json={tmp_path / 'best.json'}"]) == 0
    table = json.loads((tmp_path / "best.json").read_text())
    assert table["embeddings"]["z_graph"]["mrr"] == values[best]
    capsys.readouterr()
    assert train_main([*flags, "--learning_rate=3"]) == 0
    assert "--early_stopping_patience" in capsys.readouterr().out
    assert evaluations(tmp_path / "run") == found and starts(tmp_path / "run") == [0]
    assert train_main([*flags, "--learning_rate=3", "--early_stopping_patience=3"]) == 0
    assert len(evaluations(tmp_path / "run")) > len(found)


def test_settings_that_cannot_be_read(evaluated: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_best_begins_anew_on_other_edges(capsys: pytest.CaptureFixture[str]) -> None:
    config, progress = Config(eval_fraction=0.1, keep_best="fused/mrr"), Progress()
    best = EarlyStopping(config, progress, "edges 1")
    assert [best.improves(step, {"fused": {"mrr": mrr}}) for step, mrr in enumerate((0.2, 0.2, 0.3))] == [
        True,
        False,
        True,
    ]
    kept = Progress.from_record(json.loads(json.dumps(progress.to_record())))
    again = EarlyStopping(config, kept, "edges 1")
    assert not again.improves(3, {"fused": {"mrr": 0.3}}) and again.value["step"] == 2
    assert EarlyStopping(config, progress, "edges 2").improves(4, {"fused": {"mrr": 0.1}})
    [line] = capsys.readouterr().out.splitlines()
    assert "--keep_best" in line and "fused/mrr" in line and "edges 1" in line


class Outputs:
    """Twelve nodes with a text and an image each, which are one-hot vectors."""

    nodes = range(12)

    class inputs:  # noqa: N801 - as NodeOutputs has it
        truncated_images = "partial"

    def of(self, parts: list[range], image_rows: np.ndarray | None = None) -> Any:
        rows = np.concatenate([np.arange(part.start, part.stop) for part in parts])
        images = rows if image_rows is None else image_rows[rows]
        mask = torch.full((len(rows), 4), 1)
        mask[5] = torch.tensor([1, 1, 0, 0])  # a node without words
        causes = np.where(images == 7, 2, 0)  # and one without an image
        eye = torch.eye(12)
        tokens = Tokens(eye, mask, eye, text_pooled=eye[rows], image_pooled=eye[images])
        yield type("O", (), {"tokens": tokens, "image_status": causes})


def test_shuffled_images_show_a_shortcut() -> None:
    """An encoder that copies the image into z_text finds any image; one that knows pairs finds its own alone."""
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
def test_cycle_leaves_nothing_in_its_place(count: int) -> None:
    image_rows = derangement(count, seed=4)
    assert np.array_equal(np.sort(image_rows), np.arange(count)) and not (image_rows == np.arange(count)).any()


def test_a_graph_of_12842_nodes_in_seconds() -> None:
    """Full ranking of 8,900 held-out edges by vectors of 256, with neighbours of 80,000 edges removed."""
    generator = np.random.default_rng(0)
    rows = (12_842 * generator.random((89_000, 2)) ** 2).astype(np.int64)
    known = Adjacency(torch.from_numpy(pair_keys(rows[8_900:], 12_842)), 12_842)
    evaluation = Evaluation(Accelerator(cpu=True), known, HeldOut(rows[:8_900], None, [], ""), seed=0)
    vectors = torch.randn(12_842, 256, generator=torch.Generator().manual_seed(0))
    begun = time.perf_counter()
    ranks = evaluation.ranks(vectors)
    seconds = time.perf_counter() - begun
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
def test_wrong_usage(
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
