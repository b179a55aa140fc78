"""Held-out edges, drawn by seed or read from a separate table."""

import re
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from mmgraph.config import Config
from mmgraph.data.graph import Graph, load_graph
from mmgraph.data.split import split
from mmgraph.errors import UserError


def random_edges(seed: int, nodes: int = 60, edges: int = 400) -> np.ndarray:
    generator = np.random.default_rng(seed)
    rows = (nodes * generator.random((edges, 2)) ** 2).astype(np.int64)  # hubs, repeats, self-loops
    return np.concatenate([rows, rows[:30, ::-1], rows[:20]])


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("fraction", [0.05, 0.3, 0.9])
def test_split_keeps_pairs_together_and_an_edge_per_node(seed: int, fraction: float) -> None:
    rows = random_edges(seed)
    out = split(rows, 60, fraction, seed=42)
    pairs = [tuple(sorted(edge)) for edge in rows.tolist()]
    held, kept = ({pair for pair, flag in zip(pairs, out, strict=True) if flag == value} for value in (True, False))
    assert not held & kept and not any(a == b for a, b in held)
    largest_pair = max(pairs.count(pair) for pair in held)
    assert 0 < out.sum() < fraction * len(rows) + largest_pair
    if fraction < 0.5:
        assert out.sum() >= fraction * len(rows)
    nodes_with_edges = {node for a, b in pairs if a != b for node in (a, b)}
    assert nodes_with_edges == {node for a, b in kept if a != b for node in (a, b)}  # no node loses all edges
    assert np.array_equal(split(rows, 60, fraction, seed=42), out)
    assert not np.array_equal(split(rows, 60, fraction, seed=43), out)
    order = np.random.default_rng(0).permutation(len(rows))
    assert np.array_equal(split(rows[order], 60, fraction, seed=42), out[order])  # for any order of the table


def test_split_is_uniform() -> None:
    """Over many seeds, all pairs are held out about equally often."""
    rows = np.array([(a, b) for a in range(12) for b in range(a)])
    counts = sum(split(rows, 12, 0.25, seed).astype(int) for seed in range(300))
    assert counts.min() > 0.6 * 75 and counts.max() < 1.4 * 75


def graph_with(folder: Path, tmp_path: Path, **flags: object) -> Graph:
    return load_graph(Config(nodes=str(folder / "nodes.csv"), edges=str(tmp_path / "edges.csv"), **flags))  # type: ignore[arg-type]


def write_edges(tmp_path: Path, nodes: int = 40) -> pd.DataFrame:
    rows = random_edges(1, nodes)
    relations = np.array(["likes", "NA", "007", ""])[np.random.default_rng(2).integers(0, 4, len(rows))]
    table = pd.DataFrame(
        {"src_id": [f"{a:03d}" for a in rows[:, 0]], "dst_id": [f"{b:03d}" for b in rows[:, 1]], "rel_id": relations}
    )
    table.loc[5, "dst_id"] = "nobody"
    table.to_csv(tmp_path / "edges.csv", index=False)
    return table


def test_edges_not_held_out_are_trained_on(graph: Path, tmp_path: Path) -> None:
    """Each edge is in the training set or in the held-out set, in order; the held-out ones keep their relations."""
    table = write_edges(tmp_path).drop(index=5)
    full = graph_with(graph, tmp_path)
    data = graph_with(graph, tmp_path, eval_fraction=0.2, seed=3)
    assert full.held_out is None and data.held_out is not None
    rows = table[["src_id", "dst_id"]].astype(int).to_numpy()
    out = split(rows, 40, 0.2, seed=3)
    assert np.array_equal(data.rows[np.arange(len(data.rows))], rows[~out])
    assert np.array_equal(data.held_out.rows, rows[out])
    names = [data.held_out.names[number] for number in data.held_out.relations]
    assert names == table["rel_id"][out].tolist()
    reopened = graph_with(graph, tmp_path, eval_fraction=0.2, seed=3)  # from the stored split
    assert (
        np.array_equal(reopened.held_out.rows, rows[out]) and reopened.held_out.fingerprint == data.held_out.fingerprint
    )
    other_seed = graph_with(graph, tmp_path, eval_fraction=0.2, seed=4)
    assert not np.array_equal(other_seed.held_out.rows, rows[out])


def test_separate_table_of_held_out_edges(graph: Path, tmp_path: Path) -> None:
    """Relation names come from relations.csv, and edges to unknown nodes are dropped."""
    table = write_edges(tmp_path)
    table.iloc[:20].to_csv(tmp_path / "eval.csv", index=False)
    names = {"007": "is", "likes": "is fond of"}
    pd.DataFrame(names.items(), columns=["rel_id", "relation"]).to_csv(tmp_path / "relations.csv", index=False)
    data = graph_with(graph, tmp_path, eval_edges=str(tmp_path / "eval.csv"))
    expected = table.iloc[:20].drop(index=5)
    assert np.array_equal(data.held_out.rows, expected[["src_id", "dst_id"]].astype(int).to_numpy())
    assert [data.held_out.names[n] for n in data.held_out.relations] == [names.get(r, r) for r in expected["rel_id"]]
    assert len(data.rows) == len(table) - 1  # no training edge is removed
    table[["src_id", "dst_id"]].iloc[:20].to_csv(tmp_path / "eval.csv", index=False)
    assert graph_with(graph, tmp_path, eval_edges=str(tmp_path / "eval.csv")).held_out.relations is None


def test_relations_of_different_types(graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Duplicate names get their ids appended.

    If the column cannot be converted to text, this is logged and the edges have no relations.
    """
    table = write_edges(tmp_path).drop(index=5)[:20]
    table.to_csv(tmp_path / "eval.csv", index=False)
    pd.DataFrame({"rel_id": ["likes", "007"], "relation": ["is", "is"]}).to_csv(tmp_path / "relations.csv", index=False)
    data = graph_with(graph, tmp_path, eval_edges=str(tmp_path / "eval.csv"))
    assert sorted(data.held_out.names) == sorted({"is (likes)", "is (007)", "NA", ""} & {*data.held_out.names})
    assert len({*data.held_out.names}) == table["rel_id"].nunique()
    for values in ([1.5, None] * 10, pd.Categorical(["a", "b"] * 10), [True, False] * 10):
        table.assign(rel_id=values).to_parquet(tmp_path / "eval.parquet")
        data = graph_with(graph, tmp_path, eval_edges=str(tmp_path / "eval.parquet"))
        assert len(data.held_out.names) == 2 and (np.bincount(data.held_out.relations) == 10).all()
    table.assign(rel_id=[["a"]] * 20).to_parquet(tmp_path / "eval.parquet")
    capsys.readouterr()
    assert graph_with(graph, tmp_path, eval_edges=str(tmp_path / "eval.parquet")).held_out.relations is None
    [message] = [line for line in capsys.readouterr().out.splitlines() if "'rel_id'" in line]
    assert str(tmp_path / "eval.parquet") in message and "list" in message  # the column's type


def test_nothing_to_hold_out(graph: Path, tmp_path: Path) -> None:
    pd.DataFrame({"src_id": ["000", "002"], "dst_id": ["001", "003"]}).to_csv(tmp_path / "edges.csv", index=False)
    path = re.escape(str(tmp_path / "edges.csv"))
    with pytest.raises(UserError, match=rf"^--eval_fraction 0\.5: [^\n]*{path}\b[^\n]*--eval_edges[^\n]*$"):
        graph_with(graph, tmp_path, eval_fraction=0.5)
    with pytest.raises(UserError, match=r"^--eval_fraction\b[^\n]*--eval_edges\b[^\n]*$"):
        Config(eval_fraction=0.1, eval_edges="x.csv")
    with pytest.raises(UserError, match=r"^--eval_fraction 1\.0: [^\n]*\b0\b[^\n]*\b1$"):  # both bounds are named
        Config(eval_fraction=1.0)
    with pytest.raises(UserError, match=r"^--keep_best loss: [^\n]*\bz_graph/mrr\b[^\n]*$"):
        Config(keep_best="loss", eval_fraction=0.1)
    needed = r"^--early_stopping_patience\b[^\n]*--eval_fraction\b[^\n]*--eval_edges\b[^\n]*$"
    with pytest.raises(UserError, match=needed):
        Config(early_stopping_patience=3)
