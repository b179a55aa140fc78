"""Every topology: the same training on each, in micro batches too, and one state that resumes under any other."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import loss_difference, newest, same_state, settings
from launches import REPOSITORY, ZERO3, launch, run_warm
from safetensors.torch import load_file

FLOAT32 = "--mixed_precision no"
ONE_MACHINE = "--num_machines 1 --machine_rank 0 --main_process_ip 127.0.0.1"
CONFIGS = {  # every file that starts several processes, with the flags that its user gives
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
BF16 = 0.05  # of a loss of 3 to 6, in 30 steps: activations, and under ZeRO also weights, have 8 bits of mantissa
TOPOLOGIES = {
    "1 process": "cpu.yaml",
    "DDP-2": "cpu_2proc.yaml",
    "DDP-3": "cpu_2proc.yaml --num_processes 3",
    "ZeRO-1": f"deepspeed_zero1.yaml --num_processes 2 {FLOAT32}",
    "ZeRO-2": f"deepspeed_zero2.yaml --num_processes 2 {FLOAT32}",
    "ZeRO-3": ZERO3,
}


def test_every_config_is_here() -> None:
    files = {path.stem for path in (REPOSITORY / "accelerate_configs").glob("*.yaml")}
    assert files - {"cpu", "single_gpu"} == CONFIGS.keys()


def test_a_run_wanders_through_topologies(graph: Path, one_process: Path, tmp_path: Path) -> None:
    """One process, then ZeRO-3, ZeRO-1, DDP-3, ZeRO-2: six steps on each, as if nothing had happened."""
    output = tmp_path / "run"
    for i, name in enumerate(["1 process", "ZeRO-3", "ZeRO-1", "DDP-3", "ZeRO-2"]):
        launch(TOPOLOGIES[name], *settings(graph, output, f"--max_steps={6 * (i + 1)}"))
    assert loss_difference(output, one_process, 30) < 1e-5
    for file in ("trainable.safetensors", "optimizer.safetensors"):
        ours, theirs = load_file(newest(output) / file), load_file(newest(one_process) / file)
        assert ours.keys() == theirs.keys()
        for key in theirs:
            if "in_proj_bias" not in key:  # of the keys' bias, which has no true gradient, Adam amplifies rounding
                assert (ours[key] - theirs[key]).norm() <= 1e-3 * theirs[key].norm(), key


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


def test_zero3_is_tested_with_partitions(graph: Path, tmp_path: Path) -> None:
    """The tests' ZeRO-3 keeps no parameter whole on a rank."""
    (tmp_path / "launch.py").write_text(PERSISTENT)
    done = run_warm([str(tmp_path / "launch.py"), *settings(graph, tmp_path / "run")], ZERO3)
    assert "0 of 32 whole" in done.stdout, done.stdout + done.stderr[-3000:]


def test_zero3_resumes_to_the_bit(graph: Path, one_process: Path, zero3: Path, tmp_path: Path) -> None:
    assert loss_difference(zero3, one_process, 30) < 1e-5
    for steps in (13, 30):
        launch(TOPOLOGIES["ZeRO-3"], *settings(graph, tmp_path / "run", f"--max_steps={steps}"))
    assert loss_difference(tmp_path / "run", zero3, 30) == 0.0
    assert same_state(tmp_path / "run", zero3)


def test_files_written_under_zero3_are_the_originals(graph: Path, zero3: Path, one_process: Path) -> None:
    """Names, order, dtypes and values; torch's own AdamW takes the optimizer's part and goes on with it."""
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


@pytest.mark.parametrize("name", ["DDP-2", "ZeRO-2"])
def test_gradients_in_parts_are_those_of_the_whole(graph: Path, tmp_path: Path, name: str) -> None:
    """Halves, quarters and eighths of a process's 16 edges, over two processes."""
    script, target = str(Path(__file__).parent / "micro_batch_gradients.py"), str(tmp_path / "gradients.pt")
    done = run_warm([script, target, *settings(graph, tmp_path / "run", "--batch_size=32")], TOPOLOGIES[name])
    assert done.returncode == 0, done.stderr[-3000:]
    whole, *parts = torch.load(target)
    norm = torch.cat([gradient.flatten() for gradient in whole]).norm()
    assert norm > 0.1
    for number, gradients in zip((2, 4, 8), parts, strict=True):
        difference = torch.cat([(a - b).flatten() for a, b in zip(gradients, whole, strict=True)]).norm() / norm
        print(f"1/{number}: {float(difference):.1e}")
        assert 0 <= difference < 1e-5


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("1 process", "DDP-2", "ZeRO-1", "ZeRO-2")]


@pytest.mark.parametrize("name", ["ZeRO-3", *SLOW])
def test_a_run_in_micro_batches(graph: Path, one_process: Path, tmp_path: Path, name: str) -> None:
    """Ranks have different numbers of distinct nodes, and must still make the same number of parts under ZeRO-3."""
    launch(TOPOLOGIES[name], *settings(graph, tmp_path / "run", "--max_steps=30", "--micro_batch_size=1"))
    assert loss_difference(tmp_path / "run", one_process, 30) < 1e-5


@pytest.mark.slow
def test_table_of_all_configs(graph: Path, one_process: Path, tmp_path: Path) -> None:
    """Prints the README's table."""
    print("\n| config | float32 | bf16 |\n| --- | --- | --- |")
    for name, flags in CONFIGS.items():
        worst = []
        for precision in ("no", "bf16"):
            output = tmp_path / f"{name}_{precision}"
            launch(f"{name}.yaml {flags} --mixed_precision {precision}", *settings(graph, output, "--max_steps=30"))
            worst.append(loss_difference(output, one_process, 30))
        print(f"| `{name}.yaml` | {worst[0]:.1e} | {worst[1]:.1e} |", flush=True)
        assert worst[0] < 1e-5 and worst[1] < BF16, name


@pytest.mark.slow
def test_resume_matrix(graph: Path, one_process: Path, tmp_path: Path) -> None:
    """12 steps on each, 12 more on each, against 24 in one go on one process; on the same one, to the bit."""
    print("\n| from \\ to | " + " | ".join(TOPOLOGIES) + " |\n|" + " --- |" * (len(TOPOLOGIES) + 1))
    for first, config in TOPOLOGIES.items():
        begun, row = tmp_path / f"{first} begun", []
        launch(config, *settings(graph, begun, "--max_steps=12"))
        for second, other in TOPOLOGIES.items():
            output = tmp_path / f"{first} to {second}"
            shutil.copytree(begun, output)
            launch(other, *settings(graph, output, "--max_steps=24"))
            row.append(loss_difference(output, one_process, 24))
            if first == second:
                whole = tmp_path / f"{first} whole"
                launch(config, *settings(graph, whole, "--max_steps=24"))
                assert loss_difference(output, whole, 24) == 0.0 and same_state(output, whole), first
        print(f"| {first} | " + " | ".join(f"{worst:.0e}" for worst in row) + " |", flush=True)
        assert max(row) < 1e-5, first
