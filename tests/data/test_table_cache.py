"""Memory-mapped tables: their rows equal the source files, each is converted once, and they use little memory."""

import csv
import errno
import json
import multiprocessing
import os
import pickle
import pkgutil
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import targets
from test_tables import BAD_TABLES, HEADER, assert_one_line, bad_table

from mmgraph.data import table_cache
from mmgraph.data.batches import EdgeRows
from mmgraph.data.edge_table import EdgeTable, EdgeWriter
from mmgraph.data.image_paths import ImagePaths
from mmgraph.data.node_table import NodeTable
from mmgraph.data.readers import fingerprint
from mmgraph.data.tables import known_edges, read_edges, read_nodes
from mmgraph.errors import UserError


def open_nodes(path: Path) -> NodeTable:
    return table_cache.open_nodes(path, fingerprint(path))


def open_edges(path: Path, nodes_path: Path) -> EdgeTable:
    nodes = open_nodes(nodes_path)
    return table_cache.open_edges(path, fingerprint(path), nodes, fingerprint(nodes_path)).rows


def edge_list(edges: EdgeTable) -> list[list[int]]:
    return edges[np.arange(len(edges))].tolist()


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small chunk sizes, so that a table of a few rows is read and looked up in several chunks."""
    monkeypatch.setattr(targets.ROW_CHUNK, 3)
    monkeypatch.setattr(targets.EDGE_CHUNK, 4)
    monkeypatch.setattr(targets.ID_CHUNK, 5)


@pytest.fixture
def temporary_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The folder for temporary folders, which replace a cache that cannot be written."""
    (folder := tmp_path / "stand_ins").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    yield folder
    table_cache.remove_temporary_folders()
    assert not list(folder.iterdir())


NODES = [
    ("007", "NA", "null", "images\\0.png"),
    ("7", 'a "quoted" name', "two\nlines, and a comma", ""),
    ("1e3", "ünïcödé 🦉", "   ", "x.png"),
    ("N/A", "", "", "  "),
    ("nan", "None", "1.50", "a/b.png"),
    ("a b", "tab\there", 'ends in "', "y.png"),
    (" a b", "\r\n", "-", "z.png"),
]


def nodes_csv(folder: Path, count: int = 40, encoding: str = "utf-8") -> Path:
    rows = [*NODES, *((f"n{i}", f"name {i}", f"summary of {i}", f"{i}.png") for i in range(count - len(NODES)))]
    with (folder / "nodes.csv").open("w", newline="", encoding=encoding) as file:
        writer = csv.writer(file)
        writer.writerow([*HEADER.strip().split(","), "extra"])
        writer.writerows((*row, f"0{i}") for i, row in enumerate(rows))
    return folder / "nodes.csv"


def edges_csv(folder: Path, nodes_path: Path, count: int = 100, unknown: str = "nobody") -> Path:
    with nodes_path.open(newline="", encoding="utf-8-sig") as file:
        ids = [row["node_id"] for row in csv.DictReader(file)] + [unknown]
    ends = np.random.default_rng(0).integers(len(ids), size=(count, 2)).tolist()
    with (folder / "edges.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["rel_id", "dst_id", "src_id"])
        writer.writerows((i, ids[destination], ids[source]) for i, (source, destination) in enumerate(ends))
    return folder / "edges.csv"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig"])
def test_rows_equal_csv(tmp_path: Path, small_chunks: None, encoding: str) -> None:
    path = nodes_csv(tmp_path, encoding=encoding)
    table, frame = open_nodes(path), read_nodes(path)
    with path.open(newline="", encoding="utf-8-sig") as file:
        csv_rows = list(csv.DictReader(file))
    assert len(table) == len(csv_rows) == 40
    assert table.ids(range(len(table))) == frame["node_id"].tolist() == [row["node_id"] for row in csv_rows]
    for i in (*range(40), -1):
        row = {name: value for name, value in csv_rows[i].items() if name != "node_id"}
        assert table[i] == row == frame.drop(columns="node_id").iloc[i].to_dict()
    with pytest.raises(IndexError):
        table[40]


@pytest.mark.parametrize("kind", ["parquet", "arrow", "feather", "stream"])
def test_rows_of_parquet_and_arrow(tmp_path: Path, small_chunks: None, kind: str) -> None:
    """Columns have text, float and categorical values; uncompressed Arrow files are not converted."""
    frame = read_nodes(nodes_csv(tmp_path))
    frame["extra"] = np.arange(40) / 7
    frame.loc[3, ["summary", "image_path"]] = None
    frame["kind"] = pd.Categorical(["x", "y"] * 20)
    path = tmp_path / f"n.{'arrow' if kind == 'stream' else kind}"
    if kind == "parquet":
        frame[::-1][::-1].iloc[1:].to_parquet(path, row_group_size=7)  # adds pandas' index as a column
        frame = frame.iloc[1:]
    elif kind == "feather":
        frame.to_feather(path)  # compressed
    else:
        new = pa.ipc.new_file if kind == "arrow" else pa.ipc.new_stream
        arrow = pa.Table.from_pandas(frame)
        with new(path, arrow.schema) as writer:
            writer.write_table(arrow, max_chunksize=7)
    table = open_nodes(path)
    assert (table.path == path) == (kind in ("arrow", "stream"))
    assert table.ids(range(len(table))) == frame["node_id"].tolist() == read_nodes(path)["node_id"].tolist()
    expected = frame.drop(columns="node_id").astype(object)
    expected = expected.where(frame.notna(), None)
    for i in range(len(frame)):
        assert table[i] == expected.iloc[i].to_dict()


def test_integer_ids_are_read_as_text(tmp_path: Path) -> None:
    frame = pd.DataFrame({"node_id": [7, 8], "short_name": [1, 2], "summary": ["x", None], "image_path": ["", ""]})
    arrow = pa.Table.from_pandas(frame)
    frame.to_parquet(tmp_path / "n.parquet")
    for name, table in (("a", arrow), ("b", arrow.set_column(1, "short_name", pa.array(["1", "2"])))):
        with pa.ipc.new_file(tmp_path / f"{name}.arrow", table.schema) as writer:
            writer.write_table(table)
    (tmp_path / "e.csv").write_text("src_id,dst_id\n8,7\n7,8\n07,8\n")
    for name in ("n.parquet", "a.arrow", "b.arrow"):
        nodes = open_nodes(tmp_path / name)
        assert nodes[1] == {"short_name": "2", "summary": None, "image_path": ""}
        assert (nodes.path.name == name) == (name == "b.arrow")
        assert edge_list(open_edges(tmp_path / "e.csv", tmp_path / name)) == [[1, 0], [0, 1]]


@pytest.mark.parametrize("suffix", ["csv", "parquet", "arrow"])
def test_edges_between_known_nodes(
    tmp_path: Path, small_chunks: None, suffix: str, capsys: pytest.CaptureFixture[str]
) -> None:
    nodes_path = nodes_csv(tmp_path)
    path = edges_csv(tmp_path, nodes_path)
    frame = pd.read_csv(path, dtype=str, keep_default_na=False)
    if suffix == "parquet":
        frame.to_parquet(path := tmp_path / "e.parquet", row_group_size=11)
    elif suffix == "arrow":
        frame.to_feather(path := tmp_path / "e.arrow", compression="uncompressed")
    expected = known_edges(read_nodes(nodes_path), read_edges(path), path)
    messages = capsys.readouterr().out.splitlines()
    edges = open_edges(path, nodes_path)
    nodes = open_nodes(nodes_path)
    rows = {node_id: row for row, node_id in enumerate(nodes.ids(range(len(nodes))))}
    ends_of_edges = [[rows.get(a, -1), rows.get(b, -1)] for a, b in zip(frame["src_id"], frame["dst_id"], strict=True)]
    assert edge_list(edges) == expected.tolist() == [ends for ends in ends_of_edges if min(ends) >= 0]
    assert 0 < len(edges) < 100 and np.load(edges.path).dtype == np.int32
    sample = np.random.default_rng(1).integers(len(edges), size=(300,))
    assert edges[sample].dtype == np.int64 and np.array_equal(edges[sample], expected[sample])
    dataset = EdgeRows(edges)
    assert dataset[5] == (5, *expected[5]) and dataset.__getitems__([5, 2]) == [dataset[5], dataset[2]]
    assert messages[-1] in capsys.readouterr().out.splitlines()
    open_edges(path, nodes_path)
    # every start logs the dropped edges; the second start does not convert the table
    assert capsys.readouterr().out.splitlines() == messages[-1:]


def test_edge_file_dtype_depends_on_node_count(tmp_path: Path) -> None:
    rows = np.array([[1, 2**31], [2**40, 0]])
    for num_nodes in (2**31, 2**31 + 1):
        with (tmp_path / "e.npy").open("w+b") as file:
            writer = EdgeWriter(file, num_nodes)
            for row in rows:
                writer.write(row[None] % num_nodes)
            writer.finish()
        assert np.array_equal(EdgeTable(tmp_path / "e.npy")[np.arange(2)], rows % num_nodes)
        assert np.load(tmp_path / "e.npy").itemsize == (4 if num_nodes == 2**31 else 8)


def test_tables_are_converted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nodes_path = nodes_csv(tmp_path)
    edges_path = edges_csv(tmp_path, nodes_path)
    edges = edge_list(open_edges(edges_path, nodes_path))
    frame = read_nodes(nodes_path)
    with pa.ipc.new_file(arrow_path := tmp_path / "n.arrow", pa.Schema.from_pandas(frame)) as writer:
        writer.write_table(pa.Table.from_pandas(frame))
    open_nodes(arrow_path)
    names = {path.name.split("-")[0] + path.suffix for path in (tmp_path / "mmgraph_cache/tables").iterdir()}
    assert names == {"nodes.arrow", "nodes.checked", "edges.npy", "edges.json"}

    def fail(*_: Any) -> None:
        raise AssertionError("read again")

    monkeypatch.setattr(targets.READ_CHUNKS, fail)
    monkeypatch.setattr(targets.CHECK_UNIQUE, fail)
    assert edge_list(open_edges(edges_path, nodes_path)) == edges
    open_nodes(arrow_path)
    monkeypatch.undo()
    nodes_path.write_text(nodes_path.read_text().replace("n7,", "m7,").replace("name 9", "name nine"))
    assert open_nodes(nodes_path)[7 + 9]["short_name"] == "name nine"
    fewer_edges = open_edges(edges_path, nodes_path)
    assert edge_list(fewer_edges) == known_edges(read_nodes(nodes_path), read_edges(edges_path)).tolist()
    assert len(fewer_edges) < len(edges)


@pytest.mark.parametrize(("content", "facts"), BAD_TABLES)
def test_errors_equal_those_of_read_nodes(
    tmp_path: Path, small_chunks: None, content: str | bytes | None, facts: tuple[str, ...]
) -> None:
    path = bad_table(tmp_path / "nodes.csv", content)
    with pytest.raises(UserError) as expected:
        read_nodes(path)
    with pytest.raises(UserError) as caught:
        open_nodes(path)
    assert_one_line(caught.value, path, *facts)
    assert str(caught.value) == str(expected.value)
    assert not list(tmp_path.glob("mmgraph_cache/tables/*")) and not list(tmp_path.glob("mmgraph_cache/tables/.*"))


def test_errors_beyond_the_first_chunk(tmp_path: Path, small_chunks: None) -> None:
    path = nodes_csv(tmp_path)
    good = path.read_text()
    for more, facts in (
        (',"x",,,', ("line 44", "node_id")),  # the line number counts two line breaks in quotes above
        ("n3,x,,,", ("line 44", "node_id", "'n3'", "line 14")),
        ("z,x,,,,,", ("line 44", "7", "5")),
        ('z,"x', ("line 44", "2", "5")),
    ):
        path.write_text(good + more + "\n")
        with pytest.raises(UserError) as caught:
            open_nodes(path)
        assert_one_line(caught.value, path, *facts)
    path.write_text(good)
    edges = edges_csv(tmp_path, path)
    for more, facts in (("0,,007", ("line 102", "dst_id")), ("0,1,2,3", ("line 102", "4", "3"))):
        edges.write_text(edges_csv(tmp_path, path).read_text() + more + "\n")
        with pytest.raises(UserError) as caught:
            open_edges(edges, path)
        assert_one_line(caught.value, edges, *facts)
    edges.write_text("src_id,dst_id\n" + "nobody,none\n" * 9)
    with pytest.raises(UserError) as caught:
        open_edges(edges, path)
    assert_one_line(caught.value, edges, "'nobody'")  # the first unknown id
    frame = pd.concat([read_nodes(path), read_nodes(path)[4:5]])
    frame.reset_index(drop=True).to_feather(arrow := tmp_path / "n.arrow", compression="uncompressed")
    with pytest.raises(UserError) as caught:
        open_nodes(arrow)
    assert_one_line(caught.value, arrow, "row 40", "node_id", "'nan'", "row 4")
    for content in (b"", b"no table"):
        arrow.write_bytes(content)
        with pytest.raises(UserError) as caught:
            open_nodes(arrow)
        assert_one_line(caught.value, arrow, "Arrow")


def test_table_changed_during_conversion_is_not_cached(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = nodes_csv(tmp_path)
    digest = fingerprint(path)
    path.write_text(path.read_text() + "more,,,,\n")
    with pytest.raises(UserError) as caught:
        table_cache.open_nodes(path, digest)
    assert_one_line(caught.value, path)
    assert not list(tmp_path.glob("mmgraph_cache/tables/*.arrow"))
    assert len(open_nodes(path)) == 41 and len(list(tmp_path.glob("mmgraph_cache/tables/*"))) == 1


OPEN = """
import pkgutil, sys, time, os
from pathlib import Path
from pytest import MonkeyPatch
from mmgraph.data import table_cache
from mmgraph.data.readers import fingerprint
folder = Path(sys.argv[1])
def slow(write):
    def call(*arguments):
        done = write(*arguments)
        print("written", flush=True)
        time.sleep(float(sys.argv[2]))
        return done
    return call
MonkeyPatch().setattr(sys.argv[3], slow(pkgutil.resolve_name(sys.argv[3])))
nodes, edges = folder / "nodes.csv", folder / "edges.csv"
table = table_cache.open_nodes(nodes, fingerprint(nodes))
rows = table_cache.open_edges(edges, fingerprint(edges), table, fingerprint(nodes)).rows
print(len(table), len(rows), table.path)
"""


def start_opening(folder: Path, seconds: float, **environment: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", OPEN, str(folder), str(seconds), targets.CHECK_UNIQUE],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={**os.environ, **environment},
    )  # fmt: skip


def cache_files(folder: Path) -> dict[str, bytes]:
    """Return the bytes of all files in the cache, by file name."""
    return {path.name: path.read_bytes() for path in (folder / "mmgraph_cache/tables").iterdir()}


def test_concurrent_processes_convert_once(tmp_path: Path) -> None:
    edges_csv(tmp_path, nodes_csv(tmp_path))
    processes = [start_opening(tmp_path, 1.5, RANK="0") for _ in range(2)]
    outputs = [process.communicate(timeout=100) for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    lines = [line for output, _ in outputs for line in output.splitlines()]
    assert lines.count("written") == 1
    for name in ("nodes.csv", "edges.csv"):  # each is converted by one process, which logs the seconds
        assert len([line for line in lines if re.search(rf"{name}: .*\b\d+\.\d s\b", line)]) == 1
    assert len({output.splitlines()[-1] for output, _ in outputs}) == 1
    assert len(cache_files(tmp_path)) == 5  # nodes, edges, which rows they are, relations, and the summary of the edges


def test_killed_conversion_leaves_no_partial_table(tmp_path: Path) -> None:
    (tmp_path / "killed").mkdir()
    (tmp_path / "whole").mkdir()
    for folder in (tmp_path / "killed", tmp_path / "whole"):
        edges_csv(folder, nodes_csv(folder))
    child = start_opening(tmp_path / "killed", 60)
    assert child.stdout is not None and child.stdout.readline() == "written\n"
    child.kill()
    child.wait()
    child.communicate()
    [left] = cache_files(tmp_path / "killed")
    assert left.startswith(".") and left.endswith(".tmp")
    start = time.monotonic()
    for folder in (tmp_path / "killed", tmp_path / "whole"):
        open_edges(folder / "edges.csv", folder / "nodes.csv")
    assert cache_files(tmp_path / "killed") == cache_files(tmp_path / "whole") and time.monotonic() - start < 10


def test_unwritable_cache(tmp_path: Path) -> None:
    edges_csv(tmp_path, nodes_csv(tmp_path))
    (tmp_path / "file").touch()
    (tmp_path / "temporary").mkdir()
    child = start_opening(tmp_path, 0, MMGRAPH_CACHE=str(tmp_path / "file/cache"), TMPDIR=str(tmp_path / "temporary"))
    output, errors = child.communicate(timeout=100)
    assert child.returncode == 0, errors
    [message] = [line for line in output.splitlines() if os.strerror(errno.ENOTDIR) in line]
    assert str(tmp_path / "file/cache") in message
    assert str(tmp_path / "temporary") in output.splitlines()[-1] and output.splitlines()[-1].startswith("40 ")
    assert not list((tmp_path / "temporary").iterdir())  # removed at exit


def test_cache_on_full_disk(
    tmp_path: Path, temporary_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = nodes_csv(tmp_path)
    claim_file = pkgutil.resolve_name(targets.CLAIM_FILE)

    class Full:
        closed = False

        def write(self, _: object) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        def flush(self) -> None: ...

    @contextmanager
    def full(path: Path) -> Iterator[Any]:
        with claim_file(path) as file:
            yield file if temporary_root in path.parents or file is None else Full()

    monkeypatch.setattr(targets.CLAIM_FILE, full)
    first, second = open_nodes(path), open_nodes(path)
    assert len(first) == len(second) == 40 and first.path == second.path and temporary_root in first.path.parents
    [message] = [line for line in capsys.readouterr().out.splitlines() if os.strerror(errno.ENOSPC) in line]
    assert str(tmp_path / "mmgraph_cache/tables") in message
    assert cache_files(tmp_path) == {}


def test_complete_read_only_cache_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = nodes_csv(tmp_path)
    converted = open_nodes(path).path

    def refuse(*_: Any) -> None:
        raise PermissionError

    monkeypatch.setattr(targets.CLAIM_FILE, refuse)
    monkeypatch.setattr(Path, "mkdir", refuse)
    assert open_nodes(path).path == converted


def test_damaged_table_in_read_only_cache(
    tmp_path: Path, temporary_root: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A damaged table that cannot be removed is converted again to a temporary folder."""
    path = nodes_csv(tmp_path)
    converted = open_nodes(path).path
    os.truncate(converted, converted.stat().st_size // 2)

    def refuse(*_: Any, **__: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refuse)
        assert len(table := open_nodes(path)) == 40 and temporary_root in table.path.parents
    [message] = [line for line in capsys.readouterr().out.splitlines() if os.strerror(errno.EROFS) in line]
    assert str(converted.parent) in message


def test_table_rebuilt_by_another_process_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = nodes_csv(tmp_path)
    converted = open_nodes(path).path
    whole = converted.read_bytes()
    os.truncate(converted, len(whole) // 2)
    fresh = tmp_path / "fresh"
    fresh.write_bytes(whole)
    rebuilt = fresh.stat()

    def open_damaged(name: Path) -> NodeTable:
        if fresh.exists():
            fresh.replace(name)
            raise pa.ArrowInvalid("damaged")
        return NodeTable(name)

    monkeypatch.setattr(targets.OPENED_NODE_TABLE, open_damaged)
    assert len(open_nodes(path)) == 40 and converted.stat().st_mtime_ns == rebuilt.st_mtime_ns


def test_tables_in_other_processes(tmp_path: Path) -> None:
    nodes_path = nodes_csv(tmp_path)
    edges = open_edges(edges_csv(tmp_path, nodes_path), nodes_path)
    nodes = open_nodes(nodes_path)
    expected = [nodes[row] for row in range(40)]
    assert len(pickle.dumps((nodes, edges))) < 1000
    for method in ("spawn", "fork"):
        with multiprocessing.get_context(method).Pool(1) as pool:
            assert pool.map(nodes.__getitem__, range(40)) == expected
            assert pool.apply(edges.__getitem__, (np.arange(len(edges)),)).tolist() == edge_list(edges)


def test_image_path_check_samples_filled_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = [f"{i}.png" if i % 3 == 0 else [None, "", " \t"][i % 9 // 3] for i in range(200_000)]
    filled = {name for name in names if name and name.strip()}
    column = pa.chunked_array([names[:70_000], names[70_000:70_001], names[70_001:]])
    looked_up: list[object] = []
    monkeypatch.setattr(
        targets.RESOLVE_IMAGE_PATH, lambda self, name: looked_up.append(name) or str(tmp_path / "n.csv")
    )
    (tmp_path / "n.csv").touch()
    draws = []
    for seed in (0, 0, 1):
        looked_up.clear()
        ImagePaths(tmp_path / "n.csv").check(column, seed)
        draws.append(list(looked_up))
        assert len(looked_up) == len(set(looked_up)) == 1000 and set(looked_up) <= filled
        indices = np.array([int(str(name).split(".")[0]) for name in looked_up])
        assert 90_000 < indices.mean() < 110_000  # from the whole table: the mean's standard deviation is 1,800
    assert draws[0] == draws[1] != draws[2]


def generate(folder: Path, nodes: int, edges: int) -> None:
    """Write tables with shuffled ids and summaries of 45 to 190 characters."""
    with (folder / "nodes.csv").open("w") as file:
        file.write(HEADER)
        for i in range(nodes):
            name = f"images/{i}.jpg" if i % 10 else "nodes.csv"  # every tenth node's file exists
            text = f'"a summary of node {i}, as long as summaries are{", with more words" * (i % 9)}"'
            file.write(f"Q{i * 7919 % (10 * nodes)},name {i},{text},{name}\n")
    generator = np.random.default_rng(0)
    with (folder / "edges.csv").open("w") as file:
        file.write("src_id,dst_id\n")
        for _ in range(0, edges, 100_000):
            ends = generator.integers(nodes, size=(100_000, 2)) * 7919 % (10 * nodes)
            file.write("".join(f"Q{source},Q{destination}\n" for source, destination in ends.tolist()))


def measure_memory(folder: Path) -> dict[str, float]:
    command = [sys.executable, str(Path(__file__).parent / "table_memory.py"), str(folder)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("nodes", "edges"),
    [(40_000, 400_000), (1_000_000, 10_000_000)],
    ids=["40k_nodes", "1m_nodes"],
)
def test_memory_of_tables(tmp_path: Path, nodes: int, edges: int) -> None:
    """The memory of a first start, which converts the tables, and of a second start stays small.

    It is measured after the tables are loaded, after every node is read, and while batches of edges are read in the
    main process and in a worker.
    """
    generate(tmp_path, nodes, edges)
    for start in ("first", "second"):
        metrics = measure_memory(tmp_path)
        print(start, {name: round(value, 1) for name, value in metrics.items()})
        assert (metrics["nodes"], metrics["edges"]) == (nodes, edges)
        assert metrics["after_load_mb"] < 60 and metrics["after_every_row_mb"] < 60
        assert metrics["main_epoch_mb"] < 5 and metrics["worker_epoch_mb"] < 5
    assert metrics["load_s"] < 5
