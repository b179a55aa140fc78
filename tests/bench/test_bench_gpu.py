"""mmgraph bench gpu: each part writes its result, a second start skips it, and an error does not stop the others."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import error_of

from mmgraph.bench import gpu, gpu_profile, gpu_steps
from mmgraph.bench.gpu_workload import Workload
from mmgraph.cli import main
from mmgraph.errors import RunError

SMALL = [
    "--device=cpu", "--precision=no", "--small_towers", "--num_workers=0", "--fused_dim=16", "--proj_dim=8",
    "--edges", "4", "8", "--store_nodes=8", "--eval_nodes=100", "--loss_edges", "32", "64",
]  # fmt: skip
KINDS = ["plain", "live", "stored, disk", "stored, device"]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measure few steps, in one thread. Reset the variables with which the benchmark sets precision and device."""
    for name, value in {"LOOP_SECONDS": 0.01, "LOOPS": 2, "MIN_PHASES": 1, "MAX_PHASES": 2}.items():
        monkeypatch.setattr(gpu_steps, name, value)
    for name in ("ACCELERATE_MIXED_PRECISION", "ACCELERATE_USE_CPU", "TOKENIZERS_PARALLELISM"):
        monkeypatch.setenv(name, {"ACCELERATE_MIXED_PRECISION": "no"}.get(name, "false"))
    monkeypatch.setattr(gpu_profile, "STEPS", 2)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the tensors are small, and other tests run at the same time
    yield
    torch.set_num_threads(threads)


def results(out: Path) -> dict[str, Any]:
    return {path.stem.removeprefix("gpu_"): json.loads(path.read_text()) for path in out.glob("*.json")}


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the generated graph, which the tests share."""
    return tmp_path_factory.mktemp("gpu")


def bench(data: Path, out: Path, *more: str) -> int:
    return main(["bench", "gpu", f"--out={out}", f"--folder={data}", *SMALL, *more])


@pytest.mark.usefixtures("quick")
def test_parts(data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Steps of more than 8 nodes that read images are not measured here, so the tables have "-" in these rows."""
    monkeypatch.setattr(gpu_steps, "MAX_TOWER_NODES", 8)
    assert bench(data, tmp_path / "out") == 0
    parts = results(tmp_path / "out")
    assert parts.keys() == {"steps", "profile", "loss", "store", "evaluation"}
    assert all(content["machine"]["cpu"] and content["title"] for content in parts.values())

    rows = parts["steps"]["rows"]
    assert [(row["step"], row["edges"]) for row in rows] == [(kind, edges) for kind in KINDS for edges in (4, 8)]
    measured = [row for row in rows if row["edges"] == 4 or row["step"].startswith("stored")]
    for row in measured:
        assert row["edges/s"] > 0 and row["edges"] / row["edges/s"] == pytest.approx(row["ms"] / 1000)
        assert row["peak GB"] > 0.1 and 0 < row["fusion share"] < 1 and row["of matmul"] > 0
        assert row["data"] > 0 and row["towers"] > 0 and row["forward"] > 0 and row["back+optim"] > 0
        assert 2 < row["unique nodes"] <= 2 * row["edges"]
    assert [row["edges/s"] for row in rows if row not in measured] == ["-", "-"]
    assert "exceed the limit" in parts["steps"]["figures"]["not measured: plain, 8 edges"]

    rows = parts["profile"]["rows"]
    assert [row["edges"] for row in rows] == [4, 8]
    assert all(row["operators"] > 100 and row["ms"] > 0 and row["idle share"] == "-" for row in rows)
    assert sum("aten::" in str(value) for value in parts["profile"]["figures"].values()) == 20
    assert [row["edges"] for row in parts["loss"]["rows"]] == [32, 64]
    assert all(row["parts s"] > 0 for row in parts["loss"]["rows"])
    assert len(parts["store"]["rows"]) == 5 and all(row["nodes/s"] > 0 for row in parts["store"]["rows"])
    rows = parts["evaluation"]["rows"]
    assert [row["evaluation"] for row in rows] == ["first", "later"]
    for row in rows:
        assert row["s"] == pytest.approx(row["embedding"] + row["ranking"] + row["rest"])
        assert 0 < row["of which reading"] < row["embedding"] and row["ranking"] > 0

    capsys.readouterr()
    (tmp_path / "out/gpu_loss.json").unlink()
    assert bench(data, tmp_path / "out") == 0  # with the graph of the first start
    printed = capsys.readouterr().out
    assert printed.count("skipped") == 4 and "loss: started" in printed and "steps: started" not in printed
    assert results(tmp_path / "out").keys() == parts.keys()
    tables = (tmp_path / "out/gpu.txt").read_text()
    assert all(content["title"] in tables for content in results(tmp_path / "out").values())


@pytest.mark.usefixtures("quick")
def test_failures(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exhausted memory in a row is in the table; a failed part does not stop the next one."""

    def exhausted(work: Workload, edges: int) -> None:
        try:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB.")
        except torch.OutOfMemoryError:
            raise RunError("as TrainStep reports it") from None

    def broken(*_: object) -> None:
        raise ValueError("a defect")

    monkeypatch.setattr(gpu_steps, "PlainStep", exhausted)
    monkeypatch.setattr(gpu_steps, "open_source", broken)
    monkeypatch.setattr(gpu, "measure_loss", broken)
    assert bench(data, tmp_path / "out", "--parts", "steps", "loss", "evaluation") == 1
    parts = results(tmp_path / "out")
    assert parts.keys() == {"steps", "evaluation"}
    cells = [row["edges/s"] for row in parts["steps"]["rows"]]
    assert cells == ["out of memory"] * 2 + ["failed"] * 6
    assert "gpu_errors.txt" in error_of(capsys.readouterr().err, "loss", "ValueError: a defect")
    assert "a defect" in (tmp_path / "out/gpu_errors.txt").read_text()


def test_events_of_a_gpu() -> None:
    """Overlapping events count once as busy time. Annotations and calls of the host are no kernels."""
    events = [
        {"cat": "kernel", "name": "a", "ts": 0, "dur": 2000},
        {"cat": "kernel", "name": "a", "ts": 1000, "dur": 2000},
        {"cat": "gpu_memcpy", "name": "copy", "ts": 5000, "dur": 1000},
        {"cat": "kernel", "name": "b", "ts": 9000, "dur": 1000},
        {"cat": "gpu_user_annotation", "name": "Optimizer.step", "ts": 0, "dur": 10000},
        {"cat": "cuda_runtime", "name": "cudaLaunchKernel", "ts": 0, "dur": 5},
        {"name": "process_name", "ph": "M"},
    ]
    assert gpu_profile.busy_microseconds([event for event in events if event.get("cat") == "kernel"]) == 4000
    (kernels, copies, _, busy, idle, _, idle_profiled), top = gpu_profile._device_cells(
        events, seconds=0.002, profiled=0.005
    )
    assert (kernels, copies, busy) == (3 / 5, 1 / 5, 5 / 5)
    assert (idle, idle_profiled) == pytest.approx((0.5, 0.8))
    assert [line.split()[-1] for line in top.values()] == ["a", "b"]


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has CUDA")
@pytest.mark.parametrize("device", [[], ["--device=cuda"]], ids=["default", "cuda"])
def test_without_cuda(tmp_path: Path, device: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "gpu", f"--out={tmp_path / 'out'}", *device]) == 2
    error_of(capsys.readouterr().err, "CUDA", "--device cpu")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("flag", ["--nodes=nodes.csv", "--model-name=towers", "--demo"])
def test_a_graph_is_refused(tmp_path: Path, flag: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bench", "gpu", f"--out={tmp_path / 'out'}", "--device=cpu", flag]) == 2
    error_of(capsys.readouterr().err, flag.split("=")[0], "generates its graph")
    assert not (tmp_path / "out").exists()
