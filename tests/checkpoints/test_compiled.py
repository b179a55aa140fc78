"""Runs whose module Accelerate compiles: the files have the original trainer's keys, and the losses are the same."""

import json
from pathlib import Path

import pytest
import torch
from conftest import LOSSES, read_metrics, settings
from launches import run_warm
from safetensors.torch import load_file

ZERO2 = "deepspeed_zero2.yaml --num_processes 2 --mixed_precision no"
EAGER = {"ACCELERATE_DYNAMO_BACKEND": "EAGER"}  # the module is traced by torch.compile, and run without generated code
EVALUATED = ("--eval_fraction=0.2", "--eval_every=4", "--save_every=4", "--keep_last=9", "--keep_best=fused/mrr")


# launch.py, which also prints a line for each call of torch.compile
LAUNCH = """
import sys
import torch
compile = torch.compile
torch.compile = lambda *arguments, **more: print("torch.compile is called") or compile(*arguments, **more)
from mmgraph.cli import leave, train_main
leave(train_main(sys.argv[1:]))
"""


def train(graph: Path, output: Path, steps: int, *more: str, config: str = "cpu.yaml", compiled: bool = True) -> Path:
    """Train up to a step, in new processes. Check that each rank has compiled the module if this was set."""
    program = output.with_name(f"{output.name}.py")
    program.write_text(LAUNCH)
    flags = settings(graph, output, f"--max_steps={steps}", "--batch_size=40", *EVALUATED, *more)
    ended = run_warm([str(program), *flags], config, **(EAGER if compiled else {}))
    assert not any(ended.codes), ended.said[-3000:]
    calls = ended.stdout.count("torch.compile is called")
    assert calls >= len(ended.codes) if compiled else calls == 0
    return output


def tensors(path: Path) -> tuple[dict[str, torch.Tensor], dict[int, dict[str, torch.Tensor]]]:
    """Return the tensors in a checkpoint or safetensors file, by key, and the optimizer's state, by parameter."""
    if path.suffix == ".safetensors":
        return load_file(path), {}
    content = torch.load(path, weights_only=True)
    return content.get("model_state_dict", content), content.get("optimizer_state_dict", {}).get("state", {})


def tensor_files(output: Path) -> set[Path]:
    """Return the checkpoints, and the files in the states of steps 4, 8 and 10. The stop adds a state of step 6."""
    files = {path.relative_to(output) for name in ("*.pt", "*.safetensors") for path in output.rglob(name)}
    return {file for file in files if file.parent.name != "step-00000006"}


def check_files(output: Path, reference: Path, equal: bool) -> None:
    """Check that two runs have the same files with the same keys and shapes, and if ``equal`` the same tensors."""
    files = tensor_files(reference)
    assert tensor_files(output) == files
    assert {file.name for file in files} == {
        *(f"multimodal_encoder_{name}.pt" for name in ("epoch_1", "epoch_2", "best", "final")),
        "trainable.safetensors", "optimizer.safetensors",
    }  # fmt: skip
    for file in files:
        (first, moments), (second, other_moments) = (tensors(folder / file) for folder in (output, reference))
        assert {name: tensor.shape for name, tensor in first.items()} == {n: t.shape for n, t in second.items()}, file
        assert moments.keys() == other_moments.keys() and bool(moments) == ("epoch" in file.name)
        if equal:
            assert all(torch.equal(first[name], tensor) for name, tensor in second.items()), file
            for index, moment in other_moments.items():
                assert all(torch.equal(moments[index][name], tensor) for name, tensor in moment.items()), file


def check_losses(output: Path, reference: Path, bound: float) -> None:
    """Check that the losses of two runs differ by at most ``bound``. With a bound of 0, also compare the metrics.

    The run may have more evaluations than the reference.
    """
    rows, expected = read_metrics(output), read_metrics(reference)
    assert [row["step"] for row in rows] == [row["step"] for row in expected]
    for row, other in zip(rows, expected, strict=True):
        assert max((abs(row[name] - other[name]) for name in LOSSES if name in other), default=0) <= bound
        metrics = {name for name in other if name.startswith("eval/")}
        assert metrics <= row.keys() and bool(metrics) == (other["step"] in (0, 4, 8, 10))
        assert bound or all(row[name] == other[name] for name in metrics)


@pytest.fixture(scope="module")
def plain(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 10 steps without compilation: two epochs of 4 steps, and 2 steps of a third epoch."""
    return train(graph, tmp_path_factory.mktemp("runs") / "plain", 10, compiled=False)


@pytest.mark.parametrize(
    ("config", "more", "bound"),
    [
        pytest.param("cpu.yaml", (), 0, id="one batch"),
        pytest.param("cpu.yaml", ("--micro_batch_size=16",), 2e-6, id="micro batches", marks=pytest.mark.slow),
        pytest.param("cpu_2proc.yaml", (), 2e-6, id="DDP", marks=pytest.mark.slow),
        pytest.param(ZERO2, (), 2e-6, id="ZeRO-2", marks=pytest.mark.slow),
        pytest.param(ZERO2, ("--micro_batch_size=8",), 2e-6, id="ZeRO-2, micro batches", marks=pytest.mark.slow),
    ],
)
def test_a_compiled_run_stops_and_resumes(
    config: str, more: tuple[str, ...], bound: float, graph: Path, plain: Path, tmp_path: Path
) -> None:
    """The run ends at step 6, inside epoch 2, and a second start resumes it."""
    output = tmp_path / "run"
    for steps in (6, 10):
        train(graph, output, steps, *more, config=config)
    check_losses(output, plain, bound)
    check_files(output, plain, equal=not bound)
    step, adam = (json.loads((output / "state/step-00000010/state.json").read_text())[n] for n in ("step", "adam_step"))
    assert step == adam == 10
