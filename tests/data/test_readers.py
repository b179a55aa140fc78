"""Line numbers in errors about CSV tables: they count the lines that pandas skips."""

from pathlib import Path

import pandas as pd
import pytest

from mmgraph.data.readers import location, read_chunks
from mmgraph.data.tables import NODE_COLUMNS, read_nodes
from mmgraph.errors import UserError

HEADER = "node_id,short_name,summary,image_path\n"
BLANK = "\n   \n\t \t\n"  # 3 lines
SPANNING = 'a,x,"two\n\n  \nlines",\n'  # 4 lines, two of them blank lines inside quotes


def nodes(folder: Path, text: str, line_end: str = "\n") -> Path:
    path = folder / "nodes.csv"
    path.write_bytes(text.replace("\n", line_end).encode())
    return path


@pytest.mark.parametrize("line_end", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("text", "message"),
    [
        (HEADER + BLANK + SPANNING + BLANK + "b,x,,\n" + BLANK + ",x,,\n", "line 16: node_id is empty"),
        (BLANK + HEADER + SPANNING + BLANK + '"",x,,\n', "line 12: node_id is empty"),
        (HEADER + BLANK + SPANNING + BLANK + "a,x,,\n", "line 12: node_id 'a' is already used in line 5;"),
        (HEADER + BLANK + SPANNING + BLANK + "b,x\n", "line 12: 2 fields where the header has 4"),
        # pandas reads the last line of these two as a node
        (HEADER + BLANK + '"  "\n', "line 5: 1 fields where the header has 4"),
        (HEADER + BLANK + "\u00a0\n", "line 5: 1 fields where the header has 4"),
    ],
)
def test_line_number(tmp_path: Path, text: str, message: str, line_end: str) -> None:
    path = nodes(tmp_path, text, line_end)
    with pytest.raises(UserError) as caught:
        read_nodes(path)
    assert f"{path}, {message}" in str(caught.value)


@pytest.mark.parametrize("rows", [1, 2, None])
def test_line_number_in_chunks(tmp_path: Path, rows: int | None) -> None:
    path = nodes(tmp_path, HEADER + SPANNING + BLANK + "b,x,,\n" + BLANK + "c,x,,\n  \n,x,,\n")
    with pytest.raises(UserError, match="line 15: node_id is empty"):
        list(read_chunks(path, NODE_COLUMNS, NODE_COLUMNS[:1], rows))


def test_location_of_every_row(tmp_path: Path) -> None:
    text = BLANK + HEADER + BLANK + SPANNING + " \n" + "b,x,,\n" + BLANK + SPANNING.replace("a", "c", 1) + "d,x,,\n"
    path = nodes(tmp_path, text)
    ids = pd.read_csv(path)["node_id"].tolist()
    assert ids == ["a", "b", "c", "d"] and read_nodes(path)["node_id"].tolist() == ids
    lines = text.split("\n")
    for row, node_id in enumerate(ids):
        number = int(location(path, row, short=True).removeprefix("line "))
        assert lines[number - 1].startswith(f"{node_id},")
