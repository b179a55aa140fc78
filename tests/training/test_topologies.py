"""Equal training on every topology, with and without micro batches, and resume on another topology."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import loss_difference, newest, same_state, settings
from launches import REPOSITORY, ZERO3, launch, run_warm
from safetensors.torch import load_file

FLOAT32 = "--mixed_precision no"
ONE_MACHINE = "--num_machines 1 --machine_rank 0 --main_process_ip 127.0.0.1"
# Every accelerate config that starts several processes, with the flags that a user adds.
CONFIGS = {
    "cpu_2proc": "",
    "multi_gpu": "--num_processes 2",
    "deepspeed_zero1": "--num_processes 2",
    "deepspeed_zero2": "--num_processes 2",
    "deepspeed_zero3": "--num_processes 2",
    "deepspeed_zero2_offload": "--num_processes 2",
    "deepspeed_zero3_offload": "--num_processes 2",
    "multi_node": f"--num_processes 2 {ONE_MACHINE}",
    "multi_node_zero2": f"--num_processes 2 {ONE_MACHINE}",
    "multi_node_zero3": f"--num_processes 2 {ONE_MACHINE}",
}
# Bound on the loss difference in 30 steps, for losses of 3 to 6. In bf16, activations have 8 bits of mantissa; under
# ZeRO, weights do too.
BF16 = 0.05
TOPOLOGIES = {
    "1 process": "cpu.yaml",
    "DDP-2": "cpu_2proc.yaml",
    "DDP-3": "cpu_2proc.yaml --num_processes 3",
    "ZeRO-1": f"deepspeed_zero1.yaml --num_processes 2 {FLOAT32}",
    "ZeRO-2": f"deepspeed_zero2.yaml --num_processes 2 {FLOAT32}",
    "ZeRO-3": ZERO3,
}


def test_configs_are_complete() -> None:
    """``CONFIGS`` has every accelerate config except those of one process."""
    files = {path.stem for path in (REPOSITORY / "accelerate_configs").glob("*.yaml")}
    assert files - {"cpu", "single_gpu"} == CONFIGS.keys()


def test_resume_on_five_topologies(graph: Path, one_process: Path, tmp_path: Path) -> None:
    """Losses, weights and moments match a run on one process.

    The run makes six steps on each topology: one process, ZeRO-3, ZeRO-1, DDP-3, ZeRO-2.
    """
    output = tmp_path / "run"
    for i, name in enumerate(["1 process", "ZeRO-3", "ZeRO-1", "DDP-3", "ZeRO-2"]):
        launch(TOPOLOGIES[name], *settings(graph, output, f"--max_steps={6 * (i + 1)}"))
    assert loss_difference(output, one_process, 30) < 1e-5
    for file in ("trainable.safetensors", "optimizer.safetensors"):
        ours, theirs = load_file(newest(output) / file), load_file(newest(one_process) / file)
        assert ours.keys() == theirs.keys()
        for key in theirs:
            # The exact gradient of the keys' bias is zero, and Adam amplifies its rounding errors.
            if "in_proj_bias" not in key:
                assert (ours[key] - theirs[key]).norm() <= 1e-3 * theirs[key].norm(), key


# Prints how many parameters ZeRO-3 keeps complete on each rank, instead of partitioned.
PERSISTENT = """
import sys
from mmgraph.arguments import parse_config
from mmgraph.data.graph import load_graph
from mmgraph.training.build import build_run
from mmgraph.distributed.launch import build_accelerator
config = parse_config(sys.argv[1:])
accelerator = build_accelerator()
parameters = list(build_run(config, accelerator, load_graph(config)).train_step.module.module.parameters())
if accelerator.is_main_process:
    print(sum(p.ds_persist for p in parameters), "of", len(parameters), "whole")
"""


def test_zero3_partitions_every_parameter(graph: Path, tmp_path: Path) -> None:
    """The ZeRO-3 config of the tests sets no parameter as persistent.

    By default, DeepSpeed would keep small parameters complete on every rank, and the tests would not cover partitions.
    """
    (tmp_path / "launch.py").write_text(PERSISTENT)
    done = run_warm([str(tmp_path / "launch.py"), *settings(graph, tmp_path / "run")], ZERO3)
    assert "0 of 32 whole" in done.stdout, done.stdout + done.stderr[-3000:]


@pytest.mark.slow
def test_zero3_resumes_bit_for_bit(graph: Path, one_process: Path, zero3: Path, tmp_path: Path) -> None:
    """A ZeRO-3 run that is resumed at step 13 equals an uninterrupted one, which matches a run on one process."""
    assert loss_difference(zero3, one_process, 30) < 1e-5
    for steps in (13, 30):
        launch(TOPOLOGIES["ZeRO-3"], *settings(graph, tmp_path / "run", f"--max_steps={steps}"))
    assert loss_difference(tmp_path / "run", zero3, 30) == 0.0
    assert same_state(tmp_path / "run", zero3)


def test_zero3_writes_the_original_file_format(graph: Path, zero3: Path, one_process: Path) -> None:
    """The epoch and final files match those of one process: names, order, dtypes and values.

    torch's AdamW can load the optimizer state.
    """
    from mmgraph import load_pretrained_encoder

    epoch, final = (f"checkpoints/multimodal_encoder_{name}.pt" for name in ("epoch_1", "final"))
    ours, theirs = torch.load(zero3 / epoch), torch.load(one_process / epoch)
    assert list(ours) == list(theirs) == ["epoch", "model_state_dict", "optimizer_state_dict", "loss"]
    assert ours["epoch"] == 1 and ours["loss"] == pytest.approx(theirs["loss"], abs=1e-5)
    assert list(ours["model_state_dict"]) == list(theirs["model_state_dict"]) == list(torch.load(zero3 / final))
    for key, tensor in theirs["model_state_dict"].items():
        other = ours["model_state_dict"][key]
        assert other.dtype == tensor.dtype == torch.float32 and other.shape == tensor.shape
        if "in_proj_bias" not in key:
            assert torch.allclose(other, tensor, atol=1e-4), key
    assert ours["optimizer_state_dict"]["param_groups"] == theirs["optimizer_state_dict"]["param_groups"]
    encoder = load_pretrained_encoder(zero3 / final, device="cpu", model_name=str(graph / "towers"))
    optimizer = torch.optim.AdamW(encoder.get_trainable_parameters(), lr=1e-3, weight_decay=1e-4)
    optimizer.load_state_dict(ours["optimizer_state_dict"])
    for i, state in theirs["optimizer_state_dict"]["state"].items():
        other = ours["optimizer_state_dict"]["state"][i]
        assert float(other["step"]) == float(state["step"]) == 16
        for moment in ("exp_avg", "exp_avg_sq"):
            assert other[moment].shape == state[moment].shape and other[moment].dtype == torch.float32
            assert torch.allclose(other[moment], state[moment], atol=1e-4)


@pytest.mark.parametrize("name", ["DDP-2", pytest.param("ZeRO-2", marks=pytest.mark.slow)])
def test_gradients_in_parts_are_those_of_the_whole(graph: Path, tmp_path: Path, name: str) -> None:
    """Gradients in 2, 4 and 8 micro batches match those of one batch of 16 edges, on each of two processes."""
    script, target = str(Path(__file__).parent / "micro_batch_gradients.py"), str(tmp_path / "gradients.pt")
    done = run_warm([script, target, *settings(graph, tmp_path / "run", "--batch_size=32")], TOPOLOGIES[name])
    assert done.returncode == 0, done.stderr[-3000:]
    reference, *parts = torch.load(target)
    norm = torch.cat([gradient.flatten() for gradient in reference]).norm()
    assert norm > 0.1
    for number, gradients in zip((2, 4, 8), parts, strict=True):
        difference = torch.cat([(a - b).flatten() for a, b in zip(gradients, reference, strict=True)]).norm() / norm
        print(f"1/{number}: {float(difference):.1e}")
        assert 0 <= difference < 1e-5


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("1 process", "DDP-2", "ZeRO-1", "ZeRO-2")]


@pytest.mark.parametrize("name", [pytest.param("ZeRO-3", marks=pytest.mark.slow), *SLOW])
def test_micro_batches_have_the_same_losses(graph: Path, one_process: Path, tmp_path: Path, name: str) -> None:
    """The losses of 30 steps match a run on one process without micro batches.

    Ranks have different numbers of unique nodes. Under ZeRO-3 they must still run the same number of micro batches.
    """
    launch(TOPOLOGIES[name], *settings(graph, tmp_path / "run", "--max_steps=30", "--micro_batch_size=1"))
    assert loss_difference(tmp_path / "run", one_process, 30) < 1e-5


@pytest.mark.slow
def test_table_of_all_configs(graph: Path, one_process: Path, tmp_path: Path) -> None:
    """Check the losses of 30 steps with every config, in float32 and bf16, and print the table in the README."""
    print("\n| config | float32 | bf16 |\n| --- | --- | --- |")
    for name, flags in CONFIGS.items():
        differences = []
        for precision in ("no", "bf16"):
            output = tmp_path / f"{name}_{precision}"
            launch(f"{name}.yaml {flags} --mixed_precision {precision}", *settings(graph, output, "--max_steps=30"))
            differences.append(loss_difference(output, one_process, 30))
        print(f"| `{name}.yaml` | {differences[0]:.1e} | {differences[1]:.1e} |", flush=True)
        assert differences[0] < 1e-5 and differences[1] < BF16, name


@pytest.mark.slow
def test_resume_matrix(graph: Path, one_process: Path, tmp_path: Path) -> None:
    """A run makes 12 steps on one topology and 12 more on another, for all pairs of topologies.

    The losses match an uninterrupted run on one process. If both topologies are the same, losses and state equal an
    uninterrupted run on it to the bit.
    """
    print("\n| from \\ to | " + " | ".join(TOPOLOGIES) + " |\n|" + " --- |" * (len(TOPOLOGIES) + 1))
    for first, config in TOPOLOGIES.items():
        started, row = tmp_path / f"{first} begun", []
        launch(config, *settings(graph, started, "--max_steps=12"))
        for second, other in TOPOLOGIES.items():
            output = tmp_path / f"{first} to {second}"
            shutil.copytree(started, output)
            launch(other, *settings(graph, output, "--max_steps=24"))
            row.append(loss_difference(output, one_process, 24))
            if first == second:
                uninterrupted = tmp_path / f"{first} whole"
                launch(config, *settings(graph, uninterrupted, "--max_steps=24"))
                assert loss_difference(output, uninterrupted, 24) == 0.0 and same_state(output, uninterrupted), first
        print(f"| {first} | " + " | ".join(f"{difference:.0e}" for difference in row) + " |", flush=True)
        assert max(row) < 1e-5, first
