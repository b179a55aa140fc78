"""Commands on a GPU: encode, evaluate, neighbors, stop signals, exhausted memory, and memory of micro batches."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import error_of, line_with, newest, read_metrics, settings
from gpu_runs import DEVICE, needs_cuda, on_a_gpu, train
from launches import SCRIPT, launch_command, run

from mmgraph.losses.contrastive import contrastive_losses
from mmgraph.models.multimodal_graph_encoder import TrainedModule
from mmgraph.towers.tokens import Tokens

pytestmark = on_a_gpu


def verb(*arguments: object, **environment: str) -> str:
    done = run([sys.executable, "-m", "mmgraph", *map(str, arguments)], **environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def test_encode_gives_the_features_of_the_cpu(tmp_path: Path, trained: Callable[[str], Path]) -> None:
    output = trained("evaluated")
    for folder, environment in (("gpu", {}), ("cpu", {"CUDA_VISIBLE_DEVICES": ""})):
        verb("encode", output, "--output_dir", tmp_path / folder, **environment)
    names = [f"features_{name}.pt" for name in ("z_graph", "fused", "text_only", "image_only", "concat")]
    for name in names:
        [on_gpu, on_cpu] = (torch.load(next((tmp_path / folder).rglob(name))) for folder in ("gpu", "cpu"))
        difference = float((on_gpu - on_cpu).norm() / on_cpu.norm())
        print(f"{name}: norm-relative difference {difference:.1e}")
        assert on_gpu.device.type == "cpu" and on_gpu.shape == on_cpu.shape and difference < 1e-4


def test_evaluate_gives_the_metrics_of_the_run_and_of_the_cpu(trained: Callable[[str], Path]) -> None:
    """A few ranks may differ from the CPU's, because the embeddings differ in the last bits."""
    output = trained("evaluated")
    of_the_run = json.loads((output / "evaluation.json").read_text())["embeddings"]
    for environment in ({}, {"CUDA_VISIBLE_DEVICES": ""}):
        verb("evaluate", output, **environment)
        evaluated = json.loads((output / "evaluation.json").read_text())["embeddings"]
        for name in ("z_graph", "fused", "concat", "random"):
            assert evaluated[name]["mrr"] == pytest.approx(of_the_run[name]["mrr"], abs=0.02), name


def test_neighbors_of_a_node_and_of_a_text(trained: Callable[[str], Path]) -> None:
    output = trained("evaluated")
    assert len(verb("neighbors", output, "--node", "003").splitlines()) > 5
    assert len(verb("neighbors", output, "--text", "small red square").splitlines()) > 5


def test_rows_have_the_memory_of_the_device(trained: Callable[[str], Path]) -> None:
    assert all(0 < row["peak_memory_gb"] < 20 for row in read_metrics(trained("bf16")))
    recorded = (trained("bf16") / "environment.json").read_text()
    assert DEVICE.type == "cpu" or torch.cuda.get_device_name() in recorded


def test_check_describes_the_device(graph: Path, tmp_path: Path) -> None:
    text = train("single_gpu.yaml", tmp_path / "run", graph, "--check")
    assert line_with(text, "rank 0", "GB free") and line_with(text, "per step", "GFLOP/s")
    assert not (tmp_path / "run").exists()


def test_sigterm_ends_a_run_with_its_state(graph: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    command = launch_command("single_gpu.yaml", *settings(graph, output, "--max_steps=100000", "--epochs=100000"))
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        deadline = time.monotonic() + 120
        while not (output / "metrics.jsonl").exists() or not read_metrics(output):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.2)
        process.send_signal(signal.SIGTERM)
        text, _ = process.communicate(timeout=60)
    assert process.returncode != 0
    steps = [row["step"] for row in read_metrics(output)]
    assert steps == list(range(1, len(steps) + 1)) and newest(output).name == f"step-{steps[-1]:08}", text[-2000:]


@needs_cuda
def test_exhausted_memory_is_one_line_that_names_the_micro_batch(graph: Path, tmp_path: Path) -> None:
    """The process may use a small part of the device, and a batch is too large for it."""
    script = tmp_path / "run.py"
    script.write_text(
        "import runpy, sys, torch\n"
        "torch.cuda.set_per_process_memory_fraction(0.4e9 / torch.cuda.mem_get_info()[1])\n"
        f"runpy.run_path({SCRIPT!r}, run_name='__main__')\n"
    )
    flags = settings(graph, tmp_path / "run", "--fused_dim=1536", "--batch_size=160", "--max_steps=2")
    done = run([sys.executable, str(script), *flags], ACCELERATE_MIXED_PRECISION="no")
    assert done.returncode == 1
    line = error_of(done.stderr, "out of memory")
    print(line)
    assert "set --micro_batch_size 80 (now 160 edges at a time)" in line


@needs_cuda
def test_micro_batches_lower_the_memory_and_keep_the_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    nodes = 1024
    tokens = Tokens(
        torch.randn(nodes, 77, 512, generator=generator).half(),
        torch.ones(nodes, 77, dtype=torch.int64),
        torch.randn(nodes, 49, 768, generator=generator).half(),
    ).map(lambda tensor: tensor.to(DEVICE))
    torch.manual_seed(0)
    module = TrainedModule(512, 768, 512, 256).to(DEVICE)
    peaks, gradients = [], []
    for micro_batches in (1, 8):
        module.zero_grad(set_to_none=True)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        contrastive_losses(*module(tokens, micro_batches), 0.07, 1.0).total.backward()
        peaks.append((torch.cuda.max_memory_allocated() - before) / 1e9)
        gradients.append(torch.cat([p.grad.double().flatten() for p in module.parameters()]))
    difference = float((gradients[0] - gradients[1]).norm() / gradients[0].norm())
    print(f"{nodes} nodes: {peaks[0]:.2f} GB whole, {peaks[1]:.2f} GB in 8 micro batches; gradients {difference:.1e}")
    assert peaks[1] < peaks[0] / 3 and difference < 1e-4


@needs_cuda
def test_a_gpu_that_is_hidden_is_not_used(graph: Path, tmp_path: Path) -> None:
    text = train("single_gpu.yaml", tmp_path / "run", graph, "--max_steps=1", CUDA_VISIBLE_DEVICES="")
    assert line_with(text, "1 process", "device cpu")
