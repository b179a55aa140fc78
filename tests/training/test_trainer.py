"""Training runs in the test process: output files, resume, refused settings, stop signals."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, NamedTuple

import pandas as pd
import pytest
import targets
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import (
    error_of,
    graph_files,
    line_with,
    lines_with,
    loss_difference,
    newest,
    read_metrics,
    settings,
    stop_lines,
    tree,
    write_pending_log,
)
from launches import REPOSITORY

from mmgraph.arguments import parse_config
from mmgraph.cli import main, train_main
from mmgraph.data.batches import EdgeBatch
from mmgraph.data.graph import load_graph
from mmgraph.data.images import IMAGE_STATUS
from mmgraph.distributed.launch import build_accelerator
from mmgraph.errors import UserError
from mmgraph.training.build import build_run
from mmgraph.training.train_step import StepResult
from mmgraph.utils.log import log

LOSSES = ("loss", "loss_mm", "loss_graph")


def losses(output: Path) -> list[list[float]]:
    return [[row[name] for name in LOSSES] for row in read_metrics(output)]


class FirstStep(NamedTuple):
    """The first step of a run."""

    before: dict[str, torch.Tensor]  # the weights before the step
    trained: torch.nn.Module  # the module after the step, with the gradients
    batch: EdgeBatch
    result: StepResult


def first_step(flags: list[str]) -> FirstStep:
    config = parse_config(flags)
    run = build_run(config, build_accelerator(), load_graph(config))
    module = run.train_step.module
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    batch = next(iter(run.stream))
    return FirstStep(before, module, batch, run.train_step(batch))


@pytest.fixture(scope="module")
def run40(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 40 steps: two epochs of 16 steps, and half of a third epoch."""
    output = tmp_path_factory.mktemp("runs") / "run40"
    write_pending_log(output.with_name("before.txt"))
    assert train_main(settings(graph, output, "--max_steps=40", "--save_every=6", "--log_every=10")) == 0
    return output


def test_files_of_a_run(run40: Path) -> None:
    rows = read_metrics(run40)
    assert [row["step"] for row in rows] == list(range(1, 41))
    assert [row["epoch"] for row in rows] == [1] * 16 + [2] * 16 + [3] * 8
    assert list(rows[0]) == [
        "step", "epoch", "loss", "loss_mm", "loss_graph", "lr", "edges_per_s",
        "edges_per_s_per_process", "data_wait_s", "data_wait_share", "peak_memory_gb", "grad_norm",
    ]  # fmt: skip
    assert all(row["loss"] == pytest.approx(row["loss_mm"] + row["loss_graph"], rel=1e-6) for row in rows)
    assert {path.name for path in (run40 / "checkpoints").iterdir()} == {
        "multimodal_encoder_epoch_1.pt", "multimodal_encoder_epoch_2.pt", "multimodal_encoder_final.pt",
    }  # fmt: skip
    assert [path.name for path in sorted((run40 / "state").iterdir())] == ["step-00000036", "step-00000040"]
    text = (run40 / "training_log.txt").read_text()
    for n in (1, 2):
        mean = sum(row["loss"] for row in rows if row["epoch"] == n) / 16
        assert line_with(text, f"epoch {n}/20", f"{mean:.4f}")
        file = torch.load(run40 / f"checkpoints/multimodal_encoder_epoch_{n}.pt", weights_only=True)
        assert file["epoch"] == n and file["loss"] == pytest.approx(mean, rel=1e-6)
        assert file["optimizer_state_dict"]["state"][0]["step"] == 16 * n
    steps = [line for line in text.splitlines() if line.startswith("step ")]
    assert [line.split("/")[0] for line in steps] == ["step 10", "step 20", "step 30", "step 40"]
    assert line_with(text, 1, "NO", "cpu", 12)  # processes, distributed type, device, edges
    assert lines_with(text.splitlines()[-1], run40 / "checkpoints/multimodal_encoder_final.pt")
    state = json.loads((run40 / "state/step-00000040/state.json").read_text())
    assert (state["format"], state["step"], state["epoch"], state["samples_in_epoch"]) == (1, 40, 3, 96)
    assert state["adam_step"] == 40 and state["metrics_bytes"] == (run40 / "metrics.jsonl").stat().st_size


def test_starting_a_finished_run_again_changes_nothing(
    graph: Path, run40: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = tree(run40)
    assert train_main(settings(graph, run40, "--max_steps=40")) == 0
    assert line_with(capsys.readouterr().out, run40, "step 40", "--max_steps") and tree(run40) == before


def test_resume_with_a_higher_max_steps(graph: Path, run40: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    for steps in (3, 16, 21, 40):  # inside epoch 1, at its end, inside epoch 2, inside epoch 3
        assert train_main(settings(graph, output, f"--max_steps={steps}", "--keep_last=1")) == 0
        assert len(read_metrics(output)) == steps and len(list((output / "state").iterdir())) == 1
    assert losses(output) == losses(run40)
    final = "checkpoints/multimodal_encoder_final.pt"
    first, second = torch.load(output / final), torch.load(run40 / final)
    assert all(torch.equal(first[key], second[key]) for key in second)


def test_losses_do_not_depend_on_workers(graph: Path, tmp_path: Path) -> None:
    """The towers run live, because a run that reads stored tokens needs no workers."""
    for workers in (0, 2):
        flags = settings(graph, tmp_path / f"{workers}", "--max_steps=20", "--tower_cache=off")
        assert train_main([*flags, f"--num_workers={workers}"]) == 0
    assert losses(tmp_path / "2") == losses(tmp_path / "0")


def test_another_run_in_the_same_folder_is_refused(
    graph: Path, run40: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    shutil.copytree(run40, output)
    before = tree(output)
    other = tmp_path / "graph"
    shutil.copytree(graph, other)
    edges = (other / "edges.csv").read_text().splitlines()
    (other / "edges.csv").write_text("\n".join(edges[:-1]) + "\n")
    changed = ("temperature", 0.07, 0.1, "seed", 42, 1)  # in the order of the error message
    named_state = run40 / "state/step-00000036"
    for flags, facts in (
        (settings(graph, output, "--seed=1", "--temperature=0.1"), (output, *changed, "--run_name")),
        (settings(other, output), (output, "edges table", "--run_name")),
        (settings(graph, output, "--resume=never"), ("--resume", output, "--run_name")),
        (
            settings(graph, output, f"--resume={named_state}"),
            ("--resume", named_state, output, "step-00000040", "--run_name"),
        ),
        (settings(graph, output, "--resume=nowhere"), ("nowhere", "state.json")),
    ):
        assert train_main(flags) == 2
        error = capsys.readouterr().err
        assert error_of(error, *facts) and error.count("\n") == 1, error
    assert tree(output) == before


def test_resume_from_a_named_state_of_another_run(graph: Path, run40: Path, tmp_path: Path) -> None:
    flags = settings(graph, tmp_path / "branch", f"--resume={run40 / 'state/step-00000036'}", "--max_steps=40")
    assert train_main(flags) == 0
    assert losses(tmp_path / "branch") == losses(run40)[36:]


def test_a_damaged_state_is_never_used(
    graph: Path, run40: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    shutil.copytree(run40, output)
    state = output / "state/step-00000040"
    damaged = state / "trainable.safetensors"
    weights = bytearray(damaged.read_bytes())
    weights[-5] ^= 1
    damaged.write_bytes(weights)
    (output / "state/step-00000099").mkdir()
    (output / "state/step-10.bak").mkdir()
    (output / "state/.tmp-1").mkdir()
    assert train_main(settings(graph, output, "--max_steps=40", f"--resume={state}")) == 2
    assert error_of(capsys.readouterr().err, damaged)
    assert train_main(settings(graph, output, "--max_steps=40")) == 0
    out = capsys.readouterr().out
    assert line_with(out, damaged) and line_with(out, "step 36", output / "state/step-00000036")
    assert losses(output) == losses(run40)  # the rows after step 36 were truncated and written again
    (state / "state.json").write_text('{"format": 2}')
    assert train_main(settings(graph, output, f"--resume={state}")) == 2


def test_init_from_an_epoch_file_continues_the_run(graph: Path, run40: Path, tmp_path: Path) -> None:
    epoch_file = run40 / "checkpoints/multimodal_encoder_epoch_1.pt"
    output = tmp_path / "run"
    assert train_main(settings(graph, output, f"--init_from={epoch_file}", "--max_steps=24")) == 0
    rows = read_metrics(output)
    assert [(row["step"], row["epoch"]) for row in rows[:17]] == [(s, 2) for s in range(1, 17)] + [(17, 3)]
    assert losses(output) == losses(run40)[16:]  # same weights, Adam moments, Adam step, and order of epoch 2
    assert (output / "checkpoints/multimodal_encoder_epoch_2.pt").is_file()
    final = tmp_path / "final"
    start = run40 / "checkpoints/multimodal_encoder_final.pt"
    assert train_main(settings(graph, final, f"--init_from={start}", "--max_steps=1")) == 0
    assert read_metrics(final)[0]["epoch"] == 1


def test_init_from_other_towers_or_sizes_is_refused(
    graph: Path, run40: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "other.pt"
    state = torch.load(run40 / "checkpoints/multimodal_encoder_final.pt")
    state["text_model.text_model.final_layer_norm.weight"] += 1
    torch.save(state, path)
    assert train_main(settings(graph, tmp_path / "run", f"--init_from={path}")) == 2
    key = "text_model.text_model.final_layer_norm.weight"
    assert error_of(capsys.readouterr().err, "--init_from", path, "--model_name", graph / "towers", key)
    path = run40 / "checkpoints/multimodal_encoder_final.pt"
    flags = settings(graph, tmp_path / "run", f"--init_from={path}")
    assert train_main([*flags, "--fused_dim=64"]) == 2
    line = error_of(capsys.readouterr().err, path)
    assert "32" in re.findall(r"\d+", line) and "64" in re.findall(r"\d+", line) and "fusion." in line, line


def test_towers_are_unchanged_after_training(graph: Path, run40: Path) -> None:
    from mmgraph.towers.clip import load_towers, tower_state

    final = torch.load(run40 / "checkpoints/multimodal_encoder_final.pt")
    first = torch.load(run40 / "checkpoints/multimodal_encoder_epoch_1.pt")["model_state_dict"]
    for key, tensor in tower_state(load_towers(str(graph / "towers"))).items():
        assert torch.equal(final[key], tensor) and torch.equal(first[key], tensor)
    assert not torch.equal(final["graph_proj.weight"], first["graph_proj.weight"])


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_stop_signal_ends_the_run_and_it_resumes(
    number: signal.Signals, graph: Path, run40: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    output, flags = tmp_path / "run", settings(graph, tmp_path / "run", "--max_steps=40")
    record = resolve_name(targets.RECORD_STEP)

    def interrupted(log: Any, result: Any) -> None:
        record(log, result)
        if targets.steps_done(log) == 20:
            os.kill(os.getpid(), number)
            while not targets.stop_requested(log):  # a thread receives the signal, maybe after the next step
                time.sleep(0.001)

    with monkeypatch.context() as patch:
        patch.setattr(targets.RECORD_STEP, interrupted)
        assert train_main(flags) == 143
    assert len(stop_lines(capsys.readouterr().out, 22)) == 1 and newest(output).name == "step-00000022"
    assert not (output / "checkpoints/multimodal_encoder_final.pt").exists()
    assert train_main(flags) == 0 and losses(output) == losses(run40)


def test_a_loss_that_is_not_finite_ends_the_run(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    take_step = resolve_name(targets.TAKE_STEP)

    def stepped(step: Any, batch: Any) -> Any:
        result = take_step(step, batch)
        factor = float("nan") if targets.steps_done(step) > 8 else 1
        return result._replace(losses={name: loss * factor for name, loss in result.losses.items()})

    monkeypatch.setattr(targets.TAKE_STEP, stepped)
    assert train_main(settings(graph, tmp_path / "run", "--max_steps=20", "--save_every=5")) == 1
    assert error_of(capsys.readouterr().err, "step 9", "loss", "not_finite.jsonl")
    record = json.loads((tmp_path / "run/not_finite.jsonl").read_text())
    assert (record["step"], record["ranks"]) == (9, [0])
    assert [path.name for path in (tmp_path / "run/state").iterdir()] == ["step-00000005"]


def test_an_error_flushes_the_log(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(run: object, batch: object) -> torch.Tensor:
        log("the last line")
        raise RuntimeError("broken")

    monkeypatch.setattr(targets.TAKE_STEP, broken)
    with pytest.raises(RuntimeError):
        train_main(settings(graph, tmp_path / "run"))
    assert (tmp_path / "run/training_log.txt").read_text().endswith("the last line\n")


def test_the_loop_is_non_blocking_and_sets_gradients_to_none(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[object] = []
    zero_grad, prepare = torch.optim.AdamW.zero_grad, Accelerator.prepare
    monkeypatch.setattr(
        torch.optim.AdamW, "zero_grad", lambda self, set_to_none=True: seen.append(set_to_none) or zero_grad(self)
    )

    def prepared(self: Accelerator, *args: object) -> Any:
        objects = prepare(self, *args)
        seen.extend(loader._non_blocking for loader in objects if isinstance(loader, torch.utils.data.DataLoader))
        return objects

    monkeypatch.setattr(Accelerator, "prepare", prepared)
    assert train_main(settings(graph, tmp_path / "run", "--max_steps=3")) == 0
    assert seen == [True] * 4


def test_a_step_on_unique_nodes_has_the_gradients_of_all_rows(graph: Path, tmp_path: Path) -> None:
    """The reference is an encoder that embeds all 2B rows of the public collator, repeated nodes included."""
    from mmgraph import GraphEdgeDataset, MultimodalCollator, MultimodalGraphEncoder, info_nce_loss
    from mmgraph.data.sampler import permuted
    from mmgraph.data.tables import read_edges, read_nodes
    from mmgraph.towers.clip import load_tokenizer_and_processor

    config = parse_config(settings(graph, tmp_path / "run"))
    before, trained, batch, result = first_step(settings(graph, tmp_path / "run"))
    encoder = MultimodalGraphEncoder(config.model_name, 32, 16)
    encoder.load_state_dict(before, strict=False)
    assert len(batch.unique) < len(batch.rows) == 24
    losses_of_step = torch.stack([result.losses[name] for name in LOSSES])

    nodes = read_nodes(config.nodes)
    nodes["image_path"] = [str(graph / path.replace("\\", "/")) for path in nodes["image_path"]]
    dataset = GraphEdgeDataset(nodes, read_edges(config.edges))
    order = permuted(torch.arange(12).numpy(), 200, config.seed, 1)
    assert order.tolist() == batch.edges.tolist()
    plain = MultimodalCollator(*load_tokenizer_and_processor(config.model_name))([dataset[int(i)] for i in order])
    z_graph, z_text, z_vis = encoder(**plain)
    mm = info_nce_loss(z_text @ z_vis.T / 0.07)
    graph_loss = info_nce_loss(z_graph[:12] @ z_graph[12:].T / 0.07)
    (mm + graph_loss).backward()
    assert torch.allclose(losses_of_step, torch.stack([mm + graph_loss, mm, graph_loss]).detach(), atol=1e-5)
    exact = torch.cat([parameter.grad.flatten() for parameter in encoder.get_trainable_parameters()]).norm()
    assert float(result.grad_norm) == pytest.approx(float(exact), rel=1e-5)
    for (name, ours), theirs in zip(trained.named_parameters(), encoder.get_trainable_parameters(), strict=True):
        assert (ours.grad - theirs.grad).norm() <= 1e-5 * theirs.grad.norm(), name


def test_bad_images_are_black_and_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str], graph: Path) -> None:
    folder = graph_files(tmp_path / "graph")
    shutil.copytree(graph / "towers", folder / "towers")
    (folder / "images/1.png").unlink()
    (folder / "images/2.png").write_bytes(b"no picture")
    nodes = pd.read_csv(folder / "nodes.csv", dtype=str, keep_default_na=False)
    nodes.loc[3, "image_path"] = ""
    nodes.to_csv(folder / "nodes.csv", index=False)
    assert train_main(settings(folder, tmp_path / "run", "--max_steps=16")) == 0
    counts = [f"1 {status}" for status in IMAGE_STATUS[1:4]]
    for text in (capsys.readouterr().out, (tmp_path / "run/training_log.txt").read_text()):
        assert line_with(text, *counts)


def test_encode_writes_the_features_of_the_public_api(graph: Path, run40: Path, tmp_path: Path) -> None:
    from mmgraph import InferenceCollator, NodesDataset, load_pretrained_encoder
    from mmgraph.data.tables import read_nodes
    from mmgraph.towers.clip import load_tokenizer_and_processor

    assert main(["encode", str(run40), "--output_dir", str(tmp_path / "features")]) == 0
    encoder = load_pretrained_encoder(run40 / "checkpoints/multimodal_encoder_final.pt")  # config.yaml has the model
    nodes = read_nodes(graph / "nodes.csv")
    nodes["image_path"] = [str(graph / path.replace("\\", "/")) for path in nodes["image_path"]]
    dataset = NodesDataset(nodes)
    collator = InferenceCollator(*load_tokenizer_and_processor(str(graph / "towers")))
    expected = encoder.encode(**collator([dataset[i] for i in range(40)]))
    widths = {"fused": 32, "text_only": 128, "image_only": 128, "concat": 256}
    for name, width in widths.items():
        features = torch.load(tmp_path / f"features/features_{name}.pt", weights_only=True)
        assert features.shape == (40, width) and features.dtype == torch.float32
        assert torch.allclose(features, expected[name], atol=1e-5)


@pytest.fixture
def fresh_accelerator() -> Iterator[None]:
    """Reset Accelerate's state, which stores the precision of the first Accelerator of a process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.mark.usefixtures("fresh_accelerator")
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_reduced_precision_trains_and_resumes(
    precision: str, graph: Path, run40: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)
    output = tmp_path / "run"
    for steps in (7, 12):
        assert train_main(settings(graph, output, f"--max_steps={steps}")) == 0
    rows, expected = losses(output), losses(run40)[:12]
    ratios = [row[0] / other[0] for row, other in zip(rows, expected, strict=True)]
    assert rows != expected and max(abs(ratio - 1) for ratio in ratios) < 0.1
    final = torch.load(output / "checkpoints/multimodal_encoder_final.pt")
    assert {tensor.dtype for tensor in final.values()} == {torch.float32}


@pytest.mark.slow
def test_sigterm_to_the_process_group(graph: Path, run40: Path, tmp_path: Path) -> None:
    """The data workers stay alive, and the run writes a state before it exits."""
    output = tmp_path / "run"
    flags = settings(graph, output, "--max_steps=40", "--num_workers=2", "--save_every=4", "--tower_cache=off")
    command = [sys.executable, str(REPOSITORY / "launch.py"), *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True)
    while not (output / "state/step-00000004").exists():
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGTERM)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == 143 and len(stop_lines(out, int(newest(output).name[5:]))) == 1
    assert train_main(flags) == 0
    assert loss_difference(output, run40, 40) < 2e-6  # run40 reads stored tokens


def test_pruning_keeps_the_last_valid_state(graph: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    assert train_main(settings(graph, output, "--max_steps=10", "--save_every=5")) == 0
    (output / "state/step-00000010/trainable.safetensors").write_bytes(b"damaged")
    assert train_main(settings(graph, output, "--max_steps=8", "--keep_last=1")) == 0
    assert [path.name for path in (output / "state").iterdir()] == ["step-00000008"]
    assert train_main(settings(graph, output, "--max_steps=10", "--save_every=1", "--keep_last=2")) == 0
    assert sorted(path.name for path in (output / "state").iterdir()) == ["step-00000009", "step-00000010"]


def test_a_newer_state_format_is_refused(
    graph: Path, run40: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "run"
    shutil.copytree(run40, output)
    path = output / "state/step-00000040/state.json"
    record = json.loads(path.read_text())
    del record["sha256"]["state.json"]  # else the state is reported as damaged
    path.write_text(json.dumps({**record, "format": 2}))
    before = tree(output)
    assert train_main(settings(graph, output, "--max_steps=50")) == 2
    assert error_of(capsys.readouterr().err, path.parent, 2, 1) and tree(output) == before


def test_resume_after_the_metrics_file_was_deleted(graph: Path, run40: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    shutil.copytree(run40, output)
    (output / "metrics.jsonl").unlink()
    assert train_main(settings(graph, output, "--max_steps=42")) == 0
    assert [row["step"] for row in read_metrics(output)] == [41, 42]


def test_one_run_at_a_time_in_a_folder(graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    output.mkdir()
    hold = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.lockf(f, 2); print('held', flush=True); input()"
    command = [sys.executable, "-c", hold, str(output / ".lock")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as other:
        assert other.stdout is not None and other.stdout.readline() == "held\n"
        assert train_main(settings(graph, output, "--max_steps=2")) == 2
        other.communicate("\n")
    assert error_of(capsys.readouterr().err, output) and not (output / "metrics.jsonl").exists()
    assert train_main(settings(graph, output, "--max_steps=2")) == 0


def test_a_full_disk_is_a_one_line_error(graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "run"
    output.mkdir()
    (output / "training_log.txt").symlink_to("/dev/full")
    assert train_main(settings(graph, output, "--max_steps=9", "--log_every=1", "--log_buffer_size=1")) == 1
    err = capsys.readouterr().err
    assert error_of(err, output, os.strerror(errno.ENOSPC))
    [lost] = [line for line in lines_with(err, output / "training_log.txt") if "error" not in line]
    assert re.search(r"\d", lost.split("training_log.txt")[1]), lost  # the number of lost lines


def test_damaged_towers_are_a_one_line_error(graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("model.safetensors", "tokenizer.json"):
        towers = tmp_path / name / "towers"
        shutil.copytree(graph / "towers", towers)
        (towers / name).write_bytes((towers / name).read_bytes()[:1000])
        assert train_main([*settings(graph, tmp_path / "run"), f"--model_name={towers}"]) == 2
        err = capsys.readouterr().err
        assert err.startswith(f"mmgraph: error: --model_name {towers}") and err.count("\n") == 1


def test_encode_checks_and_counts_images(
    graph: Path, run40: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["encode", str(run40), f"--output_dir={tmp_path / 'features'}"]
    assert main([*arguments, f"--image_root={tmp_path}"]) == 2
    assert error_of(capsys.readouterr().err, 40)
    nodes = pd.read_csv(graph / "nodes.csv", dtype=str)
    nodes["image_path"] = [str(graph / path.replace("\\", "/")) for path in nodes["image_path"]]
    nodes.loc[7, "image_path"] = "a" * 300 + ".png"  # longer than any file system allows
    nodes.to_csv(tmp_path / "nodes.csv", index=False)
    assert main([*arguments, f"--nodes={tmp_path / 'nodes.csv'}"]) == 0
    line = line_with(capsys.readouterr().out, f"1 {IMAGE_STATUS[3]}")
    assert not any(status in line for status in IMAGE_STATUS[1:] if status != IMAGE_STATUS[3])


def test_max_grad_norm_clips_the_gradients(graph: Path, tmp_path: Path) -> None:
    trained = first_step(settings(graph, tmp_path / "run", "--max_grad_norm=0.001")).trained
    norm = torch.cat([parameter.grad.flatten() for parameter in trained.parameters()]).norm()
    assert float(norm) == pytest.approx(0.001, rel=1e-3)


def test_warmup_and_cosine_schedule(graph: Path, tmp_path: Path) -> None:
    flags = settings(graph, tmp_path / "run", "--max_steps=10", "--lr_schedule=cosine", "--warmup_steps=4")
    assert train_main(flags) == 0
    rates = [row["lr"] for row in read_metrics(tmp_path / "run")]
    assert rates[:4] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3]) and rates[6] == pytest.approx(5e-4)
    assert rates[-1] == pytest.approx(0, abs=1e-12)
    assert train_main([*flags, "--max_steps=12"]) == 2  # refused: a cosine schedule depends on max_steps


def test_a_wrong_world_size_and_fsdp_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    build_accelerator()
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(UserError, match=r"\b4\b.*\b1\b"):
        build_accelerator()
    monkeypatch.delenv("WORLD_SIZE")
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(UserError, match="FSDP"):
        build_accelerator()


@pytest.mark.parametrize(
    ("flags", "remedy"),
    [
        ((), ("set --micro_batch_size", 6, "now", 12, "edges")),
        (("--micro_batch_size=3",), ("set --micro_batch_size", 1, "now", 3, "edges")),
        (("--micro_batch_size=1",), ("set a smaller --global_batch_size",)),
    ],
    ids=["whole", "micro", "one"],
)
def test_exhausted_memory_names_the_size_to_set(
    flags: tuple[str, ...],
    remedy: tuple[object, ...],
    graph: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1 GiB free. Advice.")

    monkeypatch.setattr(targets.FORWARD, fail)
    assert train_main(settings(graph, tmp_path / "run", "--max_steps=2", *flags)) == 1
    error_of(capsys.readouterr().err, "CUDA out of memory", "Tried to allocate", "2.00 GiB", *remedy)
