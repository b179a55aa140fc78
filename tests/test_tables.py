"""Tables: exact ids, checks that name file and line, image roots."""

from pathlib import Path

import pandas as pd
import pytest

from mmgraph.errors import UserError
from mmgraph.loader.graph_edge_dataset import GraphEdgeDataset
from mmgraph.tables import ImagePaths, known_edges, read_edges, read_nodes

HEADER = "node_id,short_name,summary,image_path\n"


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_ids_and_names_are_text(tmp_path: Path) -> None:
    nodes = read_nodes(write(tmp_path / "n.csv", HEADER + "007,NA,null,\n7,1.50,,x.png\n1e3,None,nan,\n"))
    assert nodes["node_id"].tolist() == ["007", "7", "1e3"]
    assert nodes["short_name"].tolist() == ["NA", "1.50", "None"]
    edges = read_edges(write(tmp_path / "e.csv", "src_id,dst_id\n007,7\n7,1e3\n1000,7\n7.0,7\n"))
    assert known_edges(nodes, edges).tolist() == [[0, 1], [1, 2]]


def test_parquet_and_csv_are_the_same(tmp_path: Path) -> None:
    write(tmp_path / "n.csv", HEADER + "7,a,b c d e,x.png\n8,b,,\n")
    nodes = read_nodes(tmp_path / "n.csv")
    nodes.astype({"node_id": int}).to_parquet(tmp_path / "n.parquet")  # integer ids are their digits
    again = read_nodes(tmp_path / "n.parquet")
    assert again["node_id"].tolist() == ["7", "8"] and again["summary"].tolist() == nodes["summary"].tolist()


def test_ids_of_user_frames_are_compared_as_they_are() -> None:
    nodes = pd.DataFrame({"node_id": [7, 8], "short_name": ["a", "b"], "extra": [1.5, None]})
    edges = pd.DataFrame({"src_id": [7, 8, 9], "dst_id": [8, 7, 7]})
    dataset = GraphEdgeDataset(nodes, edges)
    assert len(dataset) == 2
    anchor, positive = dataset[0]
    assert list(anchor) == ["short_name", "extra"] and anchor == {"short_name": "a", "extra": 1.5}
    assert positive["short_name"] == "b"
    with pytest.raises(UserError, match="node_id '7' is used twice"):
        GraphEdgeDataset(pd.concat([nodes, nodes[:1]]), edges)
    with pytest.raises(UserError, match="no edge has both ends"):
        GraphEdgeDataset(nodes, edges.astype(str))


def test_unknown_ends_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = pd.DataFrame({"node_id": ["a", "b"]})
    edges = pd.DataFrame({"src_id": ["a", "x", "a"], "dst_id": ["b", "b", "y"]})
    assert known_edges(nodes, edges, "edges.csv").tolist() == [[0, 1]]
    assert "edges.csv: 2 of 3 edges dropped" in capsys.readouterr().out


BAD_TABLES = [
    (None, "no such file"),
    ("", "is empty"),
    (HEADER, "no rows"),
    ("node_id,summary,image_path\na,b,c\n", "no column 'short_name'"),
    (HEADER + 'a,x,"two\nlines",\n\nb,x,,\na,x,,\n', "line 6: node_id 'a' is already used in line 2"),
    (HEADER + "a,x,,\n,x,,\n", "line 3: node_id is empty"),
    (HEADER + "a,x,,\nb,x,,,,,\n", "line 3"),
    (HEADER + "a,b,c,d,e\n", "line 2: 5 fields where the header has 4"),
    (HEADER + "a,b,c,d\ne,f\n", "line 3: 2 fields where the header has 4"),
    (HEADER + "a,b,c\0,d\n", "line 2: holds a NUL byte"),
    ("node_id,node_id,short_name,summary,image_path\na,b,c,d,e\n", "the column 'node_id' more than once"),
    (b"\xff\xfe\x00broken", "not a readable CSV"),
]


@pytest.mark.parametrize(("content", "message"), BAD_TABLES)
def test_bad_tables_are_one_clear_line(tmp_path: Path, content: str | bytes | None, message: str) -> None:
    path = tmp_path / "nodes.csv"
    if content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(UserError) as caught:
        read_nodes(path)
    assert message in str(caught.value) and str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_byte_order_mark_is_no_part_of_a_name(tmp_path: Path) -> None:
    path = tmp_path / "n.csv"
    path.write_text(HEADER + "a,b,c,d\n", encoding="utf-8-sig")
    assert read_nodes(path).columns[0] == "node_id"


def test_float_ids_are_refused(tmp_path: Path) -> None:
    pd.DataFrame({"src_id": [1.0, 2.0], "dst_id": [2.0, 1.0]}).to_parquet(tmp_path / "e.parquet")
    with pytest.raises(UserError, match="ids must be integers or text"):
        read_edges(tmp_path / "e.parquet")


def test_image_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data/images").mkdir(parents=True)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "data/images/a.png").touch()
    (tmp_path / "here.png").touch()
    monkeypatch.chdir(tmp_path)
    paths = ImagePaths(tmp_path / "data/nodes.csv")
    assert paths.resolve("images\\a.png") == str(tmp_path / "data/images/a.png")
    assert paths.resolve("here.png") == "here.png"  # the original's rule: the working directory
    assert paths.resolve("") is None and paths.resolve(None) is None and paths.resolve(float("nan")) is None
    assert ImagePaths(tmp_path / "data/nodes.csv", "elsewhere").resolve("a.png") == "elsewhere/a.png"
    assert paths.resolve(str(tmp_path / "here.png")) == str(tmp_path / "here.png")


def test_a_wrong_image_root_is_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i in range(20):
        (tmp_path / f"{i}.png").touch()
    names: list[object] = [f"{i}.png" for i in range(20)]
    ImagePaths(tmp_path / "n.csv", tmp_path).check([*names, "", None], seed=0)  # rows without a path don't count
    assert capsys.readouterr().out == ""
    ImagePaths(tmp_path / "n.csv", tmp_path).check([*names, *(f"no{i}.png" for i in range(5))], seed=0)
    assert "warning: 20% of 25 image files" in capsys.readouterr().out
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"the first tried is .*empty/\d+\.png.*--image_root"):
        ImagePaths(tmp_path / "n.csv", tmp_path / "empty").check(names, seed=0)
    with pytest.raises(UserError, match="no such folder"):
        ImagePaths(tmp_path / "n.csv", tmp_path / "nowhere")


def test_parquet_categoricals_and_numbers_are_text(tmp_path: Path) -> None:
    frame = pd.DataFrame({"node_id": ["a", "b"], "short_name": [1, 2], "summary": ["x", None], "image_path": ["", ""]})
    frame.astype({"node_id": "category"}).to_parquet(tmp_path / "n.parquet")
    nodes = read_nodes(tmp_path / "n.parquet")
    assert nodes["node_id"].tolist() == ["a", "b"] and nodes["short_name"].tolist() == ["1", "2"]
