"""Unusual and invalid node and edge tables: the correct join, or an error of one line that names the place."""

import csv
import io
import itertools
import math
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
import targets
from conftest import error_of, read_metrics
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from runs import brief, each, run

from mmgraph.data.readers import fingerprint
from mmgraph.data.table_cache import open_edges, open_nodes
from mmgraph.errors import UserError

Cases = Callable[[int], None]
TRICKY = [
    "007", "7", "NA", "nan", "null", "None", "1e5", "100000", "100000.0", str(2**63), "-1", "+1", " a", "a ", "a", "#",
    "TRUE", "true", "é", "e\u0301", 'quo"te', "com,ma", "new\nline", "car\rriage", "crlf\r\n", "tab\t", "\ufeff", "'",
    "0x10", "1_000", "2020-01-01", "inf", "\\", "\\n", "\x1a", "\u2028", "\U0001d518", "a" * 300,
]  # fmt: skip
IDS = st.one_of(
    st.sampled_from(TRICKY), st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=6)
)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[list[str]], list[list[str]]]:
    """Draw the rows of a node and an edge table, with headers.

    The node table has an extra column and its columns in any order. The edge table may have a third column.
    """
    ids = draw(st.lists(IDS, min_size=1, max_size=8))
    columns = draw(st.permutations(["node_id", "short_name", "summary", "image_path", "more"]))
    nodes = [columns] + [[name if column == "node_id" else draw(IDS) for column in columns] for name in ids]
    ends = st.one_of(st.sampled_from(ids), IDS)
    edges = [["src_id", "dst_id", "rel_id"][: draw(st.integers(2, 3))]]
    edges += draw(st.lists(st.lists(ends, min_size=len(edges[0]), max_size=len(edges[0])), min_size=1, max_size=12))
    return nodes, edges


@st.composite
def dialects(draw: st.DrawFn) -> tuple[str, int, bool, bool]:
    """Draw a CSV dialect: line end, quoting, with a byte-order mark, without a line end after the last row."""
    return (
        draw(st.sampled_from(["\n", "\r\n"])),
        draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
        draw(st.booleans()),
        draw(st.booleans()),
    )


def csv_bytes(rows: list[list[str]], dialect: tuple[str, int, bool, bool]) -> bytes:
    line_end, quoting, byte_order_mark, open_end = dialect
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=line_end, quoting=quoting).writerows(rows)  # type: ignore[arg-type]
    data = text.getvalue().encode()
    return (b"\xef\xbb\xbf" if byte_order_mark else b"") + (data.removesuffix(line_end.encode()) if open_end else data)


def joined(folder: Path, suffix: str) -> tuple[list[dict[str, str]], list[tuple[int, int]]]:
    """Return the nodes that mmgraph reads from the tables in a folder, and the edges as pairs of node rows."""
    paths = [folder / f"{name}.{suffix}" for name in ("nodes", "edges")]
    fingerprints = [fingerprint(path) for path in paths]
    nodes = open_nodes(str(paths[0]), fingerprints[0])
    edges = open_edges(str(paths[1]), fingerprints[1], nodes, fingerprints[0])
    rows = edges.rows[pd.RangeIndex(len(edges.rows)).to_numpy()]
    ids = map(str, nodes.ids(range(len(nodes))))
    return [{"node_id": name, **nodes[row]} for row, name in enumerate(ids)], [tuple(row) for row in rows.tolist()]


def expected(
    nodes: list[list[str]], edges: list[list[str]]
) -> tuple[list[dict[str, str]], list[tuple[int, int]]] | None:
    """Join the rows with dicts.

    Returns:
        The nodes, and the edges as pairs of node rows (None if there are no edges). None if the tables are invalid.
    """
    rows = [dict(zip(nodes[0], row, strict=True)) for row in nodes[1:]]
    index = {row["node_id"]: number for number, row in enumerate(rows)}
    ends = [row[:2] for row in edges[1:]]
    if len(index) < len(rows) or "" in index or "" in itertools.chain(*ends):
        return None
    return rows, [(index[a], index[b]) for a, b in ends if a in index and b in index] or None  # type: ignore[return-value]


def parsed(path: Path) -> list[list[str]] | None:
    """Return the rows of a CSV table, read with the csv module, or None if their lengths differ."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.reader(file) if row and (len(row) > 1 or row[0].strip())]
    return rows if {len(row) for row in rows} == {len(rows[0])} else None


def check(folder: Path, suffix: str, nodes: list[list[str]] | None, edges: list[list[str]] | None) -> None:
    """Check that mmgraph joins the tables in a folder correctly, or refuses them if they are invalid."""
    correct = None if nodes is None or edges is None else expected(nodes, edges)
    try:
        result = joined(folder, suffix)
    except UserError as error:
        assert correct is None or correct[1] is None, (str(error), nodes, edges)
    else:
        assert correct is not None and result == correct


@pytest.mark.fault("generated CSV tables in any dialect (hypothesis): the correct join, or one line")
@pytest.mark.parametrize("examples", [150, pytest.param(3000, marks=pytest.mark.slow)])
def test_generated_csv_tables(cases: Cases, examples: int) -> None:
    tried = [0]

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(graphs(), dialects())
    def tables(graph: tuple[list[list[str]], list[list[str]]], dialect: tuple[str, int, bool, bool]) -> None:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            for table, rows in zip(("nodes", "edges"), graph, strict=True):
                (folder / f"{table}.csv").write_bytes(csv_bytes(rows, dialect))
            check(folder, "csv", parsed(folder / "nodes.csv"), parsed(folder / "edges.csv"))
        tried[0] += 1

    tables()
    cases(tried[0])


@pytest.mark.fault("generated Parquet tables (hypothesis), with ids as text and as numbers: the correct join")
@pytest.mark.parametrize("examples", [60, pytest.param(1000, marks=pytest.mark.slow)])
def test_generated_parquet_tables(cases: Cases, examples: int) -> None:
    tried = [0]
    numbers = st.lists(st.integers(-(2**63), 2**63 - 1), min_size=1, max_size=8)

    @settings(max_examples=examples, deadline=None, database=None, derandomize=True,
              suppress_health_check=list(HealthCheck))  # fmt: skip
    @given(graphs(), st.none() | numbers)
    def tables(graph: tuple[list[list[str]], list[list[str]]], ids: list[int] | None) -> None:
        nodes, edges = graph
        if ids is not None:
            column = nodes[0].index("node_id")
            nodes = [nodes[0], *([*nodes[1][:column], str(name), *nodes[1][column + 1 :]] for name in ids)]
            edges = [["src_id", "dst_id"], *([str(a), str(b)] for a, b in zip(ids, reversed(ids), strict=True))]
        with tempfile.TemporaryDirectory() as name:
            for table, rows in (("nodes", nodes), ("edges", edges)):
                frame = pd.DataFrame(rows[1:], columns=rows[0])
                for key in ("node_id", "src_id", "dst_id") if ids is not None else ():
                    if key in frame:
                        frame[key] = frame[key].astype("int64")
                frame.to_parquet(Path(name) / f"{table}.parquet")
            check(Path(name), "parquet", nodes, edges)
        tried[0] += 1

    tables()
    cases(tried[0])


NODES = "node_id,short_name,summary,image_path\n"
EDGES = "src_id,dst_id\n"
GOOD = NODES + "a,x,,\nb,y,,\n", EDGES + "a,b\nb,a\n"
TABLES: list[tuple[str | bytes, str | bytes, tuple[object, ...]]] = [  # nodes, edges, what the error must contain
    ("", GOOD[1], ("nodes.csv",)),
    (NODES, GOOD[1], ("nodes.csv",)),
    (GOOD[0], EDGES, ("edges.csv",)),
    ("node_id,summary,image_path\na,,\n", GOOD[1], ("nodes.csv", "short_name")),
    (GOOD[0], "src_id\na\n", ("edges.csv", "dst_id")),
    (NODES.replace("summary", "node_id") + "a,x,y,\n", GOOD[1], ("nodes.csv", "node_id")),
    (GOOD[0], "src_id,dst_id,dst_id\na,b,b\n", ("edges.csv", "dst_id")),
    (NODES + "a,x,,\na,y,,\n", GOOD[1], ("nodes.csv", "line 3", "node_id", "a", "line 2")),
    (NODES + ",x,,\n", GOOD[1], ("nodes.csv", "line 2", "node_id")),
    (GOOD[0], EDGES + "a,b\n,a\n", ("edges.csv", "line 3", "src_id")),
    (NODES + "a,x,,,\n", GOOD[1], ("nodes.csv", "line 2", 5, 4)),
    (NODES + "a,x\n", GOOD[1], ("nodes.csv", "line 2", 2, 4)),
    (NODES + 'a,x,"never ends,\nb,x,,\n', GOOD[1], ("nodes.csv", "line 2", 3, 4)),
    (NODES + "a,x,tw\no lines,\n", GOOD[1], ("nodes.csv", "line 2", 3, 4)),
    (NODES + "a,x,car\rriage,\n", GOOD[1], ("nodes.csv", "line 2", 3, 4)),
    (NODES + "a,x,nul\0,\n", GOOD[1], ("nodes.csv", "line 2", "NUL")),
    (NODES.encode() + b"a,caf\xe9,,\n", GOOD[1], ("nodes.csv", "UTF-8")),
    (NODES.encode("utf-16"), GOOD[1], ("nodes.csv",)),
    (b"PAR1 no parquet", GOOD[1], ("nodes.csv", "node_id")),
    (GOOD[0], EDGES + "x,y\n", ("edges.csv", "x")),
    (GOOD[0], EDGES + "A,B\n", ("edges.csv", "A")),
    (NODES + "007,x,,\n7,y,,\n", EDGES + "07,7\n", ("edges.csv", "07")),
    (GOOD[0], GOOD[1], ("--global_batch_size", 48, 2)),
]


@pytest.mark.fault("invalid tables: one line with file and line number, exit code 2, nothing written")
def test_invalid_tables(graph: Path, tmp_path: Path, cases: Cases) -> None:
    def check_error(number: int) -> None:
        folder = tmp_path / f"{number}"
        folder.mkdir()
        *tables, facts = TABLES[number]
        for name, content in zip(("nodes.csv", "edges.csv"), tables, strict=True):
            (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        ended = run([*brief(graph, folder / "run"), f"--nodes={folder}/nodes.csv", f"--edges={folder}/edges.csv"])
        assert ended.code == 2 and error_of(ended.said, *facts)
        assert not (folder / "run").exists()

    cases(each(range(len(TABLES)), check_error))


FLIPS = (
    targets.imports(UserError, open_nodes, fingerprint)
    + """
import os, random, shutil, sys

folder, kind, tries = sys.argv[1], sys.argv[2], int(sys.argv[3])
os.environ["MMGRAPH_CACHE"] = f"{folder}/cache"
whole = open(f"{folder}/nodes.{kind}", "rb").read()
for seed in range(tries):
    generator, damaged = random.Random(seed), bytearray(whole)
    for _ in range(generator.choice((1, 1, 3))):
        damaged[generator.randrange(len(damaged))] ^= 1 << generator.randrange(8)
    path = f"{folder}/damaged.{kind}"
    open(path, "wb").write(damaged)
    print(seed, flush=True)
    try:
        table = open_nodes(path, fingerprint(path))
        [table[row] for row in range(len(table))]
    except UserError:
        pass
    shutil.rmtree(f"{folder}/cache", ignore_errors=True)
"""
)


@pytest.mark.fault(
    "Arrow and Parquet tables with flipped bits: read with changed text, or refused with one line; never a crash"
)
@pytest.mark.parametrize("tries", [50, pytest.param(3000, marks=pytest.mark.slow)])
def test_flipped_bits(tmp_path: Path, cases: Cases, tries: int) -> None:
    names = [f"n{row}" for row in range(50)]
    table = pa.table({"node_id": names, "short_name": names, "summary": ["a b c d"] * 50, "image_path": [""] * 50})
    with pa.OSFile(str(tmp_path / "nodes.arrow"), "wb") as file, pa.ipc.new_file(file, table.schema) as writer:
        writer.write_table(table)
    parquet.write_table(table, tmp_path / "nodes.parquet")
    for kind in ("arrow", "parquet"):
        command = [sys.executable, "-c", FLIPS, tmp_path, kind, str(tries)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, (done.returncode, done.stdout[-20:], done.stderr)
    cases(2 * tries)


@pytest.mark.fault("converted tables that are truncated or deleted: converted again, and the same run")
@pytest.mark.parametrize("every", [4, pytest.param(1, marks=pytest.mark.slow)])
def test_damaged_converted_tables(graph: Path, tmp_path: Path, cases: Cases, every: int) -> None:
    flags, cache = brief(graph, tmp_path / "whole"), {"MMGRAPH_CACHE": str(tmp_path / "cache")}
    assert run(flags, environment=cache).code == 0

    def check(case: tuple[str, str]) -> None:
        pattern, damage = case
        copy = tmp_path / f"{pattern.replace('*', '')}-{damage}"
        shutil.copytree(tmp_path / "cache", copy)
        [path] = copy.rglob(pattern)
        before = path.read_bytes()
        if damage == "lost":
            path.unlink()
        else:
            os.truncate(path, path.stat().st_size // 2 if damage == "half" else 0)
        ranks = 1 + (damage == "half")
        ended = run(brief(graph, copy / "run"), ranks=ranks, environment={"MMGRAPH_CACHE": str(copy)})
        assert ended.codes == [0] * ranks, ended.said
        assert path.read_bytes() == before or pattern.startswith(
            "images"
        )  # rebuilt; images-*.npy also holds file times
        losses = [[row["loss"] for row in read_metrics(folder)] for folder in (copy / "run", tmp_path / "whole")]
        assert losses[0] == pytest.approx(losses[1], abs=1e-5) if ranks > 1 else losses[0] == losses[1]

    files = ["nodes-*.arrow", "edges-*.npy", "edges-*.json", "texts-*.npy", "images-*.npy"]
    cases(each(list(itertools.product(files, ("half", "empty", "lost")))[::every], check))


@pytest.mark.fault("unusual tables that train: self-loops, repeated edges, isolated nodes, empty nodes")
@pytest.mark.parametrize("every", [2, pytest.param(1, marks=pytest.mark.slow)])
def test_unusual_tables_that_train(graph: Path, tmp_path: Path, cases: Cases, every: int) -> None:
    plain = "".join(f"{row},node {row},,\n" for row in range(20))
    ring = "".join(f"{row},{(row + 1) % 10}\n" for row in range(10)) * 5
    tables = {
        "self-loops": (plain, "".join(f"{row},{row}\n" for row in range(20)) * 3),
        "repeated": (plain, "0,1\n" * 60),
        "isolated": (plain, ring),
        "unknown": (plain, ring + "0,nobody\nnobody,1\n"),
        "nothing": ("".join(f"{row},,,\n" for row in range(20)), ring),
        "spaces": ("".join(f"{row},   ,  , \n" for row in range(20)), ring),
    }
    for name, (nodes, edges) in [*tables.items()][::every]:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "nodes.csv").write_text(NODES + nodes)
        (folder / "edges.csv").write_text(EDGES + edges)
        more = [f"--nodes={folder}/nodes.csv", f"--edges={folder}/edges.csv", "--max_steps=2"]
        for flags in ([], ["--tower_cache=off", "--false_negatives=mask_neighbors", "--missing_image=mask"]):
            ended = run([*brief(graph, folder / f"run{len(flags)}"), *more, *flags])
            assert ended.code == 0, ended.said
            assert all(math.isfinite(row["loss"]) for row in read_metrics(folder / f"run{len(flags)}"))
    cases(2 * len([*tables][::every]))
