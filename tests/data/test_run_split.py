"""The split in a run's folder: the held-out edges, the rows that the run trained on, and ``mmgraph split``."""

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import targets
from conftest import error_of, read_metrics, settings

from mmgraph.arguments import parse_config
from mmgraph.cli import main, train_main
from mmgraph.config import Config
from mmgraph.data.graph import Graph, load_graph
from mmgraph.data.run_split import RunSplit, read_split, write_split
from mmgraph.data.split import HeldOut
from mmgraph.errors import UserError

FILES = ("held_out_edges.parquet", "training_rows.npy", "split.json")
ENDS = ["src_id", "dst_id"]
Pair = frozenset[str]


def edge_frame(seed: int = 1, edges: int = 160) -> pd.DataFrame:
    """Return edges with relations, duplicates, reversed edges, self-loops, unknown ends and a column of text."""
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, 40, (edges, 2))
    rows = np.concatenate([rows, rows[:15], rows[:15, ::-1], np.repeat(rows[20:24, :1], 2, axis=1)])
    rows = rows[generator.permutation(len(rows))]
    table = pd.DataFrame([[f"{a:03d}", f"{b:03d}"] for a, b in rows.tolist()], columns=ENDS)
    table.insert(1, "note", [f'note {i}, "quoted"\nand ö' if i % 3 else "" for i in range(len(table))])
    table["rel_id"] = np.array(["likes", "NA", "007", ""])[generator.integers(0, 4, len(table))]
    table.loc[[0, 9, 50], "src_id"] = ["nobody", "7", "0"]
    table.loc[[9, len(table) - 1], "dst_id"] = "1e1"
    return table


def write_tables(folder: Path) -> Path:
    """Write edges.csv, and a relations.csv with the names of two relations."""
    folder.mkdir(parents=True, exist_ok=True)
    edge_frame().to_csv(folder / "edges.csv", index=False)
    pd.DataFrame({"rel_id": ["007", "likes"], "relation": ["is", "is fond of"]}).to_csv(
        folder / "relations.csv", index=False
    )
    return folder


def known_rows(table: pd.DataFrame) -> pd.Series:
    nodes = {f"{i:03d}" for i in range(40)}
    return table["src_id"].isin(nodes) & table["dst_id"].isin(nodes)


def pairs(table: pd.DataFrame) -> set[Pair]:
    return {frozenset(edge) for edge in table[ENDS].to_numpy().tolist()}


def read_csv(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def read_files(split: Path, rows: int) -> tuple[pd.DataFrame, np.ndarray, dict[str, Any]]:
    """Return the held-out edges, a bool for each row of the edge table, and the record."""
    bits = np.load(split / "training_rows.npy")
    assert bits.dtype == np.uint8 and len(bits) == -(-rows // 8)
    trained = np.unpackbits(bits)
    assert not trained[rows:].any()
    return (
        pd.read_parquet(split / "held_out_edges.parquet"),
        trained[:rows].astype(bool),
        json.loads((split / "split.json").read_text()),
    )


def times(split: Path) -> dict[str, int]:
    return {name: (split / name).stat().st_mtime_ns for name in FILES}


def flags_of(graph: Path, folder: Path, output: Path, *more: str) -> list[str]:
    return settings(graph, output, f"--edges={folder / 'edges.csv'}", *more)


class Written(NamedTuple):
    """A split that was written without training."""

    config: Config
    graph: Graph
    split: RunSplit


def written(graph: Path, folder: Path, output: Path, *more: str) -> Written:
    config = parse_config(flags_of(graph, folder, output, *more))
    loaded = load_graph(config)
    write_split(output, config, loaded)
    split = read_split(output)
    assert split is not None
    return Written(config, loaded, split)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with edges.csv and relations.csv."""
    return write_tables(tmp_path_factory.mktemp("split") / "tables")


@pytest.fixture(scope="module")
def trained(graph: Path, folder: Path) -> Path:
    """A run of one step that holds out a fifth of the edges."""
    flags = flags_of(graph, folder, folder / "run", "--eval_fraction=0.2", "--keep_best=z_graph/mrr", "--max_steps=1")
    assert train_main(flags) == 0
    return folder / "run"


def test_training_rows_and_held_out_edges_are_the_known_edges(trained: Path, folder: Path) -> None:
    """Each known edge is in one of the two, in the order of the table, and no pair of nodes is in both."""
    table = read_csv(folder / "edges.csv")
    known = known_rows(table)
    held_out, rows, record = read_files(trained / "split", len(table))
    assert (~known).sum() == 4 and not rows[~known].any()
    expected = table[known & ~rows]
    assert held_out.columns.tolist() == [*ENDS, "rel_id", "part"]
    assert held_out.drop(columns="part").to_numpy().tolist() == expected[[*ENDS, "rel_id"]].to_numpy().tolist()
    assert all(isinstance(value, str) for value in held_out.to_numpy().flatten())
    assert not pairs(held_out) & pairs(table[rows])
    assert 0.2 * known.sum() <= len(held_out) < 0.3 * known.sum()
    union = Counter(map(tuple, [*held_out[[*ENDS, "rel_id"]].to_numpy(), *table[rows][[*ENDS, "rel_id"]].to_numpy()]))
    assert union == Counter(map(tuple, table[known][[*ENDS, "rel_id"]].to_numpy()))
    assert {*held_out["rel_id"]} == {"likes", "NA", "007", ""}
    assert record["edge_rows"] == len(table) and record["training_edges"] == rows.sum()
    assert record["held_out_edges"] == len(held_out) and (record["eval_fraction"], record["seed"]) == (0.2, 42)


@pytest.mark.parametrize(
    ("more", "part"),
    [
        ((), "test"),
        (("--keep_best=fused/hits@10",), "validation"),
        (("--early_stopping_patience=2",), "validation"),
    ],
)
def test_edges_that_choose_a_checkpoint_are_validation(
    graph: Path, folder: Path, tmp_path: Path, more: tuple[str, ...], part: str
) -> None:
    written(graph, folder, tmp_path, "--eval_fraction=0.2", *more)
    held_out, *_, record = read_files(tmp_path / "split", 194)
    assert {*held_out["part"]} == {record["part"]} == {part}


def test_held_out_edges_of_another_table(graph: Path, folder: Path, tmp_path: Path) -> None:
    """With ``--eval_edges``, all known edges are trained on, and the parquet has the other table's known edges."""
    other = edge_frame(seed=2, edges=30)
    other.to_csv(tmp_path / "eval.csv", index=False)
    written(graph, folder, tmp_path / "run", f"--eval_edges={tmp_path / 'eval.csv'}")
    table = read_csv(folder / "edges.csv")
    held_out, rows, _ = read_files(tmp_path / "run/split", len(table))
    assert np.array_equal(rows, known_rows(table))
    expected = other[known_rows(other)][[*ENDS, "rel_id"]]
    assert held_out.drop(columns="part").to_numpy().tolist() == expected.to_numpy().tolist()
    other[ENDS].to_csv(tmp_path / "eval.csv", index=False)
    written(graph, folder, tmp_path / "plain", f"--eval_edges={tmp_path / 'eval.csv'}")
    held_out, *_ = read_files(tmp_path / "plain/split", len(table))
    assert held_out.columns.tolist() == [*ENDS, "part"] and len(held_out) == len(expected)


def test_a_run_without_held_out_edges(graph: Path, folder: Path, tmp_path: Path) -> None:
    split = written(graph, folder, tmp_path).split
    table = read_csv(folder / "edges.csv")
    held_out, rows, record = read_files(tmp_path / "split", len(table))
    assert len(held_out) == 0 and held_out.columns.tolist() == [*ENDS, "part"]
    assert np.array_equal(rows, known_rows(table)) and record["held_out_fingerprint"] == ""
    assert split.held_out(load_graph(parse_config(flags_of(graph, folder, tmp_path))).nodes) is None


def test_a_later_start_leaves_the_files(
    graph: Path, trained: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A start of the finished run, and a start that continues it."""
    run = shutil.copytree(trained, tmp_path / "run")
    before = times(run / "split")
    flags = flags_of(graph, folder, run, "--eval_fraction=0.2", "--keep_best=z_graph/mrr")
    for steps in (1, 2):
        assert train_main([*flags, f"--max_steps={steps}"]) == 0
    assert len(read_metrics(run)) == 3 and times(run / "split") == before


def test_a_resumed_run_writes_other_held_out_edges(graph: Path, folder: Path, tmp_path: Path) -> None:
    for number, edges in enumerate((30, 40), 1):
        edge_frame(number, edges).to_csv(tmp_path / f"eval{number}.csv", index=False)
        more = [f"--eval_edges={tmp_path / f'eval{number}.csv'}", f"--max_steps={number}"]
        assert train_main(flags_of(graph, folder, tmp_path / "run", *more)) == 0
        held_out, rows, record = read_files(tmp_path / "run/split", 194)
        expected = edge_frame(number, edges)
        expected = expected[known_rows(expected)]
        assert held_out[[*ENDS, "rel_id"]].to_numpy().tolist() == expected[[*ENDS, "rel_id"]].to_numpy().tolist()
        assert rows.sum() == 190 and record["held_out_edges"] == len(expected)


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_written_again(graph: Path, folder: Path, tmp_path: Path, name: str) -> None:
    config, loaded, split = written(graph, folder, tmp_path, "--eval_fraction=0.2")
    content = (tmp_path / "split" / name).read_bytes()
    (tmp_path / "split" / name).unlink()
    write_split(tmp_path, config, loaded)
    assert (tmp_path / "split" / name).read_bytes() == content and read_split(tmp_path) == split


def test_an_interrupted_write_leaves_no_record(
    graph: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The record of another split never stands beside the new files. The next start writes all of them."""
    first = written(graph, folder, tmp_path, "--eval_fraction=0.2")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    config = parse_config(flags_of(graph, folder, tmp_path))
    with monkeypatch.context() as patch:
        patch.setattr(targets.WRITE_HELD_OUT, full)
        with pytest.raises(OSError, match="No space left"):
            write_split(tmp_path, config, load_graph(config))
    assert read_split(tmp_path) is None
    write_split(tmp_path, first.config, first.graph)
    assert read_split(tmp_path) == first.split and len(pd.read_parquet(tmp_path / "split" / FILES[0])) > 0


def same_held_out(one: HeldOut, other: HeldOut) -> bool:
    assert one.relations is not None and other.relations is not None
    return (
        np.array_equal(one.rows, other.rows)
        and [one.names[number] for number in one.relations] == [other.names[number] for number in other.relations]
        and (list(one.names), list(one.relation_ids)) == (list(other.names), list(other.relation_ids))
        and one.fingerprint == other.fingerprint
    )


@pytest.mark.parametrize("small", [False, True])
def test_the_split_reads_back_as_it_was_trained(
    graph: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, small: bool
) -> None:
    """Rows, relations and names are those of the run's graph, also with bits and edges in small chunks."""
    if small:
        monkeypatch.setattr(targets.BIT_CHUNK, 16)
        monkeypatch.setattr(targets.HELD_OUT_CHUNK, 7)
    _, loaded, split = written(graph, folder, tmp_path, "--eval_fraction=0.2")
    table = read_csv(folder / "edges.csv")
    held_out, rows, _ = read_files(tmp_path / "split", len(table))
    read = split.held_out(loaded.nodes)
    assert read is not None and loaded.held_out is not None and same_held_out(read, loaded.held_out)
    assert read.rows.tolist() == held_out[ENDS].astype(int).to_numpy().tolist()
    names = {"007": "is", "likes": "is fond of", "NA": "NA", "": ""}
    assert [read.names[number] for number in read.relations] == [names[value] for value in held_out["rel_id"]]
    edges = split.training_edges_of(loaded.edge_table)
    numbers = np.arange(len(edges))
    assert np.array_equal(edges[numbers], loaded.rows[np.arange(len(loaded.rows))])
    assert edges[numbers].tolist() == table[rows][ENDS].astype(int).to_numpy().tolist()
    assert np.array_equal(np.concatenate(list(split.trained_rows())), rows)


def damage(path: Path, how: str) -> None:
    content = path.read_bytes()
    if how == "missing":
        path.unlink()
    elif how == "one bit":  # of the header or the footer
        at = 10 if path.suffix == ".npy" else content.index(b'"part"') if path.suffix == ".json" else len(content) - 1
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    else:
        path.write_bytes({"empty": b"", "truncated": content[: len(content) // 2], "text": b"\xff no file"}[how])


@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "text", "one bit"])
@pytest.mark.parametrize("name", FILES)
def test_a_damaged_file_is_one_error(graph: Path, folder: Path, tmp_path: Path, name: str, how: str) -> None:
    _, loaded, _ = written(graph, folder, tmp_path, "--eval_fraction=0.2")
    path = tmp_path / "split" / name
    damage(path, how)
    if name == "split.json" and how == "missing":
        assert read_split(tmp_path) is None
        return
    with pytest.raises(UserError) as raised:
        split = read_split(tmp_path)
        assert split is not None
        split.held_out(loaded.nodes)
        split.training_edges_of(loaded.edge_table)
    assert str(raised.value).startswith(f"{path}: ") and "\n" not in str(raised.value)


def test_files_that_do_not_belong_together_are_one_error(graph: Path, folder: Path, tmp_path: Path) -> None:
    """The parquet with other edges, relations, types or bytes; the bitmap of a longer table, or with one more row."""
    _, loaded, split = written(graph, folder, tmp_path, "--eval_fraction=0.2")
    path = tmp_path / "split/held_out_edges.parquet"
    table = pd.read_parquet(path)
    original = path.read_bytes()
    texts = {name: pa.array(table[name], pa.large_string()) for name in table}
    source = pa.array([b"\xb2", *table["src_id"][1:].str.encode("utf-8")], pa.large_binary())
    not_utf8 = pa.table({**texts, "src_id": source.view(pa.large_string())})
    for wrong in (
        table[1:],
        table[:0],
        table.assign(rel_id="hates"),
        table.drop(columns="rel_id"),
        table.drop(columns="dst_id"),
        table.assign(src_id=1),
        not_utf8,
    ):
        wrong.to_parquet(path) if isinstance(wrong, pd.DataFrame) else pq.write_table(wrong, path)
        with pytest.raises(UserError, match=r"^[^\n]*held_out_edges\.parquet: [^\n]*$"):
            split.held_out(loaded.nodes)
    path.write_bytes(original)
    assert split.held_out(loaded.nodes) is not None
    bits = np.load(tmp_path / "split/training_rows.npy")
    more = np.unpackbits(bits)
    more[np.flatnonzero(more == 0)[0]] = 1
    for wrong_bits in (np.zeros(26, np.uint8), np.packbits(more)):
        np.save(tmp_path / "split/training_rows.npy", wrong_bits)
        with pytest.raises(UserError, match=r"^[^\n]*training_rows\.npy: [^\n]*$"):
            split.training_edges_of(loaded.edge_table)
    np.save(tmp_path / "split/training_rows.npy", bits)
    split.training_edges_of(loaded.edge_table)


@pytest.mark.parametrize(
    "change", [{"format": 2}, {"more": 1}, {"seed": ...}, {"seed": "42"}, {"relation_ids": None}, {"edge_rows": 9.5}]
)
def test_a_record_of_another_version_is_refused(
    graph: Path, folder: Path, tmp_path: Path, change: dict[str, Any]
) -> None:
    written(graph, folder, tmp_path)
    path = tmp_path / "split/split.json"
    record = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({name: value for name, value in record.items() if value is not ...}))
    with pytest.raises(UserError, match=r"^[^\n]*split\.json: [^\n]*another version[^\n]*$"):
        read_split(tmp_path)


def test_held_out_edges_of_missing_nodes_are_dropped(
    graph: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """In a table of the even nodes in reverse order, the other edges keep their nodes and relations."""
    split = written(graph, folder, tmp_path / "run", "--eval_fraction=0.2").split
    nodes = read_csv(graph / "nodes.csv")
    nodes["image_path"] = ""
    nodes = nodes[nodes["node_id"].astype(int) % 2 == 0][::-1]
    nodes.to_csv(tmp_path / "nodes.csv", index=False)
    config = Config(nodes=str(tmp_path / "nodes.csv"), edges=str(folder / "edges.csv"))
    other = load_graph(config)
    capsys.readouterr()
    read = split.held_out(other.nodes)
    table, rows, _ = read_files(tmp_path / "run/split", 194)
    kept = table[table["src_id"].isin(nodes["node_id"]) & table["dst_id"].isin(nodes["node_id"])]
    assert read is not None and 0 < len(kept) < len(table)
    ids = nodes["node_id"].to_numpy()
    assert ids[read.rows].tolist() == kept[ENDS].to_numpy().tolist()
    assert [read.relation_ids[number] for number in read.relations] == kept["rel_id"].tolist()
    [line] = capsys.readouterr().out.splitlines()
    assert f"{len(table) - len(kept)} of {len(table)} edges dropped" in line and "held_out_edges.parquet" in line
    edges = split.training_edges_of(other.edge_table)
    full = read_csv(folder / "edges.csv")
    expected = full[rows & full["src_id"].isin(ids) & full["dst_id"].isin(ids)]
    assert ids[edges[np.arange(len(edges))]].tolist() == expected[ENDS].to_numpy().tolist()
    nodes.assign(node_id="other " + nodes["node_id"]).to_csv(tmp_path / "others.csv", index=False)
    renamed = table.assign(src_id="other " + table["src_id"], dst_id="other " + table["dst_id"])
    renamed.to_csv(tmp_path / "others_edges.csv", index=False)
    others = load_graph(Config(nodes=str(tmp_path / "others.csv"), edges=str(tmp_path / "others_edges.csv")))
    with pytest.raises(UserError, match=r"^[^\n]*held_out_edges\.parquet: [^\n]*$"):
        split.held_out(others.nodes)


def read_table(path: Path) -> pd.DataFrame:
    if path.suffix == ".csv":
        return read_csv(path)
    return pd.read_parquet(path) if path.suffix == ".parquet" else pd.read_feather(path)


@pytest.mark.parametrize("chunk", [7, 1 << 16])
@pytest.mark.parametrize("suffix", ["csv", "parquet", "arrow"])
def test_split_writes_the_training_rows(
    trained: Path, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, suffix: str, chunk: int
) -> None:
    """``mmgraph split`` writes the rows of the table with all columns, in order, also in small chunks."""
    monkeypatch.setattr(targets.TRAINING_ROW_CHUNK, chunk)
    monkeypatch.setattr(targets.BIT_CHUNK, 16 if chunk == 7 else 1 << 23)
    assert main(["split", str(trained), str(tmp_path / f"out.{suffix}")]) == 0
    table = read_csv(folder / "edges.csv")
    _, rows, _ = read_files(trained / "split", len(table))
    pd.testing.assert_frame_equal(
        read_table(tmp_path / f"out.{suffix}"), table[rows].reset_index(drop=True), check_dtype=False
    )
    assert {path.name for path in tmp_path.iterdir()} == {f"out.{suffix}"}


def parquet_of_parts(path: Path, parts: list[pa.Table]) -> None:
    with pq.ParquetWriter(path, parts[0].schema) as writer:
        for part in parts:
            writer.write_table(part)


def test_split_of_a_parquet_table_with_other_types(
    graph: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ids are integers, relations are categories with other values in each row group, and one column is a list.

    CSV cannot hold the list, which is one error without a file.
    """
    table = edge_frame()
    table = table[known_rows(table)]
    ids = {name: table[name].astype(int) for name in ENDS}
    frame = pd.DataFrame({**ids, "rel_id": table["rel_id"], "weight": np.arange(len(table)) / 4})
    parts = []
    for number, part in enumerate((frame[:90], frame[90:])):
        relations = pa.array(part["rel_id"] + str(number)).dictionary_encode()
        plain = pa.Table.from_pandas(part.drop(columns="rel_id"), preserve_index=False)
        parts.append(plain.append_column("rel_id", relations).append_column("tags", pa.array([["a"]] * len(part))))
    parquet_of_parts(tmp_path / "edges.parquet", parts)
    nodes = read_csv(graph / "nodes.csv").assign(image_path="")
    nodes.assign(node_id=nodes["node_id"].astype(int)).to_csv(tmp_path / "nodes.csv", index=False)
    config = Config(nodes=str(tmp_path / "nodes.csv"), edges=str(tmp_path / "edges.parquet"), eval_fraction=0.3)
    write_split(tmp_path / "run", config, load_graph(config))
    config.save(tmp_path / "run/config.yaml")
    held_out, rows, _ = read_files(tmp_path / "run/split", len(frame))
    assert {*held_out["rel_id"]} <= {f"{name}{i}" for name in ("likes", "NA", "007", "") for i in range(2)}
    expected = pd.concat([part.to_pandas() for part in parts])[rows].reset_index(drop=True)
    for suffix in ("parquet", "arrow", "feather", "pq"):
        path = tmp_path / f"out.{suffix}"
        assert main(["split", str(tmp_path / "run"), str(path)]) == 0
        found = (pd.read_parquet if suffix in ("parquet", "pq") else pd.read_feather)(path)
        assert found.columns.tolist() == expected.columns.tolist()
        assert found[ENDS].to_numpy().tolist() == expected[ENDS].astype(str).to_numpy().tolist()
        assert found["weight"].tolist() == expected["weight"].tolist()
        assert found["rel_id"].tolist() == expected["rel_id"].tolist()
        assert [list(tags) for tags in found["tags"]] == [["a"]] * len(expected)
    capsys.readouterr()
    assert main(["split", str(tmp_path / "run"), str(tmp_path / "out.csv")]) == 2
    error_of(capsys.readouterr().err, tmp_path / "out.csv", tmp_path / "edges.parquet")
    assert not list(tmp_path.glob("*.csv.*")) and not (tmp_path / "out.csv").exists()


def test_split_refuses_wrong_arguments(
    graph: Path, trained: Path, folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out.csv"

    def refused(*arguments: object) -> str:
        capsys.readouterr()
        assert main(["split", *map(str, arguments)]) == 2
        captured = capsys.readouterr()
        [line] = captured.err.splitlines()
        assert line.startswith("mmgraph: error: ") and not out.exists()
        return line

    out.write_text("mine")
    assert main(["split", str(trained), str(out)]) == 2 and out.read_text() == "mine"
    error_of(capsys.readouterr().err, out)
    out.unlink()
    assert f"{tmp_path / 'out.txt'}: " in refused(trained, tmp_path / "out.txt")
    assert f"{graph}: " in refused(graph, out) and str(tmp_path / "none") in refused(tmp_path / "none", out)
    assert str(tmp_path / "gone.csv") in refused(trained, out, "--edges", tmp_path / "gone.csv")
    shutil.copy(folder / "edges.csv", tmp_path / "copy.csv")
    assert main(["split", str(trained), str(out), "--edges", str(tmp_path / "copy.csv")]) == 0  # the same bytes
    out.unlink()
    with (tmp_path / "copy.csv").open("a") as file:
        file.write("000,,001,likes\n")
    assert str(tmp_path / "copy.csv") in refused(trained, out, "--edges", tmp_path / "copy.csv")
    damaged = shutil.copytree(trained, tmp_path / "run")
    damage(damaged / "split/training_rows.npy", "truncated")
    assert "training_rows.npy" in refused(damaged, out)
    assert main(["split", str(trained), str(tmp_path / "none/out.csv")]) != 0
    error_of(capsys.readouterr().err, tmp_path / "none/out.csv")


def test_a_conversion_without_the_known_rows_is_repeated(graph: Path, tmp_path: Path) -> None:
    """An older version converted the edge table, and kept no file with the rows that have both ends."""
    write_tables(tmp_path / "tables")
    first = written(graph, tmp_path / "tables", tmp_path / "first", "--eval_fraction=0.2")
    [known] = (tmp_path / "tables/mmgraph_cache/tables").glob("*.known.npy")
    content = known.read_bytes()
    for how in ("missing", "empty", "truncated", "one bit"):
        damage(known, how)
        again = written(graph, tmp_path / "tables", tmp_path / how, "--eval_fraction=0.2")
        assert known.read_bytes() == content, how
        assert again.split._replace(folder=first.split.folder) == first.split
        assert np.array_equal(*(np.load(tmp_path / name / "split/training_rows.npy") for name in ("first", how)))


def cache_of_split(folder: Path) -> list[Path]:
    """Return the cached split of a table: the training edges, and the numbers of the held-out edges."""
    return sorted((folder / "mmgraph_cache/tables").glob("split*"))


@pytest.mark.parametrize("number", [0, 1])
@pytest.mark.parametrize("how", ["missing", "empty", "truncated", "text", "one bit"])
def test_a_damaged_cached_split_is_made_again(graph: Path, tmp_path: Path, number: int, how: str) -> None:
    write_tables(tmp_path / "tables")
    first = written(graph, tmp_path / "tables", tmp_path / "first", "--eval_fraction=0.2")
    rows = first.graph.rows[np.arange(len(first.graph.rows))]
    files = cache_of_split(tmp_path / "tables")
    assert [path.name.count("held_out") for path in files] == [0, 1]
    before = [path.read_bytes() for path in files]
    damage(files[number], how)
    again = written(graph, tmp_path / "tables", tmp_path / "again", "--eval_fraction=0.2")
    assert np.array_equal(again.graph.rows[np.arange(len(again.graph.rows))], rows)
    assert [path.read_bytes() for path in files] == before
    assert again.graph.held_out is not None and first.graph.held_out is not None
    assert same_held_out(again.graph.held_out, first.graph.held_out)


def test_a_run_after_damage_trains_on_the_same_edges(graph: Path, trained: Path, folder: Path, tmp_path: Path) -> None:
    for path in cache_of_split(folder):
        damage(path, "truncated")
    more = ("--eval_fraction=0.2", "--keep_best=z_graph/mrr", "--max_steps=1")
    assert train_main(flags_of(graph, folder, tmp_path / "run", *more)) == 0
    for name in FILES[1:]:
        assert (tmp_path / "run/split" / name).read_bytes() == (trained / "split" / name).read_bytes()
    first, second = (pd.read_parquet(run / "split/held_out_edges.parquet") for run in (trained, tmp_path / "run"))
    pd.testing.assert_frame_equal(first, second)
    losses = [[row.get("loss") for row in read_metrics(run)] for run in (trained, tmp_path / "run")]
    assert losses[0] == losses[1]
