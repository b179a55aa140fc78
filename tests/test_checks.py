"""Start-up checks: what ranks must agree on, batch, output folder, devices; estimates against what was measured."""

import re
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from conftest import launch, launch_command, run, settings
from transformers import CLIPTextConfig, CLIPVisionConfig

from mmgraph import checks, estimate, world
from mmgraph.cli import train_main
from mmgraph.config import Config
from mmgraph.errors import UserError


def test_check_says_all_and_leaves_nothing(graph: Path, tmp_path: Path) -> None:
    """Two processes; one line for each finding, on the main rank alone."""
    done = launch("cpu_2proc.yaml", *settings(graph, tmp_path / "run", "--check", "--micro_batch_size=2"))
    expected = [
        r"2 processes \(MULTI_CPU\), device cpu, \d thread\(s\) each, precision no, 12 edges a step, 6 a process",
        r"2 process\(es\) on 1 host\(s\), as launched, met at (127.0.0.1|localhost):\d+",
        r"rank 0: \S+, cpu, \d thread\(s\), [\d.]+ of [\d.]+ GB free",
        r"rank 1: \S+, cpu, \d thread\(s\), [\d.]+ of [\d.]+ GB free",
        r"every rank has the same settings, precision, node table, edge table, held-out edges, towers, versions",
        r"12 edges a step, 6 a process, 2 at once; 16 steps an epoch, which leaves out 8 of 200 edges",
        r"\S+: writable, [\d.]+ GB free; a whole run takes up to [\d.]+ GB",
        r"about [\d.]+ GB of memory a process, by estimate",
        r"each node goes through the towers once, before the first step; the tokens take up to [\d.]+ MB",
        r"about [\d.e-]+ s a step at full text length, by estimate \(60% of the [\d,]+ GFLOP/s measured in a matrix .*",
        r"checked: 40 nodes, 200 edges; nothing was trained",
    ]
    lines = done.stdout.strip().split("\n")
    assert len(lines) == len(expected)
    for line, pattern in zip(lines, expected, strict=True):
        assert re.fullmatch(pattern, line), line
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("differ", "message"),
    [
        ("sys.argv += ['--seed', rank]", r"rank 1 \(\S+\) has another settings than rank 0 \(\S+\): seed 1 instead of"),
        pytest.param(
            "sys.argv += ['--edges', OTHER] if rank == '1' else []", r"rank 1: .*src_id", marks=pytest.mark.slow
        ),
    ],
)
def test_ranks_that_differ_are_named(graph: Path, tmp_path: Path, differ: str, message: str) -> None:
    script = tmp_path / "launch.py"
    other = f"OTHER = {str(graph / 'nodes.csv')!r}"
    script.write_text(
        f"import os, sys\nrank = os.environ['RANK']\n{other}\n{differ}\n"
        "from mmgraph.cli import leave, train_main\nleave(train_main())\n"
    )
    done = run([*launch_command("cpu_2proc.yaml")[:-1], str(script), *settings(graph, tmp_path / "run")])
    assert done.returncode != 0 and re.search(message, done.stderr), done.stderr
    assert done.stderr.count("mmgraph: error") == 1 and "mmgraph/" not in done.stderr
    assert not (tmp_path / "run").exists()


def a_rank(**agreed: object) -> checks.Rank:
    same = dict.fromkeys(checks.SAME_EVERYWHERE, "x") | agreed
    return checks.Rank("host", "cuda:0", 10.0, 80.0, 4, 8, 1e12, same)


@pytest.mark.parametrize("what", checks.SAME_EVERYWHERE)
def test_agreement(what: str) -> None:
    checks._check_agreement([a_rank(), a_rank()])
    with pytest.raises(UserError, match=f"rank 2 .* another {what} than rank 0 .*: y instead of x; "):
        checks._check_agreement([a_rank(), a_rank(), a_rank(**{what: "y"})])


def test_towers_are_told_apart_by_their_files(graph: Path, tmp_path: Path) -> None:
    from mmgraph.towers import file_fingerprints

    copy = shutil.copytree(graph / "towers", tmp_path / "towers")
    first = file_fingerprints(str(graph / "towers"))
    assert "config.json" in first and file_fingerprints(str(copy)) == first and file_fingerprints("no/model") == {}
    content = bytearray((copy / "model.safetensors").read_bytes())
    content[-1] ^= 1
    (copy / "model.safetensors").write_bytes(content)
    second = file_fingerprints(str(copy))
    with pytest.raises(
        UserError, match=r"rank 1 .* another towers than rank 0 .*: model.safetensors [0-9a-f]+ instead"
    ):
        checks._check_agreement([a_rank(towers=first), a_rank(towers=second)])
    # Not downloaded yet, or with files beside those that are loaded: no other towers.
    checks._check_agreement([a_rank(towers=first), a_rank(towers={}), a_rank(towers=first | {"vocab.json": "x"})])


def test_towers_that_a_rank_alone_has_loaded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "gather_object", lambda _: [("one", "a"), ("one", "a"), ("two", "b")])
    with pytest.raises(UserError, match=r"rank 2 \(two\) has loaded other towers than rank 0 \(one\); give every"):
        checks.check_towers("a")


def test_gpus_of_a_host() -> None:
    world.check_gpus(4, 4)
    with pytest.raises(UserError, match=r"8 processes were started on host .* where 4 GPUs are visible: --num_proc"):
        world.check_gpus(8, 4)
    accelerator = namedtuple("Accelerator", "device")(torch.device("cuda"))
    lines = checks._world(accelerator, [a_rank(), a_rank()])
    assert "warning: host has 8 visible GPUs, of which 4 are used" in lines[1]


def test_a_full_disk_is_an_error_before_training(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 2_000_000))
    assert train_main(settings(graph, tmp_path / "run")) == 2
    assert "2 MB free, and an epoch file with its state takes 5.1 MB; make room" in capsys.readouterr().err
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage(0, 0, 50_000_000))
    assert train_main(settings(graph, tmp_path / "run", "--max_steps=1")) == 0
    assert re.search(r"warning: .* writable, 0.1 GB free; a whole run takes up to 0.1 GB", capsys.readouterr().out)


def test_too_little_memory_is_a_warning(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "_host_memory", lambda: (500_000_000, 1_000_000_000))
    assert train_main(settings(graph, tmp_path / "run", "--check")) == 0
    message = "may run out of memory: about 0.9 GB needed, 0.5 GB free; --micro_batch_size 3 needs less"
    assert message in capsys.readouterr().out


def test_a_tracker_that_is_not_installed(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(checks, "is_tensorboard_available", lambda: False)
    assert train_main(settings(graph, tmp_path / "run", "--report_to=all")) == 2
    assert "TensorBoard is not installed: pip install tensorboard" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "DeepSpeed config nowhere.json: Expected a string path to an existing deepspeed config"),
        ("{broken", "DeepSpeed config "),
        ("{}", "Please specify the ZeRO optimization config"),
        ('{"zero_optimization": {"stage": 2}, "gradient_clipping": 1.0}', "mmgraph has --max_grad_norm"),
        ('{"zero_optimization": {"stage": 2}, "gradient_accumulation_steps": 4}', "mmgraph has --micro_batch_size"),
        ('{"zero_optimization": {"stage": 2}, "optimizer": {"type": "Adam"}}', "mmgraph has AdamW"),
    ],
)
def test_deepspeed_configs_that_would_train_otherwise_are_refused(
    content: str | None, message: str, graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
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
    assert message in err and err.count("mmgraph: error") == 1, err


def test_deepspeed_that_is_not_installed(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from mmgraph import zero

    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    monkeypatch.setattr(zero, "is_deepspeed_available", lambda: False)
    assert train_main(settings(graph, tmp_path / "run")) == 2
    assert "wants DeepSpeed, which is not installed: pip install deepspeed\n" in capsys.readouterr().err


def test_shapes_and_sizes_are_those_of_the_real_model() -> None:
    sizes = estimate.shape(CLIPTextConfig(), CLIPVisionConfig(), Config())
    assert (sizes.frozen + sizes.trained, sizes.trained) == (156_662_272, 6_040_320)
    assert sizes.text_length == 77 and sizes.patches == 49 and sizes.image_size == 224
    # ViT-B/32 is said to take 4.4 G multiply-adds an image; its text tower 2.9 G for 77 tokens.
    assert sizes.tower_flops == pytest.approx(2 * (4.4e9 + 2.9e9), rel=0.02)


MEASURE = """
import torch
from transformers import CLIPImageProcessor, CLIPTextConfig, CLIPVisionConfig
from mmgraph.images import Preprocessing
from mmgraph.models.multimodal_graph_encoder import TrainedModule
from mmgraph.towers import LiveTowers, random_towers
from mmgraph.world import peak_memory_gb
towers = random_towers(CLIPTextConfig(), CLIPVisionConfig())
module = TrainedModule(512, 768, 512, 256)
optimizer = torch.optim.AdamW(module.parameters())
batch = {"input_ids": torch.randint(400, (64, 77)), "attention_mask": torch.ones(64, 77, dtype=torch.long),
         "pictures": torch.randint(256, (64, 3, 224, 224), dtype=torch.uint8)}
z = module(LiveTowers(towers, Preprocessing(CLIPImageProcessor()), torch.device("cpu")).tokens(batch))
sum(x.sum() for x in z).backward()
optimizer.step()
print(peak_memory_gb(torch.device("cpu")))
"""


@pytest.mark.slow
def test_the_memory_estimate_is_near_what_a_step_takes() -> None:
    """ViT-B/32, 32 edges, float32, one process on a CPU: within a third."""
    done = subprocess.run([sys.executable, "-c", MEASURE], capture_output=True, text=True, check=True)
    sizes = estimate.shape(CLIPTextConfig(), CLIPVisionConfig(), Config())
    estimated = estimate.memory_gb(sizes, 32, None, "cpu", False)
    print(f"estimated {estimated:.2f} GB, measured {float(done.stdout):.2f} GB")
    assert estimated == pytest.approx(float(done.stdout), rel=0.33)
