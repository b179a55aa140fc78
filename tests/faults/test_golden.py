"""The losses of 100 steps are equal to the stored ones in golden.json.

``python tests/faults/test_golden.py`` rewrites golden.json. This needs a reason, and a comparison of the losses
before and after.
"""

import json
import platform
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import WORDS, graph_files, read_metrics
from runs import brief, run

from mmgraph.demo.towers import build_towers

GOLDEN = Path(__file__).parent / "golden.json"
STEPS = 100


def environment() -> dict[str, str]:
    """Return the package versions and the CPU, which the last bits of a float32 sum depend on."""
    packages = {
        name: version(name) for name in ("torch", "torchvision", "transformers", "accelerate", "numpy", "pillow")
    }
    info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").exists() else ""
    lines = dict(line.split(":", 1) for line in info.split("\n\n")[0].splitlines())
    cpu = {key.strip(): value.strip() for key, value in lines.items()}
    model = " ".join(cpu.get(key, "") for key in ("model name", "cpu family", "model", "stepping"))
    return {**packages, "cpu": model, "kernels": torch.backends.cpu.get_cpu_capability(), "machine": platform.machine()}


def losses(graph: Path, output: Path, ranks: int = 1, **more: str) -> list[list[float]]:
    """Return the total, text-image and graph loss and the gradient norm of each of 100 steps (float32, one thread)."""
    flags = brief(graph, output, f"--max_steps={STEPS}", "--epochs=100", "--save_every=0", "--learning_rate=5e-5")
    ended = run(flags, ranks=ranks, environment=more)
    assert ended.codes == [0] * ranks, ended.said
    return [[row["loss"], row["loss_mm"], row["loss_graph"], row["grad_norm"]] for row in read_metrics(output)]


@pytest.mark.fault(
    "a code change that alters the losses of 100 steps: detected by stored losses (to the bit with the same versions)"
)
def test_losses_equal_the_stored_ones(graph: Path, tmp_path: Path) -> None:
    golden: dict[str, Any] = json.loads(GOLDEN.read_text())
    computed = losses(graph, tmp_path / "run")
    assert len(computed) == STEPS
    if environment() == golden["environment"]:
        assert computed == golden["losses"]
    assert np.abs(np.array(computed) - np.array(golden["losses"])).max() < 1e-5
    two = losses(graph, tmp_path / "two", ranks=2)
    assert np.abs(np.array(two) - np.array(golden["losses"]))[:, :3].max() < 1e-5


def main() -> None:
    """Write golden.json."""
    with tempfile.TemporaryDirectory() as name:
        graph = graph_files(Path(name) / "graph")
        build_towers(graph / "towers", [*WORDS, "node 0 1 2 3 4 5 6 7 8 9"])
        golden = {"environment": environment(), "losses": losses(graph, Path(name) / "run")}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")


if __name__ == "__main__":
    main()
