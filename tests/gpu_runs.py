"""Shared by the tests in tests/gpu: the device, when a test is skipped, and runs that several tests compare.

``MMGRAPH_REHEARSE_GPU=1`` runs the tests on a CPU, so that their code runs where there is no GPU. Tests of CUDA itself
are skipped then.
"""

import json
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import newest, settings
from launches import launch_command, run

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")
REHEARSAL = os.environ.get("MMGRAPH_REHEARSE_GPU") == "1" and not CUDA
on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not CUDA and not REHEARSAL, reason="no CUDA device (MMGRAPH_REHEARSE_GPU=1 uses the CPU)"),
]
needs_cuda = pytest.mark.skipif(not CUDA, reason="no CUDA device")

STEPS = 30
RUN_BOUNDS = {"no": 1e-4, "bf16": 5e-2, "fp16": 1e-2}  # largest difference of a loss in 30 steps of a small run
DTYPES = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
PRECISIONS = ["no", "bf16", pytest.param("fp16", marks=needs_cuda)]  # a CPU has no fp16 loss scaler


def train(config: str, output: Path, graph: Path, *flags: str, **environment: str) -> str:
    """Train through ``accelerate launch`` and return the output of the run. Check that the run succeeds."""
    done = run(launch_command(config, *settings(graph, output, *flags)), **environment)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done.stdout


def set_loss_scale(output: Path, scale: float) -> None:
    """Set the fp16 loss scale in the newest resume state of a run."""
    path = newest(output) / "state.json"
    state = json.loads(path.read_text())
    state["loss_scale"] = {"scale": scale, "_growth_tracker": 0}
    del state["sha256"]["state.json"]  # the record's own hash; a record without it is accepted
    path.write_text(json.dumps(state))


def loss_scale(output: Path) -> float:
    """Return the fp16 loss scale in the newest resume state of a run."""
    return float(json.loads((newest(output) / "state.json").read_text())["loss_scale"]["scale"])


@pytest.fixture(scope="session")
def trained(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Return the output folder of a run of 30 steps on the device, by precision: ``no``, ``bf16`` or ``fp16``.

    ``cpu`` is the same run in float32 on the CPU. ``evaluated`` is a bf16 run with held-out edges. Each run is made
    once.
    """
    folder = tmp_path_factory.mktemp("gpu")

    @cache
    def output_of(precision: str) -> Path:
        output, flags = folder / precision, (f"--max_steps={STEPS}", "--save_every=10")
        if precision == "cpu":
            train("cpu.yaml", output, graph, *flags, CUDA_VISIBLE_DEVICES="")
        elif precision == "fp16":
            # From the initial loss scale, 65,536, the first steps would be skipped.
            train("single_gpu.yaml --mixed_precision no", output, graph, "--max_steps=1")
            set_loss_scale(output, 1024.0)
            train("single_gpu.yaml --mixed_precision fp16", output, graph, *flags)
        elif precision == "evaluated":
            train("single_gpu.yaml", output, graph, *flags, "--eval_fraction=0.1")
        else:
            train(f"single_gpu.yaml --mixed_precision {precision}", output, graph, *flags)
        return output

    return output_of
