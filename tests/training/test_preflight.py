"""Start-up checks: differences between ranks, batch, output folder, devices, trackers, memory estimate."""

import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path
from pkgutil import resolve_name

import pytest
import torch
from conftest import settings
from launches import REPOSITORY, launch, run_warm
from targets import (
    CHECK_AGREEMENT,
    DEEPSPEED_IS_INSTALLED,
    DESCRIBE_WORLD,
    GATHER_OF_TOWERS,
    HOST_MEMORY,
    TENSORBOARD_IS_INSTALLED,
    WANDB_IS_INSTALLED,
)

from mmgraph.cli import train_main
from mmgraph.config import Config
from mmgraph.distributed.launch import check_gpus
from mmgraph.errors import UserError
from mmgraph.towers.fingerprint import check_same_towers, file_fingerprints
from mmgraph.towers.load import empty_towers
from mmgraph.training.estimate import memory_gb, model_sizes
from mmgraph.training.preflight import SAME_EVERYWHERE, Rank

check_agreement = resolve_name(CHECK_AGREEMENT)


def test_check_logs_all_findings_and_writes_no_files(graph: Path, tmp_path: Path) -> None:
    """With two processes, only the main rank logs: one line per finding."""
    done = launch("cpu_2proc.yaml", *settings(graph, tmp_path / "run", "--check", "--micro_batch_size=2"))
    expected = [
        r"2\b.*\bMULTI_CPU\b.*\bcpu\b.*\b\d+ .*\bno\b.*\b12\b.*\b6\b.*",  # processes, precision, edges
        r"2\b.*\b1\b.*(127.0.0.1|localhost):\d+",  # processes, hosts
        r"rank 0: \S+, cpu\b.*\b\d+ .*[\d.]+ .*[\d.]+ GB\b.*",
        r"rank 1: \S+, cpu\b.*\b\d+ .*[\d.]+ .*[\d.]+ GB\b.*",
        f".*{', '.join(SAME_EVERYWHERE)}",
        r"12\b.*\b6\b.*\b2\b.*\b16\b.*\b8\b.*\b200\b.*",  # edges per step, rank and micro batch; steps; skipped edges
        rf"{re.escape(str(tmp_path / 'run'))}: .*[\d.]+ GB\b.*[\d.]+ GB",
        r"\D*[\d.]+ GB\D*",  # memory per process
        r"\D*[\d.]+ MB\b\D*",  # stored tokens
        r"\D*[\d.e+-]+ s\b\D*60%\D*[\d,]+ GFLOP/s\D*",  # time of a step
        r"\D*\b40\b\D*\b200\b\D*",  # nodes, edges
    ]
    # The first start on the graph may also log the conversion of its tables.
    lines = [line for line in done.stdout.strip().split("\n") if ": converted in " not in line]
    assert len(lines) == len(expected), lines
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("differ", "message"),
    [
        ("sys.argv += ['--seed', rank]", r"rank 1\b.*\bsettings\b.*\brank 0\b.*\bseed 1\b"),
        pytest.param(
            "sys.argv += ['--edges', OTHER] if rank == '1' else []", r"rank 1: .*src_id", marks=pytest.mark.slow
        ),
    ],
)
def test_the_error_names_the_rank_that_differs(graph: Path, tmp_path: Path, differ: str, message: str) -> None:
    script = tmp_path / "launch.py"
    other = f"OTHER = {str(graph / 'nodes.csv')!r}"
    script.write_text(
        f"import os, runpy, sys\nrank = os.environ['RANK']\n{other}\n{differ}\n"
        f"runpy.run_path({str(REPOSITORY / 'launch.py')!r}, run_name='__main__')\n"
    )
    done = run_warm([str(script), *settings(graph, tmp_path / "run")], "cpu_2proc.yaml")
    assert done.returncode != 0 and re.search(message, done.stderr), done.stderr
    lines = done.stderr.splitlines()
    assert all(line.startswith("mmgraph: error: ") for line in lines)
    # Rank 1 repeats the error after its number, if a launcher has not ended it before.
    assert len({line.removeprefix("mmgraph: error: ").removeprefix("rank 1: ") for line in lines}) == 1
    assert not (tmp_path / "run").exists()


def make_rank(**same_everywhere: object) -> Rank:
    values = dict.fromkeys(SAME_EVERYWHERE, "x") | same_everywhere
    return Rank("host", "cuda:0", 10.0, 80.0, 4, 8, 1e12, values)


@pytest.mark.parametrize("what", SAME_EVERYWHERE)
def test_a_difference_between_ranks_is_an_error(what: str) -> None:
    check_agreement([make_rank(), make_rank()])
    with pytest.raises(UserError, match=rf"rank 2\b.*\b{what}\b.*\brank 0\b.*\by\b.*\bx\b.*{SAME_EVERYWHERE[what]}"):
        check_agreement([make_rank(), make_rank(), make_rank(**{what: "y"})])


def test_towers_are_compared_by_their_files(graph: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(graph / "towers", tmp_path / "towers")
    first = file_fingerprints(str(graph / "towers"))
    assert "config.json" in first and file_fingerprints(str(copy)) == first and file_fingerprints("no/model") == {}
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    second = file_fingerprints(str(copy))
    with pytest.raises(UserError, match=r"rank 1\b.*\btowers\b.*\brank 0\b.*\bmodel.safetensors [0-9a-f]+\b"):
        check_agreement([make_rank(towers=first), make_rank(towers=second)])
    # These are not errors: a rank has not downloaded the model yet, or it has an additional file.
    check_agreement([make_rank(towers=first), make_rank(towers={}), make_rank(towers=first | {"vocab.json": "x"})])


def test_different_loaded_towers_are_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GATHER_OF_TOWERS, lambda _: [("one", "a"), ("one", "a"), ("two", "b")])
    with pytest.raises(UserError, match=rf"rank 2 \(two\) .*\btowers\b.*\brank 0 \(one\).*{SAME_EVERYWHERE['towers']}"):
        check_same_towers("a")


def test_too_few_or_too_many_visible_gpus() -> None:
    check_gpus(4, 4)
    with pytest.raises(UserError, match=r"\b8\b.*\b4\b.*--num_processes\b"):
        check_gpus(8, 4)
    accelerator = namedtuple("Accelerator", "device")(torch.device("cuda"))
    lines = resolve_name(DESCRIBE_WORLD)(accelerator, [make_rank(), make_rank()])
    assert lines[1].startswith("warning: host ") and re.findall(r"\d+", lines[1]) == ["8", "4"]
    assert "--num_processes" in lines[1]


def test_a_full_disk_is_an_error_before_training(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 2_000_000))
    assert train_main(settings(graph, tmp_path / "run")) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith(f"mmgraph: error: --output_dir {tmp_path / 'run'}: ")
    assert re.search(r"\b2 MB\b.*\b5\.1 MB\b", error) and not (tmp_path / "run").exists()
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 50_000_000))
    assert train_main(settings(graph, tmp_path / "run", "--max_steps=1")) == 0
    [warning] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert str(tmp_path / "run") in warning and warning.count(" 0.1 GB") == 2


def test_too_little_memory_is_a_warning(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(HOST_MEMORY, lambda: (500_000_000, 1_000_000_000))
    assert train_main(settings(graph, tmp_path / "run", "--check")) == 0
    [warning] = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert all(fact in warning for fact in ("rank 0 ", " 0.9 GB", " 0.5 GB", "--micro_batch_size 3"))


@pytest.mark.parametrize("package", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_installed(
    package: str, graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    targets = {"tensorboard": TENSORBOARD_IS_INSTALLED, "wandb": WANDB_IS_INSTALLED}
    monkeypatch.setattr(targets[package], lambda: False)
    assert train_main(settings(graph, tmp_path / "run", "--report_to=all")) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith("mmgraph: error: --report_to all: ") and f"pip install {package}" in error
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("content", "facts"),
    [
        (None, []),
        ("{broken", []),
        ("{}", ["ZeRO"]),
        ('{"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}', ["gradient_clipping", "--max_grad_norm"]),
        (
            '{"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 4}',
            ["gradient_accumulation_steps", "--micro_batch_size"],
        ),
        (
            '{"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}',
            ["optimizer", "AdamW", "--learning_rate", "--weight_decay"],
        ),
    ],
)
def test_conflicting_deepspeed_configs_are_refused(
    content: str | None, facts: list[str], graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    path = "nowhere.json"
    if content is not None:
        path = str(tmp_path / "zero.json")
        Path(path).write_text(content)
    for name, value in (("ACCELERATE_USE_DEEPSPEED", "true"), ("ACCELERATE_DEEPSPEED_CONFIG_FILE", path)):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    assert train_main(settings(graph, tmp_path / "run")) == 2
    err = capsys.readouterr().err
    [error] = [line for line in err.splitlines() if line.startswith("mmgraph: error: ")]
    assert path in error and all(fact in error for fact in facts) and "Traceback" not in err, err


def test_deepspeed_that_is_not_installed(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(DEEPSPEED_IS_INSTALLED, lambda: False)
    assert train_main(settings(graph, tmp_path / "run")) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith("mmgraph: error: ") and "pip install deepspeed" in error


def test_sizes_of_vit_b_32() -> None:
    sizes = model_sizes(empty_towers(Config.model_name), Config())
    assert (sizes.frozen + sizes.trained, sizes.trained) == (156_662_272, 6_040_320)
    assert sizes.text_length == 77 and sizes.patches == 49 and sizes.image_size == 224
    # Expected multiply-adds of ViT-B/32: 4.4 G per image, and 2.9 G in the text tower for 77 tokens.
    assert sizes.tower_flops == pytest.approx(2 * (4.4e9 + 2.9e9), rel=0.02)


MEASURE = """
import torch
from transformers import CLIPImageProcessor
from mmgraph.config import Config
from mmgraph.data.batches import EdgeBatch
from mmgraph.data.preprocessing import Preprocessing
from mmgraph.models.multimodal_graph_encoder import TrainedModule
from mmgraph.towers.live import LiveTowers
from mmgraph.towers.load import empty_towers
from mmgraph.distributed.launch import peak_memory_gb
module = TrainedModule(512, 768, 512, 256)
optimizer = torch.optim.AdamW(module.parameters())
inputs = {"input_ids": torch.randint(400, (64, 77)), "attention_mask": torch.ones(64, 77, dtype=torch.long),
          "pictures": torch.randint(256, (64, 3, 224, 224), dtype=torch.uint8)}
rows = torch.arange(64)
batch = EdgeBatch(rows[:32], rows, rows, rows.numpy(), inputs=inputs)
live = LiveTowers(empty_towers(Config.model_name), Preprocessing(CLIPImageProcessor()), torch.device("cpu"))
z = module(live.tokens(batch))
sum(x.sum() for x in z).backward()
optimizer.step()
print(peak_memory_gb(torch.device("cpu")))
"""


@pytest.mark.slow
def test_the_memory_estimate_is_near_the_measured_memory() -> None:
    """The estimate is within a third of the peak memory of one step: ViT-B/32, 32 edges, float32, one CPU process."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    sizes = model_sizes(empty_towers(Config.model_name), Config())
    estimated = memory_gb(sizes, 32, None, "cpu", False)
    print(f"estimated {estimated:.2f} GB, measured {float(done.stdout):.2f} GB")
    assert estimated == pytest.approx(float(done.stdout), rel=0.33)
