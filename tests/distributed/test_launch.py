"""Launches with ``accelerate launch``: equal training on one and two processes, killed runs, and refused launches."""

import json
import os
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from conftest import LOSSES, PACKAGE, loss_difference, newest, read_metrics, same_state, settings
from launches import SCRIPT, accelerate_launch, launch, launch_command, run, run_warm
from safetensors.torch import load_file

FLAGS = ("--max_steps=30", "--save_every=5")


@pytest.fixture(scope="module")
def two_processes(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A run of 30 steps on two processes: the output folder, and the standard output."""
    output = tmp_path_factory.mktemp("two") / "run"
    return output, accelerate_launch("cpu_2proc.yaml", *settings(graph, output, *FLAGS)).stdout


def norm_relative(left: torch.Tensor, right: torch.Tensor) -> float:
    """Return the L2 norm of the difference, relative to the norm of ``right``."""
    return float((left.double() - right.double()).norm() / right.double().norm())


def starts(output: Path) -> list[dict[str, Any]]:
    """Return the record of each start of a run."""
    return json.loads((output / "environment.json").read_text())


def test_two_processes_train_as_one(one_process: Path, two_processes: tuple[Path, str]) -> None:
    """Losses and weights of one and two processes differ by less than 1e-5 after 30 steps in float32."""
    output, printed = two_processes
    [start] = starts(output)
    assert (start["processes"], start["distributed_type"]) == (2, "MULTI_CPU")
    [line] = [line for line in printed.splitlines() if "MULTI_CPU" in line]
    # 2 processes on the CPU; 12 edges in a global batch, 6 on each process
    assert all(re.search(rf"\b{fact}\b", line) for fact in ("2", "cpu", "12", "6"))
    assert printed.count(str(output / "checkpoints/multimodal_encoder_final.pt")) == 1  # only one process writes it
    one, two = read_metrics(one_process), read_metrics(output)
    assert [row["step"] for row in two] == list(range(1, 31))
    worst = max(abs(a[name] - b[name]) for a, b in zip(one, two, strict=True) for name in LOSSES)
    print(f"losses within {worst:.1e}")
    assert worst < 1e-5
    first, second = (load_file(newest(path) / "trainable.safetensors") for path in (one_process, output))
    for name, tensor in first.items():
        other = second[name]
        # The exact gradient of the keys' bias is zero. Adam amplifies its rounding errors, so this third is excluded.
        if name.endswith("in_proj_bias"):
            width = len(tensor) // 3
            keep = torch.cat([torch.arange(width), torch.arange(2 * width, 3 * width)])
            tensor, other = tensor[keep], other[keep]
        assert norm_relative(other, tensor) < 1e-5, name


@pytest.mark.parametrize(
    "config",
    [
        "cpu_2proc.yaml",
        pytest.param("cpu.yaml", marks=pytest.mark.slow),
        pytest.param("cpu_2proc.yaml --num_processes 3", marks=pytest.mark.slow),
    ],
)
def test_a_killed_run_resumes_bit_for_bit(
    graph: Path, two_processes: tuple[Path, str], tmp_path: Path, config: str
) -> None:
    reference = two_processes[0]
    if config != "cpu_2proc.yaml":
        launch(config, *settings(graph, reference := tmp_path / "reference", *FLAGS))
    output = tmp_path / "killed"
    flags = settings(graph, output, *FLAGS)
    process = subprocess.Popen(
        launch_command(config, *flags),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},  # as warm processes have: other numbers of threads give other bits
    )
    deadline = time.monotonic() + 120
    while not (output / "state/step-00000020").exists():  # the second epoch has steps 17 to 32
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.005)
    for victim in [*psutil.Process(process.pid).children(recursive=True), process]:
        victim.kill()
    process.wait()
    assert not (output / "state/step-00000030").exists()
    done = launch(config, *flags)
    from_steps = [start["from_step"] for start in starts(output)]
    assert from_steps in ([0, 20], [0, 25])
    state = str(output / f"state/step-{from_steps[1]:08d}")
    [line] = [line for line in done.stdout.splitlines() if state in line]
    assert re.search(rf"\b{from_steps[1]}\b", line.replace(state, ""))
    rows, expected = read_metrics(output), read_metrics(reference)
    assert [row["step"] for row in rows] == list(range(1, 31))
    for row, other in zip(rows, expected, strict=True):
        assert [row[name] for name in LOSSES] == [other[name] for name in LOSSES]
    assert same_state(output, reference)
    epoch = "checkpoints/multimodal_encoder_epoch_1.pt"
    assert torch.load(output / epoch)["loss"] == torch.load(reference / epoch)["loss"]
    log = (output / "training_log.txt").read_text()
    assert log.count(state) == 1 and len(re.findall(r"^epoch 1/20\b", log, re.MULTILINE)) == 1


@pytest.mark.parametrize(
    ("config", "flags", "facts"),
    [
        ("cpu_2proc.yaml", ["--batch_size=13"], ["--global_batch_size 13", "2", "12", "14"]),
        ("cpu.yaml --num_processes 2", [], ["accelerate_configs/cpu_2proc.yaml", "--num_processes", "MASTER_ADDR"]),
    ],
)
def test_launches_that_would_train_wrongly_are_refused(
    graph: Path, tmp_path: Path, config: str, flags: list[str], facts: list[str]
) -> None:
    arguments = settings(graph, tmp_path / "run", *flags)
    warm = config == "cpu_2proc.yaml"  # the other error is about the launcher
    done = run_warm([SCRIPT, *arguments], config) if warm else run(launch_command(config, *arguments))
    lines = [line for line in done.stderr.splitlines() if "mmgraph: error: " in line]
    [line] = [line for line in lines if "mmgraph: error: rank 1: " not in line]  # warm ranks all print the error
    assert done.returncode != 0
    assert re.search(".*".join(rf"(?<![\w-]){re.escape(fact)}(?!\w)" for fact in facts), line), line
    assert PACKAGE not in done.stderr and not (tmp_path / "run").exists()  # no line of a traceback


@pytest.mark.slow
def test_zero_with_offload_trains_as_one_process(graph: Path, one_process: Path, tmp_path: Path) -> None:
    """ZeRO-2 with offload on two processes has the losses of a run on one process without DeepSpeed."""
    config = "deepspeed_zero2_offload.yaml --num_processes 2 --mixed_precision no"
    done = accelerate_launch(config, *settings(graph, tmp_path / "run", "--max_steps=30"))
    [start] = starts(tmp_path / "run")
    assert (start["processes"], start["distributed_type"]) == (2, "DEEPSPEED")
    [line] = [line for line in done.stdout.splitlines() if re.search(r"\bDEEPSPEED\b", line)]
    assert re.search(r"\bcpu\b", line)
    final = tmp_path / "run/checkpoints/multimodal_encoder_final.pt"
    assert done.stdout.count(str(final)) == 1  # only one process writes it
    assert loss_difference(tmp_path / "run", one_process, 30) < 1e-5
