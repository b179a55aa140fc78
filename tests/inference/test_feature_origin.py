"""Feature files know which nodes their rows belong to, and ``encode`` does not overwrite those of other nodes."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import error_of, line_with, settings, tree
from targets import WRITE_FEATURES

from mmgraph.cli import main, train_main
from mmgraph.data.readers import fingerprint
from mmgraph.data.table_cache import open_nodes
from mmgraph.inference.feature_files import FORMATS
from mmgraph.inference.feature_origin import ids_digest

WITHOUT_IDS = [kind for kind in FORMATS if kind != "parquet"]
Capture = pytest.CaptureFixture[str]


def read_csv(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False)


@pytest.fixture(scope="module")
def folder(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with copies of the graph's tables, and a run of two steps with z_graph in all formats."""
    folder = tmp_path_factory.mktemp("origin")
    nodes = read_csv(graph / "nodes.csv")
    nodes["image_path"] = [str(graph / path.replace("\\", "/")) for path in nodes["image_path"]]
    nodes.loc[3, "node_id"] = "ünï 3"  # the edges of node 003 are dropped
    nodes.to_csv(folder / "nodes.csv", index=False)
    shutil.copy(graph / "edges.csv", folder)
    flags = settings(graph, folder / "run", f"--nodes={folder / 'nodes.csv'}", f"--edges={folder / 'edges.csv'}")
    assert train_main([*flags, "--eval_fraction=0.2", "--max_steps=2"]) == 0
    for kind in FORMATS:
        assert main(["encode", str(folder / "run"), f"--format={kind}", "--features=z_graph"]) == 0
    return folder


@pytest.fixture
def run(folder: Path) -> Iterator[Path]:
    """The run's folder. The node table and the run's files are restored after the test."""
    before = (folder / "nodes.csv").read_bytes()
    shutil.copytree(folder / "run", folder / "backup")
    yield folder / "run"
    (folder / "nodes.csv").write_bytes(before)
    shutil.rmtree(folder / "run")
    (folder / "backup").rename(folder / "run")


def feature_file(run: Path, kind: str) -> Path:
    return run / f"features/features_z_graph.{kind}"


def origin_of(run: Path, kind: str) -> Path:
    return run / f"features/features_z_graph.{kind}.json"


def mrr(folder: Path, *arguments: object) -> float:
    assert main(["evaluate", *map(str, arguments), f"--json={folder / 'table.json'}"]) == 0
    return float(json.loads((folder / "table.json").read_text())["embeddings"]["z_graph"]["mrr"])


def mrr_of_run(run: Path) -> float:
    return float(json.loads((run / "evaluation.json").read_text())["embeddings"]["z_graph"]["mrr"])


def warnings(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("warning: ")]


def sort_nodes(folder: Path) -> None:
    read_csv(folder / "nodes.csv").sample(frac=1, random_state=1).to_csv(folder / "nodes.csv", index=False)


def test_encode_writes_the_origin_beside_each_file(run: Path, folder: Path) -> None:
    ids = hashlib.sha256()
    for node_id in read_csv(folder / "nodes.csv")["node_id"]:
        ids.update(len(node_id.encode()).to_bytes(4, "little") + node_id.encode())
    table = hashlib.sha256((folder / "nodes.csv").read_bytes()).hexdigest()
    names = {f"features_z_graph.{kind}" for kind in FORMATS}
    files = {path.name for path in (run / "features").iterdir()} - {".lock"}
    assert files == names | {f"{name}.json" for name in names}
    origins = [json.loads(origin_of(run, kind).read_text()) for kind in FORMATS]
    checkpoints = {origin.pop("checkpoint_sha256") for origin in origins}
    assert origins == [{"nodes": 40, "ids_sha256": ids.hexdigest(), "nodes_sha256": table}] * 4
    assert len(checkpoints) == 1 and len(checkpoints.pop()) == 64


@pytest.mark.parametrize("kind", FORMATS)
def test_features_of_the_same_nodes_are_ranked(run: Path, folder: Path, capsys: Capture, kind: str) -> None:
    """Also after the texts of the nodes were edited."""
    assert mrr(folder, feature_file(run, kind)) == mrr_of_run(run)
    nodes = read_csv(folder / "nodes.csv")
    nodes.assign(summary="another text", extra="x").to_csv(folder / "nodes.csv", index=False)
    assert mrr(folder, feature_file(run, kind)) == mrr_of_run(run)
    assert not warnings(capsys.readouterr().out)


def test_origins_are_no_feature_files(run: Path, folder: Path) -> None:
    """The shell pattern features/* also names the origins. The four files with the same name are listed by path."""
    names = [path for path in sorted((run / "features").iterdir()) if path.name != ".lock"]
    assert len(names) == 8
    assert main(["evaluate", *map(str, names), f"--json={folder / 'table.json'}"]) == 0
    table = json.loads((folder / "table.json").read_text())
    assert {*table["embeddings"]} == {str(feature_file(run, kind)) for kind in FORMATS} | {"random"}


@pytest.mark.parametrize("kind", FORMATS)
def test_features_after_the_nodes_were_sorted(run: Path, folder: Path, capsys: Capture, kind: str) -> None:
    """Without ids, the rows would belong to other nodes: this is refused. With ids, the rows are found."""
    sort_nodes(folder)
    capsys.readouterr()
    if kind == "parquet":
        assert mrr(folder, feature_file(run, kind)) == pytest.approx(mrr_of_run(run), abs=1e-9)
        return
    assert main(["evaluate", str(feature_file(run, kind)), f"--json={folder / 'none.json'}"]) == 2
    error_of(capsys.readouterr().err, feature_file(run, kind), folder / "nodes.csv")
    assert not (folder / "none.json").exists()


def test_a_renamed_node_is_another_node(run: Path, folder: Path, capsys: Capture) -> None:
    nodes = read_csv(folder / "nodes.csv")
    nodes.loc[3, "node_id"] = "ünï 4"
    nodes.to_csv(folder / "nodes.csv", index=False)
    for kind in FORMATS:
        assert main(["evaluate", str(feature_file(run, kind))]) == 2
        error_of(capsys.readouterr().err, feature_file(run, kind))


def test_ids_with_another_boundary_are_other_ids(tmp_path: Path) -> None:
    """The digest of the ids ``a``, ``bc`` is not that of ``ab``, ``c``, and depends on their order."""
    digests = set()
    for number, ids in enumerate((["a", "bc"], ["ab", "c"], ["bc", "a"])):
        path = tmp_path / f"{number}.csv"
        pd.DataFrame({"node_id": ids, "short_name": "x", "summary": "", "image_path": ""}).to_csv(path, index=False)
        digests.add(ids_digest(open_nodes(path, fingerprint(path))))
    assert len(digests) == 3


@pytest.mark.parametrize("kind", WITHOUT_IDS)
def test_a_file_without_an_origin_has_a_warning(run: Path, folder: Path, capsys: Capture, kind: str) -> None:
    """It may be a file of the original trainer. Parquet has ids, and needs no origin."""
    for path in (run / "features").glob("*.json"):
        path.unlink()
    capsys.readouterr()
    assert mrr(folder, feature_file(run, kind)) == mrr_of_run(run)
    [warning] = warnings(capsys.readouterr().out)
    assert line_with(warning, feature_file(run, kind), origin_of(run, kind).name, folder / "nodes.csv")
    assert mrr(folder, feature_file(run, "parquet")) == mrr_of_run(run)
    assert not warnings(capsys.readouterr().out)


DAMAGED = [b"", b'{"nodes": 40, "ids_sha256": "0', b"[1]", b"null", b"{}", b'{"ids_sha256": "0"}', b"\xff", b"[" * 9999]


@pytest.mark.parametrize("content", DAMAGED, ids=[f"{content[:20]!r}" for content in DAMAGED])
def test_a_damaged_origin_is_one_error(run: Path, capsys: Capture, content: bytes) -> None:
    origin_of(run, "npy").write_bytes(content)
    assert main(["evaluate", str(feature_file(run, "npy"))]) == 2
    error_of(capsys.readouterr().err, origin_of(run, "npy"), "mmgraph encode")


def other_nodes(folder: Path) -> Path:
    """Write a table with other nodes than the run's."""
    path = folder / "other.csv"
    read_csv(folder / "nodes.csv")[:7].to_csv(path, index=False)
    return path


@pytest.mark.parametrize("older", [False, True])
def test_encode_keeps_the_features_of_the_run(
    run: Path, folder: Path, tmp_path: Path, capsys: Capture, older: bool
) -> None:
    """For other nodes, ``encode`` needs ``--output_dir``. A copy of the run's table needs none.

    The resume state of an older run, without a split, tells which table is the run's.
    """
    if older:
        shutil.rmtree(run / "split")
    before = tree(run)
    other = other_nodes(folder)
    assert main(["encode", str(run), f"--nodes={other}"]) == 2
    error_of(capsys.readouterr().err, f"--nodes {other}", "--output_dir", run / "features")
    assert tree(run) == before
    assert main(["encode", str(run), f"--nodes={other}", f"--output_dir={tmp_path}", "--format=npy"]) == 0
    assert np.load(tmp_path / "features_z_graph.npy").shape == (7, 16) and tree(run) == before
    shutil.rmtree(run / "features")
    copy = shutil.copy(folder / "nodes.csv", folder / "copy.csv")
    for kind in ("npy", "pt"):
        assert main(["encode", str(run), f"--nodes={copy}", "--features=z_graph", f"--format={kind}"]) == 0
    written = {path: digest for path, digest in tree(run).items() if path.startswith("features/features_")}
    assert len(written) == 4 and written == {path: before[path] for path in written}


def test_without_split_and_state_only_the_path_counts(run: Path, folder: Path, capsys: Capture) -> None:
    for name in ("split", "state"):
        shutil.rmtree(run / name)
    copy = shutil.copy(folder / "nodes.csv", folder / "copy.csv")
    assert main(["encode", str(run), f"--nodes={copy}"]) == 2
    error_of(capsys.readouterr().err, f"--nodes {copy}", "--output_dir")
    linked = folder / "link.csv"
    linked.unlink(missing_ok=True)
    linked.symlink_to(folder / "nodes.csv")
    assert main(["encode", str(run), f"--nodes={linked}", "--features=z_graph"]) == 0


def test_an_interrupted_write_leaves_no_origin(
    run: Path, folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    """If the file of other weights is not written, the old file stays without its origin. The next call writes both."""
    before = tree(run / "features")
    command = ["encode", str(run), "--features=z_graph"]
    sort_nodes(folder)

    def full(path: Path, *_: Any) -> Iterator[int]:
        assert not origin_of(run, "pt").exists() and path == feature_file(run, "pt")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(WRITE_FEATURES, full)
        assert main(command) == 1
    after = {path: digest for path, digest in tree(run / "features").items() if path.startswith("features_")}
    origin = origin_of(run, "pt").name
    assert after == {path: digest for path, digest in before.items() if path.startswith("features_") and path != origin}
    assert main(command) == 0
    capsys.readouterr()
    assert mrr(folder, feature_file(run, "pt")) == pytest.approx(mrr_of_run(run), abs=1e-3)
    assert not warnings(capsys.readouterr().out)
    assert json.loads(origin_of(run, "pt").read_text()) != json.loads(origin_of(run, "npy").read_text())
