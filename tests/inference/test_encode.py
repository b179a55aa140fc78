"""``mmgraph encode``: checkpoints of the original trainer, all formats, two ranks, kills and memory."""

import re
import shutil
import subprocess
import sys
import time
from pathlib import Path
from pkgutil import resolve_name

import numpy as np
import pandas as pd
import psutil
import pyarrow.parquet as pq
import pytest
import torch
from launches import run, run_warm
from PIL import Image
from safetensors.torch import load_file
from targets import MAKE_FEATURE_SHARDS, NODES_OF_A_FEATURE_SHARD
from transformers import AutoTokenizer, CLIPImageProcessor

from mmgraph.cli import main
from mmgraph.inference.feature_files import FORMATS
from mmgraph.loader.inference_collator import InferenceCollator
from mmgraph.models.multimodal_graph_encoder import MultimodalGraphEncoder

FEATURES = ("z_graph", "fused", "text_only", "image_only", "concat")


@pytest.fixture(scope="module")
def original(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A final checkpoint as the original trainer wrote it under transformers 4, outside a run folder."""
    torch.manual_seed(1)
    encoder = MultimodalGraphEncoder(str(graph / "towers"), 24, 16)
    state = encoder.state_dict()
    state["text_model.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    path = tmp_path_factory.mktemp("original") / "multimodal_encoder_final.pt"
    torch.save(state, path)
    return path


def encode_arguments(graph: Path, original: Path, output: Path, *more: str) -> list[str]:
    return ["encode", str(original), f"--nodes={graph / 'nodes.csv'}", f"--model_name={graph / 'towers'}",
            f"--output_dir={output}", *more]  # fmt: skip


@pytest.fixture(scope="module")
def expected(graph: Path, original: Path) -> dict[str, torch.Tensor]:
    """Features of all nodes, each embedded alone by the public encoder and collator."""
    encoder = MultimodalGraphEncoder(str(graph / "towers"), 24, 16).eval()
    encoder.load_state_dict(torch.load(original))
    towers = str(graph / "towers")
    collate = InferenceCollator(AutoTokenizer.from_pretrained(towers), CLIPImageProcessor.from_pretrained(towers))
    rows: dict[str, list[torch.Tensor]] = {name: [] for name in FEATURES}
    for node in pd.read_csv(graph / "nodes.csv", dtype=str).to_dict("records"):
        inputs = collate([{**node, "image_path": str(graph / node["image_path"].replace("\\", "/"))}])
        with torch.no_grad():
            features = {**encoder.encode(**inputs), "z_graph": encoder(**inputs)[0]}
        for name in FEATURES:
            rows[name].append(features[name])
    return {name: torch.cat(parts) for name, parts in rows.items()}


def test_features_of_an_original_checkpoint(
    graph: Path, original: Path, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """The names, shapes, order and values of the original trainer's four files and of z_graph are correct."""
    assert main(encode_arguments(graph, original, tmp_path)) == 0
    files = {f"features_{name}.pt" for name in FEATURES}
    assert {path.name for path in tmp_path.iterdir()} - {".lock"} == files | {f"{file}.json" for file in files}
    for name, width in zip(FEATURES, (16, 24, 128, 128, 256), strict=True):
        vectors = torch.load(tmp_path / f"features_{name}.pt", weights_only=True)
        assert vectors.shape == (40, width) and vectors.dtype == torch.float32 and vectors.is_contiguous()
        assert torch.allclose(vectors, expected[name], atol=1e-5), name
    assert torch.allclose(expected["z_graph"].norm(dim=1), torch.ones(40))


def test_two_ranks_and_all_formats(
    graph: Path, original: Path, expected: dict[str, torch.Tensor], tmp_path: Path
) -> None:
    """Features from two ranks and in all formats are correct. The ranks have different numbers of 6-node shards."""
    script = tmp_path / "run.py"
    script.write_text(
        f"import runpy, pytest\npytest.MonkeyPatch().setattr({NODES_OF_A_FEATURE_SHARD!r}, 6)\n"
        "runpy.run_module('mmgraph', run_name='__main__')\n"
    )
    done = run_warm(
        [str(script), *encode_arguments(graph, original, tmp_path / "pt", "--num_workers=1")], "cpu_2proc.yaml"
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count(f"{tmp_path / 'pt'}/features_*.pt") == 1  # only one rank prints it
    for name in FEATURES:
        assert torch.allclose(torch.load(tmp_path / f"pt/features_{name}.pt"), expected[name], atol=1e-5)
    for suffix in ("safetensors", "npy", "parquet"):
        more = f"--output_dir={tmp_path / suffix}", f"--format={suffix}", "--features", "fused", "z_graph", "fused"
        assert main(encode_arguments(graph, original, tmp_path, *more)) == 0
        assert len(list((tmp_path / suffix).glob(f"features_*.{suffix}"))) == 2
    z_graph = expected["z_graph"]
    assert torch.allclose(
        load_file(tmp_path / "safetensors/features_z_graph.safetensors")["z_graph"], z_graph, atol=1e-5
    )
    assert np.allclose(np.load(tmp_path / "npy/features_z_graph.npy"), z_graph, atol=1e-5)
    table = pq.read_table(tmp_path / "parquet/features_z_graph.parquet")
    assert table["node_id"].to_pylist() == [f"{i:03d}" for i in range(40)]
    assert np.allclose(np.stack(table["vector"].to_numpy()), z_graph, atol=1e-5)


KILLED = f"""import pkgutil, runpy, time
import pytest
patch = pytest.MonkeyPatch()
patch.setattr({NODES_OF_A_FEATURE_SHARD!r}, 4)
make = pkgutil.resolve_name({MAKE_FEATURE_SHARDS!r})
def slow(self, numbers):
    for count in make(self, numbers):
        time.sleep(0.2)
        yield count
patch.setattr({MAKE_FEATURE_SHARDS!r}, slow)
runpy.run_module("mmgraph", run_name="__main__")
"""


def test_encode_resumes_after_a_kill(
    graph: Path, original: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """After a kill between two shards, ``encode`` builds only the missing, damaged and outdated shards.

    A shard is outdated if one of its images has changed. The features equal those of a run without a kill.
    """
    folder = shutil.copytree(graph, tmp_path / "graph")
    for image in (folder / "images").iterdir():
        image.touch()
    time.sleep(2.1)  # images that changed less than 2 s ago make their shard outdated
    monkeypatch.setattr(NODES_OF_A_FEATURE_SHARD, 4)
    assert main(encode_arguments(folder, original, tmp_path / "once")) == 0
    (tmp_path / "run.py").write_text(KILLED)
    process = subprocess.Popen(
        [sys.executable, str(tmp_path / "run.py"), *encode_arguments(folder, original, tmp_path / "out")],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    deadline = time.monotonic() + 120
    while len(list((tmp_path / "out").glob(".blocks-*/[0-9]*.safetensors"))) < 4:
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    psutil.Process(process.pid).kill()
    process.wait()
    assert not list((tmp_path / "out").glob("features_*"))
    finished = len(list((tmp_path / "out").glob(".blocks-*/[0-9]*.safetensors")))

    damaged = bytearray((shard := sorted((tmp_path / "out").glob(".blocks-*/*.safetensors"))[1]).read_bytes())
    damaged[-9] ^= 1
    shard.write_bytes(damaged)
    built: list[int] = []
    make = resolve_name(MAKE_FEATURE_SHARDS)
    monkeypatch.setattr(MAKE_FEATURE_SHARDS, lambda self, numbers: built.extend(numbers) or make(self, numbers))
    Image.new("RGB", (60, 50), "red").save(folder / "images/1.png")  # an image of shard 0
    capsys.readouterr()
    assert main(encode_arguments(folder, original, tmp_path / "out")) == 0
    assert built == [0, 1, *range(finished, 10)]
    numbers = [re.findall(r"\d+", line) for line in capsys.readouterr().out.splitlines()]
    assert numbers.count([str(4 * (finished - 2)), "40"]) == 1  # one line has the number of nodes already embedded
    for name in FEATURES:
        uninterrupted, resumed = (torch.load(tmp_path / f"{part}/features_{name}.pt") for part in ("once", "out"))
        same = [torch.allclose(a, b, atol=1e-5) for a, b in zip(uninterrupted, resumed, strict=True)]
        assert same == [name == "text_only" or i != 1 for i in range(40)]
    assert not list((tmp_path / "out").glob(".blocks-*"))


@pytest.mark.parametrize(
    ("more", "facts"),
    [
        (["--features", "fused", "z"], ["--features z:", *FEATURES]),
        (["--format=csv"], ["--format csv:", *FORMATS]),
        (["--output_dir=/proc/none"], ["--output_dir /proc/none:"]),
    ],
)
def test_encode_rejects_wrong_arguments(
    graph: Path, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], more: list[str], facts: list[str]
) -> None:
    assert main(encode_arguments(graph, original, tmp_path, *more)) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith("mmgraph: error: ") and all(fact in error for fact in facts)
    assert not list(tmp_path.iterdir())


HOLDER = """import fcntl, sys
file = open(sys.argv[1], "w")
fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
input()
"""


def test_output_folder_locked_by_another_process(
    graph: Path, original: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(tmp_path / ".lock")], stdout=subprocess.PIPE, stdin=subprocess.PIPE
    )
    process.stdout.readline()
    assert main(encode_arguments(graph, original, tmp_path)) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith("mmgraph: error: ") and f"--output_dir {tmp_path}:" in error
    assert {path.name for path in tmp_path.iterdir()} == {".lock"}
    process.communicate(b"\n")
    assert main(encode_arguments(graph, original, tmp_path, "--features", "text_only")) == 0


# Measures anonymous memory only. .pt features are written from a mapped file, and the kernel can reclaim its pages.
MEMORY = """import runpy, threading, time
peak = 0
def watch():
    global peak
    while True:
        status = dict(line.split(":", 1) for line in open("/proc/self/status").read().splitlines())
        peak = max(peak, int(status["RssAnon"].split()[0]))
        time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()
try:
    runpy.run_module("mmgraph", run_name="__main__")
finally:
    print("peak MB", peak / 1024)
"""


@pytest.mark.slow
def test_memory_does_not_grow_with_the_graph(graph: Path, original: Path, tmp_path: Path) -> None:
    """With live towers, 40,000 nodes (88 MB of features) take less than 30 MB more memory than 10,000 nodes.

    The memory of the allocator varies by 20 MB over time, so a shorter run may end before it reaches its peak.
    """
    (tmp_path / "run.py").write_text(MEMORY)
    image, peaks = str(graph / "images/0.png"), []
    for count in (10_000, 40_000):
        folder = tmp_path / str(count)
        folder.mkdir()
        table = pd.DataFrame({"node_id": range(count), "short_name": "a node", "summary": "", "image_path": image})
        table.to_csv(folder / "nodes.csv", index=False)
        arguments = ["encode", str(original), f"--nodes={folder / 'nodes.csv'}", f"--model_name={graph / 'towers'}"]
        done = run([sys.executable, str(tmp_path / "run.py"), *arguments, f"--output_dir={folder / 'out'}"])
        assert done.returncode == 0, done.stderr[-2000:]
        peaks.append(float(done.stdout.split()[-1]))
        assert torch.load(folder / "out/features_concat.pt", mmap=True).shape == (count, 256)
    print(f"peak of 10,000 nodes {peaks[0]:.0f} MB, of 40,000 {peaks[1]:.0f} MB")
    assert peaks[1] - peaks[0] < 30
