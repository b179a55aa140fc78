"""Transparent images and images with 16 bits of grey in a tower store: their remarks, and the log lines about them."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import graph_files, line_with, lines_with, settings, write_pending_log
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mmgraph.arguments import parse_config
from mmgraph.cli import main, train_main
from mmgraph.data.graph import load_graph
from mmgraph.data.images import IMAGE_STATUS
from mmgraph.distributed.launch import build_accelerator
from mmgraph.errors import UserError
from mmgraph.towers.cached import CachedTowers, load_content_hashes
from mmgraph.towers.remarks import take_remarks, with_remarks
from mmgraph.towers.store import TowerStore

REMARKS = {3: "transparent", 5: "transparent", 7: "transparent, one color", 9: "16-bit grey"}  # by node row
BAD = {1: "file not found", 2: "unreadable"}
NODES = 14


def special_graph(graph: Path, folder: Path) -> Path:
    """Write a graph with the images in REMARKS and BAD. All other images are complete and opaque."""
    graph_files(folder, nodes=NODES, edges=40)
    (folder / "towers").symlink_to(graph / "towers")
    noise = np.random.default_rng(0).integers(0, 256, (2, 40, 50, 4), dtype=np.uint8)
    for row, pixels in zip((3, 5), noise, strict=True):
        Image.fromarray(pixels).save(folder / f"images/{row}.png")
    shape = np.zeros((40, 50, 4), np.uint8)
    shape[10:20, 10:20, 3] = 255
    Image.fromarray(shape).save(folder / "images/7.png")
    Image.fromarray(noise[0, :, :, 0].astype(np.uint16) * 257).save(folder / "images/9.png")
    (folder / "images/1.png").unlink()
    (folder / "images/2.png").write_bytes(b"no picture")
    return folder


@pytest.fixture(scope="module")
def built(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph with a complete store. Tests must not change it."""
    folder = special_graph(graph, tmp_path_factory.mktemp("remarks") / "graph")
    assert main(["cache", *flags(folder)]) == 0
    return folder


@pytest.fixture
def own_graph(built: Path, tmp_path: Path) -> Path:
    """A copy of the graph and its store that a test may change."""
    return shutil.copytree(built, tmp_path / "graph", symlinks=True)


def flags(graph: Path, *more: str) -> list[str]:
    """Return the flags of ``mmgraph cache``."""
    return [f"--nodes={graph / 'nodes.csv'}", f"--edges={graph / 'edges.csv'}", f"--model_name={graph / 'towers'}",
            "--num_workers=2", *more]  # fmt: skip


def image_shard(graph: Path) -> Path:
    [shard] = (graph / "mmgraph_cache").glob("towers-*/image-*.safetensors")
    return shard


def open_store(graph: Path) -> CachedTowers:
    config, accelerator = parse_config(flags(graph)), build_accelerator()
    hashes = load_content_hashes(config, accelerator, load_graph(config))
    return CachedTowers(TowerStore(image_shard(graph).parent), hashes, torch.device("cpu"))


def statuses(source: CachedTowers) -> dict[int, str]:
    """Return the image status of the nodes with another status than that of a complete image, by row."""
    return {row: IMAGE_STATUS[status] for row, status in enumerate(source.image_status) if status}


def test_a_shard_has_remarks_in_its_metadata(built: Path) -> None:
    """The tensor ``causes`` has 0 for them, because older versions count every other value as a bad image."""
    causes = load_file(image_shard(built))["causes"]
    assert sorted(causes[causes > 0].tolist()) == sorted(IMAGE_STATUS.index(status) for status in BAD.values())
    with safe_open(image_shard(built), "pt") as file:
        remarks = json.loads(file.metadata()["remarks"])
        hashes = file.get_tensor("hashes")
    assert {name: len(entries) for name, entries in remarks.items()} == {
        "transparent": 2, "transparent, one color": 1, "16-bit grey": 1,
    }  # fmt: skip
    data = load_content_hashes(parse_config(flags(built)), build_accelerator(), load_graph(parse_config(flags(built))))
    for row, status in REMARKS.items():
        entry = hashes.numpy().tobytes().index(data.images[row].ljust(16, b"\0")) // 16
        assert entry in remarks[status] and not causes[entry]


def test_the_status_of_a_stored_image_is_its_remark(built: Path) -> None:
    assert statuses(open_store(built)) == REMARKS | BAD


def test_a_shard_of_an_older_version_has_no_remarks(own_graph: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = open_store(own_graph)
    save_file(load_file(image_shard(own_graph)), image_shard(own_graph), {"format": "pt"})
    with safe_open(image_shard(own_graph), "pt") as file:
        assert file.metadata() == {"format": "pt"}
    source = open_store(own_graph)
    assert statuses(source) == BAD
    rows = np.arange(NODES)
    assert torch.equal(source.pooled_tokens(rows, rows).patches, before.pooled_tokens(rows, rows).patches)
    capsys.readouterr()
    assert main(["cache", *flags(own_graph)]) == 0
    out = capsys.readouterr().out
    assert not lines_with(out, "warning:") and line_with(out, "older version", "transparent", "not counted")


def test_a_store_with_remarks_is_not_taken_for_an_older_one(built: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", *flags(built)]) == 0
    assert not lines_with(capsys.readouterr().out, "older version")


@pytest.mark.parametrize(
    "remarks",
    [
        "", "no JSON", "[]", "null", "7", '{"transparent": "ab"}', '{"transparent": {"a": 1}}',
        '{"transparent": [99]}', '{"transparent": [-99]}', '{"transparent": [null]}', '{"transparent": [1, [2]]}',
        '{"transparent": [1e400]}', '{"transparent": [99999999999999999999]}', "[" * 100_000,
    ],
    ids=lambda remarks: remarks[:30],
)  # fmt: skip
def test_damaged_remarks_are_one_error_line(remarks: str, own_graph: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The line names the shard, and says that the entries are built again if the shard is removed."""
    shard = image_shard(own_graph)
    save_file(load_file(shard), shard, {"format": "pt", "remarks": remarks})
    with pytest.raises(UserError, match=rf"^[^\n]*{re.escape(str(shard))} is damaged\b[^\n]*\bremove it\b[^\n]*$"):
        TowerStore(shard.parent)
    if remarks == "no JSON":
        capsys.readouterr()
        assert main(["cache", *flags(own_graph)]) == 2
        error = capsys.readouterr().err
        assert error.startswith("mmgraph: error: ") and error.count("\n") == 1 and str(shard) in error


def test_a_remark_of_a_newer_version_is_ignored(own_graph: Path) -> None:
    shard = image_shard(own_graph)
    save_file(load_file(shard), shard, {"format": "pt", "remarks": '{"animated": [0, 1], "transparent": []}'})
    assert statuses(open_store(own_graph)) == BAD


def test_remarks_are_taken_and_put_back() -> None:
    status = torch.tensor([0, *range(len(IMAGE_STATUS)), 0, IMAGE_STATUS.index("transparent")], dtype=torch.uint8)
    before, kept = status.clone(), status.clone()
    remarks = take_remarks(status)
    kept[kept >= IMAGE_STATUS.index("transparent")] = 0
    assert torch.equal(status, kept)
    assert torch.equal(with_remarks(status, remarks), before) and torch.equal(status, kept)
    nothing = torch.zeros(3, dtype=torch.uint8)
    assert torch.equal(with_remarks(nothing, take_remarks(nothing)), nothing)
    assert len(with_remarks(torch.zeros(0, dtype=torch.uint8), take_remarks(torch.zeros(0, dtype=torch.uint8)))) == 0


# Facts of the lines about the images in REMARKS, with the default rules.
TRANSPARENT = ("warning:", "3", "1", "--background", "white")
GREY = ("warning:", "1", "8", "255", "--sixteen_bit_images", "scale")


def test_a_run_with_a_store_warns_at_its_start(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The lines come before the first step, in both outputs of the log."""
    write_pending_log(tmp_path / "before.txt")
    assert train_main(settings(built, tmp_path / "run", "--max_steps=2", "--log_every=1")) == 0
    for text in (capsys.readouterr().out, (tmp_path / "run/training_log.txt").read_text()):
        before, _, _ = text.partition("\nstep 1/")
        assert "tower store: " in before
        assert line_with(before, *TRANSPARENT) and line_with(before, *GREY)


def test_a_run_with_live_towers_warns_at_its_end(
    built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """All nodes are seen in one epoch, which has all edges."""
    write_pending_log(tmp_path / "before.txt")
    edges = pd.DataFrame({"src_id": [f"{i:03d}" for i in range(NODES)], "dst_id": ["000"] * NODES})
    edges.to_csv(tmp_path / "edges.csv", index=False)
    more = (f"--edges={tmp_path / 'edges.csv'}", "--tower_cache=off", "--batch_size=14", "--epochs=1", "--log_every=1")
    assert train_main(settings(built, tmp_path / "run", *more)) == 0
    for text in (capsys.readouterr().out, (tmp_path / "run/training_log.txt").read_text()):
        before, _, after = text.partition("\nstep 1/1,")
        assert not lines_with(before, "warning:")
        assert line_with(after, *TRANSPARENT) and line_with(after, *GREY)
        assert line_with(after, *(f"1 {status}" for status in BAD.values()))


def test_other_rules_do_not_warn(built: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    more = ("--max_steps=2", "--background=white", "--sixteen_bit_images=scale", f"--tower_cache={tmp_path / 'stores'}")
    assert train_main(settings(built, tmp_path / "run", *more)) == 0
    assert not lines_with(capsys.readouterr().out, "warning:")


def test_max_bad_images_does_not_count_remarks(built: Path, tmp_path: Path) -> None:
    """2 of 14 images are bad. The 4 images with a remark are complete."""
    assert train_main(settings(built, tmp_path / "run", "--max_steps=6", "--max_bad_images=0.2")) == 0
