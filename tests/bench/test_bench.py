"""mmgraph bench: the results of each benchmark, and the plain step, which equals that of the original trainer."""

import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import settings
from launches import SCRIPT, run_warm
from targets import LOGIT_CHUNK, SCALE_LAUNCH, STUDY_LAUNCH, STUDY_POOL, TOWERS_OF_BENCH_GRAPH

from mmgraph.bench.loss import compare_losses
from mmgraph.bench.report import shown
from mmgraph.bench.runs import finish, launch
from mmgraph.bench.step_kinds import PlainModule
from mmgraph.cli import main
from mmgraph.errors import UserError
from mmgraph.models.multimodal_graph_encoder import TrainedModule
from mmgraph.towers.tokens import Tokens


def bench(graph: Path, tmp_path: Path, what: str, *more: str) -> dict[str, dict[str, float]]:
    """Run a benchmark, check that it creates no output folder, and return the content of its JSON file."""
    path = tmp_path / f"{what}.json"
    assert main(["bench", what, f"--json={path}", *settings(graph, tmp_path / "unused"), *more]) == 0
    assert not (tmp_path / "unused").exists()
    return json.loads(path.read_text())


def test_step(graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    content = bench(graph, tmp_path, "step", "--repeats=3")
    rows = {row["step"]: row for row in content["rows"]}
    assert list(rows) == ["float32, plain", "float32, live", "float32, stored"]
    for row in rows.values():
        phases = [row[phase] for phase in ("data", "towers", "forward", "backward", "optimizer")]
        # Medians of each phase, and of the total: on a busy machine, they differ.
        assert min(phases) > 0 and row["total"] / 5 < sum(phases) < 5 * row["total"]
    assert content["figures"]["float32: stored against plain in float32"] > 1
    assert 12 < content["figures"]["float32: unique nodes per step"] < 24
    assert shown(rows["float32, plain"]["total"]) in (output := capsys.readouterr().out) and "edges/s" in output


def test_step_measures_bf16_and_float32(graph: Path, tmp_path: Path) -> None:
    path = tmp_path / "step.json"
    command = ["-m", "mmgraph", "bench", "step", f"--json={path}", "--repeats=2", *settings(graph, tmp_path / "unused")]
    done = run_warm(command, "cpu.yaml --mixed_precision bf16")
    assert done.returncode == 0, done.stderr[-3000:]
    content = json.loads(path.read_text())
    rows = {row["step"]: row["total"] for row in content["rows"]}
    assert len(rows) == 6
    for name in ("float32", "bf16"):  # with --repeats=2, the median is the mean
        ratio = content["figures"][f"bf16: stored against plain in {name}"]
        assert ratio == pytest.approx(rows[f"{name}, plain"] / rows["bf16, stored"], rel=0.5)
    assert "float32: stored against plain in bf16" not in content["figures"]


def test_plain_module_matches_the_trained_module() -> None:
    """The plain module uses torch's attention and applies every layer to every token, as the original trainer does."""
    torch.manual_seed(0)
    trained = TrainedModule(24, 40, 32, 16)
    mask = (torch.arange(9) < torch.tensor([[9], [4], [1]])).long()
    tokens = Tokens(torch.randn(3, 9, 24), mask, torch.randn(3, 5, 40))
    for ours, plain in zip(trained(tokens), PlainModule(trained)(*tokens[:3]), strict=True):
        assert torch.allclose(ours, plain, atol=1e-6)


def test_data(graph: Path, tmp_path: Path) -> None:
    content = bench(graph, tmp_path, "data", "--image_cache_gb=1")
    figures = content["figures"]
    assert figures["nodes"] == 40 and figures["edges"] == 200
    assert figures["epoch 2: lookups that decode nothing"] == 1
    # 16 steps of 12 edges look up 384 images. Each of the 40 images is decoded once.
    assert figures["epoch 1: lookups that decode nothing"] == pytest.approx(1 - 40 / 384, abs=0.02)
    assert {row["what"] for row in content["rows"]} >= {"tokenise a text", "decode and resize it"}


def test_loss(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(LOGIT_CHUNK, 4096)
    content = bench(graph, tmp_path, "loss", "--sizes", "64", "300", "--repeats=2")
    assert [row["edges"] for row in content["rows"]] == [64, 300]
    assert all(row["difference"] < 1e-5 and row["time ratio"] > 0 for row in content["rows"])
    assert resolve_name(LOGIT_CHUNK) == 4096


class WarmRun:
    """Runs a benchmark's command in warm processes. Replaces ``mmgraph.bench.runs.launch``."""

    def __init__(self, folder: Path, name: str, arguments: list[str], processes: int, threads: int | None):
        config = "cpu.yaml" if processes == 1 else f"cpu_2proc.yaml --num_processes {processes}"
        program = ["-m", "mmgraph", *arguments] if arguments[0] == "cache" else [SCRIPT, *arguments]
        self.log_file = folder / f"{name}.log"
        self.ended = POOL.submit(run_warm, program, config)

    def wait(self) -> int | None:
        ended = self.ended.result()
        self.log_file.write_text(ended.said)
        return ended.returncode


POOL = ThreadPoolExecutor(2)


@pytest.mark.parametrize("warm", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["warm", "launched"])
def test_scale(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, warm: bool) -> None:
    if warm:
        monkeypatch.setattr(SCALE_LAUNCH, WarmRun)
    content = bench(graph, tmp_path, "scale", "--repeats=1", "--steps=5")
    assert [row["processes"] for row in content["rows"]] == [1, 2]
    assert all(row["efficiency"] > 0.1 for row in content["rows"])


def test_a_failed_run_is_one_error_line(tmp_path: Path) -> None:
    process = launch(tmp_path, "run", ["--nodez=1"], 1, threads=1)
    with pytest.raises(
        UserError, match=rf"^bench: a run failed: mmgraph: error: .*--nodez.* \(its log is {tmp_path}/run.log\)$"
    ):
        finish(process, tmp_path / "run.log")


def thread_pool(
    processes: int, context: Any, initializer: Callable[..., object], arguments: tuple[Any, ...]
) -> ThreadPoolExecutor:
    """Return a pool of one thread, which replaces the study's pool of processes."""
    return ThreadPoolExecutor(1, initializer=initializer, initargs=arguments)


VARIANT = pytest.param(["--variant=--temperature=0.2"], marks=pytest.mark.slow)


@pytest.mark.parametrize("more", [[], VARIANT], ids=["core", "variant"])
def test_study(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]) -> None:
    """A study trains runs and baselines on one split of the edges. In the slow case, baselines have own processes."""
    monkeypatch.setattr(STUDY_LAUNCH, WarmRun)
    if not more:
        monkeypatch.setattr(STUDY_POOL, thread_pool)
        monkeypatch.setattr(torch, "set_num_threads", lambda _: None)  # it would change the threads of later tests
    edges = pd.read_csv(graph / "edges.csv", dtype=str)
    edges["rel_id"] = ["likes", "eats", "is"] * 66 + ["is"] * 2
    edges[:170].to_csv(tmp_path / "edges.csv", index=False)
    edges[::-1][:30].to_csv(tmp_path / "eval.csv", index=False)
    flags = [f"--edges={tmp_path / 'edges.csv'}", f"--eval_edges={tmp_path / 'eval.csv'}", "--epochs=1"]
    flags += [f"--folder={tmp_path / 'runs'}", "--batch_sizes", "85", "--seeds=1"]
    content = bench(graph, tmp_path, "study", *flags, *more)
    rows = {row[""]: row for row in content["rows"]}
    assert len(rows) == 5 + 3 + 2 * len(more) + 3 + 3 + 1
    names = ["batch 85, mask_neighbors", "MLP on random, batch 85, keep"]
    names += ["batch 85, keep, --temperature=0.2"] * len(more)
    assert all(0 < float(rows[name]["z_graph MRR"].split(" ± ")[0]) < 1 for name in names)
    assert rows["DistMult, with relations"]["z_graph MRR"] != rows["random"]["z_graph MRR"]
    run_folder = tmp_path / "runs/85-keep-42"
    table = json.loads((run_folder / "evaluation.json").read_text())
    log = (tmp_path / "runs/85-keep-42.log").read_text()
    assert table["step"] == 2 and "resumed" not in log and not list(run_folder.glob("checkpoints/*_epoch_*.pt"))


def test_generated_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """``bench graph`` generates a graph on given edges or on random ones, and overwrites no existing graph."""
    build = resolve_name(TOWERS_OF_BENCH_GRAPH)
    monkeypatch.setattr(TOWERS_OF_BENCH_GRAPH, lambda folder, texts, real_size: build(folder, texts))
    pd.DataFrame({"src_id": ["x", "y", "x"], "dst_id": ["y", "z", "x"]}).to_csv(tmp_path / "edges.csv", index=False)
    assert main(["bench", "graph", str(tmp_path / "a"), f"--structure={tmp_path / 'edges.csv'}"]) == 0
    nodes = pd.read_csv(tmp_path / "a/nodes.csv")
    assert nodes["node_id"].tolist() == ["x", "y", "z"] and len(list((tmp_path / "a/images").iterdir())) == 3
    assert all(40 <= len(summary.split()) <= 80 for summary in nodes["summary"])
    assert len(pd.read_parquet(tmp_path / "a/edges.parquet")) == 3
    assert main(["bench", "graph", str(tmp_path / "a")]) == 2
    assert main(["bench", "graph", str(tmp_path / "b"), "--num_nodes=50", "--num_edges=90", "--num_images=4"]) == 0
    assert len(pd.read_csv(tmp_path / "b/nodes.csv")) == 50 and len(list((tmp_path / "b/images").iterdir())) == 4


@pytest.mark.slow
def test_loss_in_chunks_needs_little_memory() -> None:
    """For 8,192 edges, InfoNCE in chunks needs less than 0.6 GB and less than 1.3 times the time of plain InfoNCE."""
    row = compare_losses(8192, 256, torch.device("cpu"), repeats=3)
    assert row["parts GB"] < 0.6 and row["time ratio"] < 1.3 and row["difference"] < 1e-6


def test_wrong_flags_print_one_error_line() -> None:
    for arguments in (["bench"], ["bench", "speed"], ["bench", "step", "--nodez=1"], ["bench", "graph"]):
        done = run_warm(["-m", "mmgraph", *arguments])
        assert done.returncode == 2 and "Traceback" not in done.stderr and done.stderr.count("\n") == 1, done.stderr
