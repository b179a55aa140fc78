"""Content hashes: an image file is read again only if it may have changed."""

import os
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
from conftest import graph_files

from mmgraph.config import Config
from mmgraph.data import content_hashes, image_source
from mmgraph.data.content_hashes import ContentHashes, read_content_hashes
from mmgraph.data.graph import load_graph
from mmgraph.data.input_rules import InputRules
from mmgraph.distributed.launch import build_accelerator
from mmgraph.utils.files import cache_folder, file_signature


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Collects the image files that are read during the test."""
    files: list[object] = []
    read = image_source.read_file
    monkeypatch.setattr(image_source, "read_file", lambda file: files.append(file) or read(file))
    monkeypatch.setattr(content_hashes, "MIN_AGE_NS", 10_000_000)
    return files


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = graph_files(tmp_path / "graph")
    time.sleep(0.05)
    return folder


def hashes(nodes: str, image_root: str | None = None) -> ContentHashes:
    config = Config(nodes=nodes, edges=str(Path(nodes).with_name("edges.csv")), image_root=image_root)
    graph = load_graph(config)
    return read_content_hashes(
        graph.nodes,
        graph.images,
        nodes,
        graph.nodes_fingerprint,
        InputRules.of(config),
        cache_folder(nodes),
        build_accelerator(),
    )


@pytest.mark.parametrize("with_root", [False, True])
def test_start_from_another_folder_reads_no_image(
    folder: Path, reads: list[object], monkeypatch: pytest.MonkeyPatch, with_root: bool
) -> None:
    monkeypatch.chdir(folder)
    first = hashes("nodes.csv", "." if with_root else None)
    assert len(reads) == 40
    starts = [(folder.parent, "graph/nodes.csv", "graph"), (Path("/"), str(folder / "nodes.csv"), str(folder))]
    for start, nodes, root in starts:
        monkeypatch.chdir(start)
        result = hashes(nodes, root if with_root else None)
        assert all(np.array_equal(a, b) for a, b in zip(first, result, strict=True))
    assert len(reads) == 40
    assert len(list((folder / "mmgraph_cache").glob("images-*.npy"))) == 1


def test_image_in_another_working_directory_is_read(
    folder: Path, reads: list[object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without an image root, a file that is missing in the table's folder is looked up in the working directory."""
    for number, name in enumerate(("one", "two")):
        (tmp_path / name / "images").mkdir(parents=True)
        shutil.copy(folder / f"images/{number}.png", tmp_path / name / "images/7.png")
    (folder / "images/7.png").unlink()
    time.sleep(0.05)
    by_folder = []
    for name in ("one", "two"):
        monkeypatch.chdir(tmp_path / name)
        by_folder.append(hashes(str(folder / "nodes.csv")))
    assert len(reads) == 41 and (by_folder[0].images != by_folder[1].images).nonzero()[0].tolist() == [7]
    assert by_folder[0].images[7] == by_folder[0].images[0] and by_folder[1].images[7] == by_folder[1].images[1]


def test_signatures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A signature depends on the absolute path and the times.

    It is None for a file that changed too recently, and empty for a path that is not a regular file.
    """
    path, hour = folder / "images/0.png", 3600 * 10**9
    signature = file_signature(path, 0)
    monkeypatch.chdir(folder)
    assert signature == file_signature("images/../images/0.png", 0) and len(signature or b"") == 16
    assert file_signature(path, hour) is None
    os.utime(path, (0, 0))
    assert file_signature(path, 0) != signature and file_signature(path, hour) is None
    for missing in (folder / "images", folder / "none.png", "a\0b", "/dev/null"):
        assert file_signature(missing, hour) == b""
