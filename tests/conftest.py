"""What tests share: a tiny graph with pictures, tiny towers, and real launches."""

import hashlib
import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Literal

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here needs a hub, and asking for one costs its retries

import pandas as pd
import pytest
import torch
from launches import REPOSITORY, ZERO3, launch
from PIL import Image
from safetensors.torch import load_file
from transformers import CLIPTextConfig, CLIPVisionConfig

from mmgraph.data.image_source import read_file
from mmgraph.data.images import decode_picture
from mmgraph.demo.towers import build_towers

pytest_plugins = ["pages"]  # fixtures of the report's tests


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """Two workers for the suite. None with ``-s``, which workers do not support, and none for a single file."""
    single_file = len(config.args) == 1 and ".py" in config.args[0]
    if single_file or config.option.capture == "no":
        config.option.dist = "no"
        return 0
    return 2


PACKAGE = f"{REPOSITORY / 'mmgraph'}/"  # how the paths of its files begin in a traceback
WORDS = ["red", "green", "blue", "small", "large", "round", "square", "old", "new", "bright", "dark", "quick", "slow"]


def graph_files(folder: Path, nodes: int = 40, edges: int = 200) -> Path:
    """Write nodes.csv, edges.csv and images/ of a graph drawn from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    (folder / "images").mkdir(parents=True)
    rows = []
    for i in range(nodes):
        words = [WORDS[int(k)] for k in torch.randint(len(WORDS), (1 + i % 9,), generator=generator)]
        # Coarse noise: on plain pictures all patches are alike, and gradients of the attention vanish into rounding.
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
    """A folder with the graph's files and towers/."""
    folder = graph_files(tmp_path_factory.mktemp("data") / "graph")
    build_towers(folder / "towers", [*WORDS, "node 0 1 2 3 4 5 6 7 8 9"])
    return folder


def tiny_configs() -> tuple[CLIPTextConfig, CLIPVisionConfig]:
    """Towers of widths 32 and 48, for modules that need no files."""
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
    """Flags of a small run on the graph."""
    return [
        f"--nodes={graph / 'nodes.csv'}", f"--edges={graph / 'edges.csv'}", f"--model_name={graph / 'towers'}",
        f"--output_dir={output}", "--fused_dim=32", "--proj_dim=16", "--batch_size=12", "--num_workers=0",
        "--learning_rate=1e-3", "--no_report", *more,
    ]  # fmt: skip


def read_metrics(output: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]


def lines_with(text: str, *facts: object) -> list[str]:
    """The lines of a text that hold all these facts (flags, names, numbers, paths), as words and in this order."""
    words = (re.escape(str(fact)) for fact in facts)
    pattern = ".*?".join(rf"(?<![\w.]){word}(?!\w|[.,]\d)" for word in words)
    return [line for line in text.splitlines() if re.search(pattern, line)]


def line_with(text: str, *facts: object) -> str:
    """The one line that holds them."""
    found = lines_with(text, *facts)
    assert len(found) == 1, (facts, found, text[-3000:])
    return found[0]


def error_of(text: str, *facts: object) -> str:
    """The one line that says why a run has ended, with these facts in it, in this order; no traceback anywhere."""
    assert "Traceback" not in text, text[-3000:]
    [line] = [line for line in text.splitlines() if "mmgraph: error: " in line] or [""]
    assert lines_with(line, *facts), (facts, text[-3000:])
    return line


def stop_lines(text: str, step: int) -> list[str]:
    """Lines that say at which step a run was stopped; those of its progress have ``step 7/12``."""
    return [line for line in lines_with(text, f"step {step:,}") if f"step {step:,}/" not in line]


LOSSES = ("loss", "loss_mm", "loss_graph")


def loss_difference(output: Path, reference: Path, steps: int) -> float:
    """The greatest difference of any loss in any of the first steps; each step must be there, once, in order."""
    rows, expected = read_metrics(output), read_metrics(reference)
    assert [row["step"] for row in rows] == list(range(1, steps + 1))
    return max(abs(row[name] - other[name]) for row, other in zip(rows, expected, strict=False) for name in LOSSES)


def newest(output: Path) -> Path:
    """The newest state of a run."""
    return sorted((output / "state").glob("step-*"))[-1]


def same_state(output: Path, reference: Path) -> bool:
    """Whether weights and moments of two runs' newest states are equal to the bit."""
    for name in ("trainable.safetensors", "optimizer.safetensors"):
        first, second = load_file(newest(output) / name), load_file(newest(reference) / name)
        if first.keys() != second.keys() or not all(torch.equal(first[key], second[key]) for key in second):
            return False
    return True


def tree(folder: Path) -> dict[str, str]:
    """The path of every file in a folder, and the SHA-256 of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture(scope="session")
def one_process(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """30 steps over two epochs (16 steps each), on one process, float32."""
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
    """Called with the number of cases that a test tried, for the table of tests/faults/table.py."""
    return lambda count: request.node.user_properties.append(("cases", count))


def read_image(path: str | None, truncated: Literal["partial", "black"] = "partial") -> tuple[torch.Tensor, int]:
    """A picture as towers see it before it is resized, and an index into IMAGE_STATUS."""
    return decode_picture(*read_file(path), truncated)
