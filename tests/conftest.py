"""Shared by all tests: a small graph with images and towers, reference runs, and checks of metrics and messages."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test needs the hub, and each request would be retried

import pandas as pd
import pytest
import torch
from launches import REPOSITORY, ZERO3, launch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPVisionConfig

from mmgraph.data.image_source import read_file
from mmgraph.data.images import decode_picture
from mmgraph.data.input_rules import InputRules
from mmgraph.demo.towers import build_towers
from mmgraph.utils.log import log_file

pytest_plugins = ["pages", "gpu_runs"]  # fixtures of the tests of the report, and of tests/gpu


@pytest.hookimpl(optionalhook=True)  # a machine without pytest-xdist can run the tests with -o addopts=""
def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two workers for the suite. None with ``-s``, which workers do not support, and none for a single file."""
    single_file = len(config.args) == 1 and ".py" in config.args[0]
    if single_file or config.option.capture == "no":
        config.option.dist = "no"
        return 0
    return 2


PACKAGE = f"{REPOSITORY / 'mmgraph'}/"  # start of the paths of its files in a traceback
WORDS = ["red", "green", "blue", "small", "large", "round", "square", "old", "new", "bright", "dark", "quick", "slow"]


def graph_files(folder: Path, nodes: int = 40, edges: int = 200) -> Path:
    """Write nodes.csv, edges.csv and images/ of a random graph with a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(nodes):
        words = [WORDS[int(k)] for k in torch.randint(len(WORDS), (1 + i % 9,), generator=generator)]
        # Coarse noise: if all patches of an image are equal, the attention's gradients are only rounding errors.
        blocks = torch.randint(256, (5, 6, 3), generator=generator, dtype=torch.uint8)
        Image.fromarray(blocks.numpy()).resize((60 + i, 50)).save(folder / f"images/{i}.png")
        rows.append((f"{i:03d}", f"node {i}", " ".join(words), f"images\\{i}.png"))
    pd.DataFrame(rows, columns=["node_id", "short_name", "summary", "image_path"]).to_csv(
        folder / "nodes.csv", index=False
    )
    ends = torch.randint(nodes, (edges, 2), generator=generator)
    pd.DataFrame([(f"{a:03d}", f"{b:03d}") for a, b in ends.tolist()], columns=["src_id", "dst_id"]).to_csv(
        folder / "edges.csv", index=False
    )
    return folder


@pytest.fixture(scope="session")
def graph(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files of the graph, and towers/."""
    folder = graph_files(tmp_path_factory.mktemp("data") / "graph")
    build_towers(folder / "towers", [*WORDS, "node 0 1 2 3 4 5 6 7 8 9"])
    return folder


def tiny_configs() -> tuple[CLIPTextConfig, CLIPVisionConfig]:
    """Return the configs of towers of width 32 and 48, for tests that need no files."""
    text = CLIPTextConfig(
        vocab_size=60, hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=77, projection_dim=32, bos_token_id=0, eos_token_id=1, pad_token_id=1,
    )  # fmt: skip
    vision = CLIPVisionConfig(
        hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=16,
        projection_dim=32,
    )  # fmt: skip
    return text, vision


def settings(graph: Path, output: Path, *more: str) -> list[str]:
    """Return the flags of a small run on the graph."""
    return [
        f"--nodes={graph / 'nodes.csv'}", f"--edges={graph / 'edges.csv'}", f"--model_name={graph / 'towers'}",
        f"--output_dir={output}", "--fused_dim=32", "--proj_dim=16", "--batch_size=12", "--num_workers=0",
        "--learning_rate=1e-3", "--no_report", *more,
    ]  # fmt: skip


def read_metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def lines_with(text: str, *facts: object) -> list[str]:
    """Return the lines that contain all facts (flags, names, numbers, paths) as words, in this order."""
    words = (re.escape(str(fact)) for fact in facts)
    pattern = ".*?".join(rf"(?<![\w.]){word}(?!\w|[.,]\d)" for word in words)
    return [line for line in text.splitlines() if re.search(pattern, line)]


def line_with(text: str, *facts: object) -> str:
    """Return the only line that contains all facts."""
    lines = lines_with(text, *facts)
    assert len(lines) == 1, (facts, lines, text[-3000:])
    return lines[0]


def error_of(text: str, *facts: object) -> str:
    """Return the only error line. Check that it contains all facts in this order, and that there is no traceback."""
    assert "Traceback" not in text, text[-3000:]
    [line] = [line for line in text.splitlines() if "mmgraph: error: " in line] or [""]
    assert lines_with(line, *facts), (facts, text[-3000:])
    return line


def stop_lines(text: str, step: int) -> list[str]:
    """Return the lines about a stop at a step. Lines of progress, which contain ``step 7/12``, are excluded."""
    return [line for line in lines_with(text, f"step {step:,}") if f"step {step:,}/" not in line]


LOSSES = ("loss", "loss_mm", "loss_graph")


def loss_difference(output: Path, reference: Path, steps: int) -> float:
    """Return the largest difference of a loss in the first steps. Check that each step has one row, in order."""
    rows, expected = read_metrics(output), read_metrics(reference)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    return max(abs(row[name] - other[name]) for row, other in zip(rows, expected, strict=False) for name in LOSSES)


def newest(output: Path) -> Path:
    """Return the newest state of a run."""
    return sorted((output / "state").glob("step-*"))[-1]


def same_state(output: Path, reference: Path) -> bool:
    """Return whether the weights and moments in the newest states of two runs are equal to the bit."""
    for name in ("trainable.safetensors", "optimizer.safetensors"):
        first, second = load_file(newest(output) / name), load_file(newest(reference) / name)
        if first.keys() != second.keys() or not all(torch.equal(first[key], second[key]) for key in second):
            return False
    return True


def tree(folder: Path) -> dict[str, str]:
    """Return the SHA-256 of each file in a folder, by path."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def write_pending_log(path: Path) -> None:
    """Write the buffered lines of other tests to a file, so that the next run does not write them to its log."""
    with log_file(path):
        pass


@pytest.fixture(scope="session")
def one_process(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 30 steps over two epochs (16 steps each) on one process in float32."""
    output = tmp_path_factory.mktemp("runs") / "one"
    launch("cpu.yaml", *settings(graph, output, "--max_steps=30", "--save_every=5", "--keep_last=9"))
    return output


@pytest.fixture(scope="session")
def zero3(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same 30 steps under ZeRO-3, on two processes."""
    output = tmp_path_factory.mktemp("runs") / "zero3"
    launch(ZERO3, *settings(graph, output, "--max_steps=30", "--save_every=5", "--keep_last=9"))
    return output


@pytest.fixture
def cases(request: pytest.FixtureRequest) -> Callable[[int], None]:
    """Records the number of cases that a test tried, for tests/faults/table.py."""
    return lambda count: request.node.user_properties.append(("cases", count))


def read_image(path: str | None, truncated: Literal["partial", "black"] = "partial") -> tuple[torch.Tensor, int]:
    """Return a decoded image before it is resized, and an index into IMAGE_STATUS."""
    return decode_picture(*read_file(path), InputRules(truncated_images=truncated))
