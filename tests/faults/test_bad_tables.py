"""Node and edge tables of every bad kind: one line that says where, or exactly the join that they say."""

import csv
import io
import itertools
import tempfile
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mmgraph.errors import UserError
from mmgraph.table_cache import open_edges, open_nodes
from mmgraph.table_files import fingerprint

Cases = Callable[[int], None]
TRICKY = ["007", "7", "NA", "nan", "null", "None", "1e5", "100000", "100000.0", str(2**63), "-1", "+1", " a", "a ", "a",
          "TRUE", "true", "é", "e\u0301", 'quo"te', "com,ma", "new\nline", "car\rriage", "crlf\r\n", "tab\t", "\ufeff", "'",
          "#", "0x10", "1_000", "2020-01-01", "inf", "\\", "\\n", "\x1a", "\u2028", "𝔘", "a" * 300]  # fmt: skip
IDS = st.one_of(
    st.sampled_from(TRICKY), st.text(st.characters(exclude_categories=("Cs",), exclude_characters="\0"), max_size=6)
)


@st.composite
def graphs(draw: st.DrawFn) -> tuple[list[list[str]], list[list[str]]]:
    """Rows of a node and an edge table, headers first, in any order of columns and with more of them."""
    ids = draw(st.lists(IDS, min_size=1, max_size=8))
    columns = draw(st.permutations(["node_id", "short_name", "summary", "image_path", "more"]))
    nodes = [columns] + [[name if column == "node_id" else draw(IDS) for column in columns] for name in ids]
    ends = st.one_of(st.sampled_from(ids), IDS)
    edges = [["src_id", "dst_id", "rel_id"][: draw(st.integers(2, 3))]]
    edges += draw(st.lists(st.lists(ends, min_size=len(edges[0]), max_size=len(edges[0])), min_size=1, max_size=12))
    return nodes, edges


@st.composite
def dialects(draw: st.DrawFn) -> tuple[str, int, bool, bool]:
    """Line ends, quoting, a byte-order mark, no line end at the end."""
    return (
        draw(st.sampled_from(["\n", "\r\n"])),
        draw(st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL])),
        draw(st.booleans()),
        draw(st.booleans()),
    )


def csv_bytes(rows: list[list[str]], dialect: tuple[str, int, bool, bool]) -> bytes:
    ends, quoting, mark, open_end = dialect
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator=ends, quoting=quoting).writerows(rows)  # type: ignore[arg-type]
    data = text.getvalue().encode()
    return (b"\xef\xbb\xbf" if mark else b"") + (data.removesuffix(ends.encode()) if open_end else data)


def joined(folder: Path, suffix: str) -> tuple[list[dict[str, str]], list[tuple[int, int]]]:
    """What mmgraph makes of the tables in a folder: nodes, and edges as rows."""
    paths = [folder / f"{name}.{suffix}" for name in ("nodes", "edges")]
    prints = [fingerprint(path) for path in paths]
    nodes = open_nodes(str(paths[0]), prints[0])
    edges = open_edges(str(paths[1]), prints[1], nodes, prints[0])
    rows = edges.rows[pd.RangeIndex(len(edges.rows)).to_numpy()]
    ids = nodes.column("node_id").cast(pa.large_string()).to_pylist()
    return [{"node_id": name, **nodes[row]} for row, name in enumerate(ids)], [tuple(row) for row in rows.tolist()]


def expected(
    nodes: list[list[str]], edges: list[list[str]]
) -> tuple[list[dict[str, str]], list[tuple[int, int]]] | None:
    """The same by dicts; None where it is to be refused."""
    rows = [dict(zip(nodes[0], row, strict=True)) for row in nodes[1:]]
    index = {row["node_id"]: number for number, row in enumerate(rows)}
    ends = [row[:2] for row in edges[1:]]
    if len(index) < len(rows) or "" in index or "" in itertools.chain(*ends):
        return None
    return rows, [(index[a], index[b]) for a, b in ends if a in index and b in index] or None  # type: ignore[return-value]


def parsed(path: Path) -> list[list[str]] | None:
    """A CSV table's rows by the csv module; None where they are not of one length."""
    with path.open(encoding="utf-8-sig", newline="") as file:
        rows = [row for row in csv.reader(file) if row and (len(row) > 1 or row[0].strip())]
    return rows if {len(row) for row in rows} == {len(rows[0])} else None


def check(folder: Path, suffix: str, nodes: list[list[str]] | None, edges: list[list[str]] | None) -> None:
    """Insist that tables are joined as their rows say, or refused where they can't be."""
    wanted = None if nodes is None or edges is None else expected(nodes, edges)
    try:
        found = joined(folder, suffix)
    except UserError as error:
        assert wanted is None or wanted[1] is None, (str(error), nodes, edges)
    else:
        assert wanted is not None and found == wanted


@pytest.mark.fault("generated tables (hypothesis): the join that they say, or one line; CSV in any dialect")
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
