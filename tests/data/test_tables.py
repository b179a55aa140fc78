"""Node and edge tables: ids, errors with file and line, image paths."""

import re
from pathlib import Path

import pandas as pd
import pytest

from mmgraph.data.image_paths import ImagePaths
from mmgraph.data.tables import known_edges, read_edges, read_nodes
from mmgraph.errors import UserError
from mmgraph.loader.graph_edge_dataset import GraphEdgeDataset

HEADER = "node_id,short_name,summary,image_path\n"


def assert_one_line(error: BaseException, path: Path, *facts: str) -> None:
    """Check that an error is one line that contains the path and each fact as a separate word.

    The error may only name a line or row of the file ("line 3") that is one of the facts.
    """
    text = str(error)
    assert str(path) in text and "\n" not in text, text
    rest = text.replace(str(path), "")
    for fact in facts:
        assert re.search(rf"(?<!\w){re.escape(fact)}(?!\w)", rest), (fact, rest)
    locations = {fact for fact in facts if re.fullmatch(r"(line|row) \d+", fact)}
    assert locations == set(re.findall(r"\b(?:line|row) \d+\b", rest)), rest


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_ids_and_names_are_text(tmp_path: Path) -> None:
    nodes = read_nodes(write(tmp_path / "n.csv", HEADER + "007,NA,null,\n7,1.50,,x.png\n1e3,None,nan,\n"))
    assert nodes["node_id"].tolist() == ["007", "7", "1e3"]
    assert nodes["short_name"].tolist() == ["NA", "1.50", "None"]
    edges = read_edges(write(tmp_path / "e.csv", "src_id,dst_id\n007,7\n7,1e3\n1000,7\n7.0,7\n"))
    assert known_edges(nodes, edges).tolist() == [[0, 1], [1, 2]]


def test_parquet_equals_csv(tmp_path: Path) -> None:
    write(tmp_path / "n.csv", HEADER + "7,a,b c d e,x.png\n8,b,,\n")
    nodes = read_nodes(tmp_path / "n.csv")
    nodes.astype({"node_id": int}).to_parquet(tmp_path / "n.parquet")  # integer ids are read as text
    again = read_nodes(tmp_path / "n.parquet")
    assert again["node_id"].tolist() == ["7", "8"] and again["summary"].tolist() == nodes["summary"].tolist()


def test_ids_of_data_frames_keep_their_type() -> None:
    nodes = pd.DataFrame({"node_id": [7, 8], "short_name": ["a", "b"], "extra": [1.5, None]})
    edges = pd.DataFrame({"src_id": [7, 8, 9], "dst_id": [8, 7, 7]})
    dataset = GraphEdgeDataset(nodes, edges)
    assert len(dataset) == 2
    anchor, positive = dataset[0]
    assert list(anchor) == ["short_name", "extra"] and anchor == {"short_name": "a", "extra": 1.5}
    assert positive["short_name"] == "b"
    with pytest.raises(UserError, match=r"^[^\n]*'7'[^\n]*$"):  # the duplicate id
        GraphEdgeDataset(pd.concat([nodes, nodes[:1]]), edges)
    with pytest.raises(UserError, match=r"^[^\n]*'8'[^\n]*$"):  # unknown, because these ids are text
        GraphEdgeDataset(nodes, edges[1:].astype(str))


def test_edges_to_unknown_nodes_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = pd.DataFrame({"node_id": ["a", "b"]})
    edges = pd.DataFrame({"src_id": ["a", "x", "a"], "dst_id": ["b", "b", "y"]})
    assert known_edges(nodes, edges, "edges.csv").tolist() == [[0, 1]]
    [message] = capsys.readouterr().out.splitlines()
    assert message.startswith("edges.csv: ") and "'x'" in message  # the first unknown id
    assert re.findall(r"\b\d+\b", message) == ["2", "3"]  # edges dropped, edges in total


# the content of a table (None: no file), and the facts that its error must contain
BAD_TABLES: list[tuple[str | bytes | None, tuple[str, ...]]] = [
    (None, ()),
    ("", ()),
    (HEADER, ()),
    ("node_id,summary,image_path\na,b,c\n", ("'short_name'",)),
    (HEADER + 'a,x,"two\nlines",\n\nb,x,,\na,x,,\n', ("line 6", "node_id", "'a'", "line 2")),
    (HEADER + "a,x,,\n,x,,\n", ("line 3", "node_id")),
    (HEADER + "a,x,,\nb,x,,,,,\n", ("line 3", "7", "4")),
    (HEADER + "a,b,c,d,e\n", ("line 2", "5", "4")),
    (HEADER + "a,b,c,d\ne,f\n", ("line 3", "2", "4")),
    (HEADER + "a,b,c\0,d\n", ("line 2", "NUL")),
    ("node_id,node_id,short_name,summary,image_path\na,b,c,d,e\n", ("'node_id'",)),
    (b"\xff\xfe\x00broken", ("CSV", "UTF-8")),
]


def bad_table(path: Path, content: str | bytes | None) -> Path:
    path.unlink(missing_ok=True)
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


@pytest.mark.parametrize(("content", "facts"), BAD_TABLES)
def test_error_of_a_bad_table_is_one_line(tmp_path: Path, content: str | bytes | None, facts: tuple[str, ...]) -> None:
    path = bad_table(tmp_path / "nodes.csv", content)
    with pytest.raises(UserError) as caught:
        read_nodes(path)
    assert_one_line(caught.value, path, *facts)


def test_bad_tables_have_different_errors(tmp_path: Path) -> None:
    """Different mistakes have different errors; errors of the same mistake differ only in numbers."""
    facts_by_message: dict[str, list[tuple[str, ...]]] = {}
    for content, facts in BAD_TABLES:
        path = bad_table(tmp_path / "nodes.csv", content)
        with pytest.raises(UserError) as caught:
            read_nodes(path)
        facts_by_message.setdefault(re.sub(r"\d+", "", str(caught.value).replace(str(path), "")), []).append(facts)
    shared = [group for group in facts_by_message.values() if len(group) > 1]
    assert shared == [[("line 3", "7", "4"), ("line 2", "5", "4"), ("line 3", "2", "4")]]


def test_byte_order_mark_is_skipped(tmp_path: Path) -> None:
    path = tmp_path / "n.csv"
    path.write_text(HEADER + "a,b,c,d\n", encoding="utf-8-sig")
    assert read_nodes(path).columns[0] == "node_id"


def test_float_ids_are_refused(tmp_path: Path) -> None:
    pd.DataFrame({"src_id": [1.0, 2.0], "dst_id": [2.0, 1.0]}).to_parquet(tmp_path / "e.parquet")
    with pytest.raises(UserError) as caught:
        read_edges(tmp_path / "e.parquet")
    assert_one_line(caught.value, tmp_path / "e.parquet", "'src_id'", "double")  # the column and its type


def test_image_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data/images").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data/images/a.png").touch()
    (tmp_path / "here.png").touch()
    monkeypatch.chdir(tmp_path)
    paths = ImagePaths(tmp_path / "data/nodes.csv")
    assert paths.resolve("images\\a.png") == str(tmp_path / "data/images/a.png")
    assert paths.resolve("here.png") == "here.png"  # as in the original trainer: relative to the working directory
    assert paths.resolve("") is None and paths.resolve(None) is None and paths.resolve(float("nan")) is None
    assert ImagePaths(tmp_path / "data/nodes.csv", "elsewhere").resolve("a.png") == "elsewhere/a.png"
    assert paths.resolve(str(tmp_path / "here.png")) == str(tmp_path / "here.png")


def test_wrong_image_root(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(20):
        (tmp_path / f"{i}.png").touch()
    names: list[object] = [f"{i}.png" for i in range(20)]
    ImagePaths(tmp_path / "n.csv", tmp_path).check([*names, "", None], seed=0)  # rows without a path are not counted
    assert capsys.readouterr().out == ""
    ImagePaths(tmp_path / "n.csv", tmp_path).check([*names, *(f"no{i}.png" for i in range(5))], seed=0)
    [message] = capsys.readouterr().out.splitlines()
    assert re.search(r"\b20%", message) and re.search(r"\b25\b", message) and re.search(r"no\d\.png", message)
    assert str(tmp_path) in message
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"^[^\n]*\b20\b[^\n]*/empty/\d+\.png\b[^\n]*--image_root[^\n]*$"):
        ImagePaths(tmp_path / "n.csv", tmp_path / "empty").check(names, seed=0)
    with pytest.raises(UserError, match=rf"^--image_root {re.escape(str(tmp_path / 'nowhere'))}: [^\n]+$"):
        ImagePaths(tmp_path / "n.csv", tmp_path / "nowhere")


def test_parquet_categoricals_and_numbers_are_text(tmp_path: Path) -> None:
    frame = pd.DataFrame({"node_id": ["a", "b"], "short_name": [1, 2], "summary": ["x", None], "image_path": ["", ""]})
    frame.astype({"node_id": "category"}).to_parquet(tmp_path / "n.parquet")
    nodes = read_nodes(tmp_path / "n.parquet")
    assert nodes["node_id"].tolist() == ["a", "b"] and nodes["short_name"].tolist() == ["1", "2"]
