"""Content hashes: an image file is read again only where it may have changed."""

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
from mmgraph.distributed.launch import build_accelerator
from mmgraph.utils.files import cache_folder, file_signature


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """The image files that are read from here on."""
    found: list[object] = []
    read = image_source.read_file
    monkeypatch.setattr(image_source, "read_file", lambda file: found.append(file) or read(file))
    monkeypatch.setattr(content_hashes, "MIN_AGE_NS", 10_000_000)
    return found


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = graph_files(tmp_path / "graph")
    time.sleep(0.05)
    return folder


def hashes(nodes: str, image_root: str | None = None) -> ContentHashes:
    config = Config(nodes=nodes, edges=str(Path(nodes).with_name("edges.csv")), image_root=image_root)
    graph = load_graph(config)
    return read_content_hashes(
        graph.nodes, graph.images, nodes, graph.nodes_fingerprint, cache_folder(nodes), build_accelerator()
    )


@pytest.mark.parametrize("with_root", [False, True])
def test_a_start_from_another_folder_reads_no_image(
    folder: Path, reads: list[object], monkeypatch: pytest.MonkeyPatch, with_root: bool
) -> None:
    monkeypatch.chdir(folder)
    first = hashes("nodes.csv", "." if with_root else None)
    assert len(reads) == 40
    starts = [(folder.parent, "graph/nodes.csv", "graph"), (Path("/"), str(folder / "nodes.csv"), str(folder))]
    for start, nodes, root in starts:
        monkeypatch.chdir(start)
        found = hashes(nodes, root if with_root else None)
        assert all(np.array_equal(a, b) for a, b in zip(first, found, strict=True))
    assert len(reads) == 40
    assert len(list((folder / "mmgraph_cache").glob("images-*.npy"))) == 1


def test_an_image_of_another_working_directory_is_read(
    folder: Path, reads: list[object], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Without a root, what is not in the table's folder is looked up in the working directory."""
    for number, name in enumerate(("one", "two")):
        (tmp_path / name / "images").mkdir(parents=True)
        shutil.copy(folder / f"images/{number}.png", tmp_path / name / "images/7.png")
    (folder / "images/7.png").unlink()
    time.sleep(0.05)
    found = []
    for name in ("one", "two"):
        monkeypatch.chdir(tmp_path / name)
        found.append(hashes(str(folder / "nodes.csv")))
    assert len(reads) == 41 and (found[0].images != found[1].images).nonzero()[0].tolist() == [7]
    assert found[0].images[7] == found[0].images[0] and found[1].images[7] == found[1].images[1]


def test_signatures(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the absolute path; none of what is no file, and of one that changed a moment ago or says so."""
    path, hour = folder / "images/0.png", 3600 * 10**9
    signature = file_signature(path, 0)
    monkeypatch.chdir(folder)
    assert signature == file_signature("images/../images/0.png", 0) and len(signature or b"") == 16
    assert file_signature(path, hour) is None
    os.utime(path, (0, 0))
    assert file_signature(path, 0) != signature and file_signature(path, hour) is None
    for missing in (folder / "images", folder / "none.png", "a\0b", "/dev/null"):
        assert file_signature(missing, hour) == b""
