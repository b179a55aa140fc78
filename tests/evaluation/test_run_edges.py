"""The edges that ``mmgraph evaluate`` ranks and ``mmgraph neighbors`` marks, after a table of the run has changed."""

import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from conftest import error_of, line_with, lines_with, settings

from mmgraph.cli import main, train_main

ENDS = ["src_id", "dst_id"]
Pairs = list[tuple[str, str]]
FIXED = ("z_graph", "fused", "text_only", "image_only", "concat")  # random vectors depend on the order of the nodes


def read_csv(path: Path) -> pd.DataFrame:
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def pairs_of(table: pd.DataFrame) -> Pairs:
    return [(a, b) for a, b in table[ENDS].to_numpy().tolist()]


@pytest.fixture(scope="module")
def folder(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with copies of the graph's tables, and a run of two steps that holds out a fifth of the edges."""
    folder = tmp_path_factory.mktemp("run_edges")
    nodes = read_csv(graph / "nodes.csv")
    nodes["image_path"] = [str(graph / path.replace("\\", "/")) for path in nodes["image_path"]]
    nodes.to_csv(folder / "nodes.csv", index=False)
    shutil.copy(graph / "edges.csv", folder)
    flags = settings(graph, folder / "run", f"--nodes={folder / 'nodes.csv'}", f"--edges={folder / 'edges.csv'}")
    assert train_main([*flags, "--eval_fraction=0.2", "--max_steps=2"]) == 0
    features = ["--format=parquet", "--features", "z_graph", f"--output_dir={folder / 'features'}"]
    assert main(["encode", str(folder / "run"), *features]) == 0
    return folder


@pytest.fixture
def run(folder: Path) -> Iterator[Path]:
    """The run's folder. The tables and the run's files are restored after the test."""
    before = {name: (folder / name).read_bytes() for name in ("nodes.csv", "edges.csv")}
    shutil.copytree(folder / "run", folder / "backup")
    yield folder / "run"
    for name, content in before.items():
        (folder / name).write_bytes(content)
    shutil.rmtree(folder / "run")
    (folder / "backup").rename(folder / "run")


@pytest.fixture(scope="module")
def trained(folder: Path) -> Pairs:
    """The edges that the run was trained on, from its bitmap."""
    table = read_csv(folder / "edges.csv")
    bits = np.unpackbits(np.load(folder / "run/split/training_rows.npy"))[: len(table)]
    return pairs_of(table[bits.astype(bool)])


@pytest.fixture(scope="module")
def held_out(folder: Path) -> Pairs:
    return pairs_of(pd.read_parquet(folder / "run/split/held_out_edges.parquet"))


def last_table(run: Path) -> dict[str, Any]:
    table = json.loads((run / "evaluation.json").read_text())
    del table["step"]
    return table


def evaluate(folder: Path, *arguments: object) -> dict[str, Any]:
    assert main(["evaluate", *map(str, arguments), f"--json={folder / 'table.json'}"]) == 0
    return json.loads((folder / "table.json").read_text())


def warnings(text: str) -> list[str]:
    return [line for line in text.splitlines() if line.startswith("warning: ")]


def append_edge(folder: Path, source: str, destination: str) -> None:
    with (folder / "edges.csv").open("a") as file:
        file.write(f"{source},{destination}\n")


def exact_vectors(folder: Path) -> dict[str, np.ndarray]:
    """Return z_graph of each node, of unit length and rounded to multiples of 2^-24, so that scores are exact."""
    table = pd.read_parquet(folder / "features/features_z_graph.parquet")
    vectors = np.stack(table["vector"].to_numpy()).astype(np.float64)
    vectors = np.round(vectors / np.linalg.norm(vectors, axis=1, keepdims=True) * 2**24) / 2**24
    return dict(zip(table["node_id"], vectors, strict=True))


def brute_force_mrr(vectors: dict[str, np.ndarray], ranked: Pairs, known: Pairs) -> float:
    """Return the filtered MRR of the unique edges of ``ranked``, from its definition."""
    neighbors: dict[str, set[str]] = {node: set() for node in vectors}
    for a, b in [*known, *ranked]:
        neighbors[a].add(b)
        neighbors[b].add(a)
    reciprocal = []
    for a, b in {edge for edge in ranked if edge[0] != edge[1]}:
        for query, target in ((a, b), (b, a)):
            candidates = [node for node in vectors if node not in neighbors[query] | {query}]
            scores = np.array([vectors[query] @ vectors[node] for node in candidates])
            score = vectors[query] @ vectors[target]
            reciprocal.append(1 / (1 + (scores > score).sum() + (scores == score).sum() / 2))
    return float(np.mean(reciprocal))


def test_unchanged_tables_give_the_last_evaluation(run: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Also with the tables under other paths, and with the run's own split named by flags."""
    assert evaluate(folder, run) == last_table(run)
    copy = shutil.copy(folder / "edges.csv", folder / "copy.csv")
    assert evaluate(folder, run, f"--edges={copy}", "--eval_fraction=0.2", "--seed=42") == last_table(run)
    assert not warnings(capsys.readouterr().out)


def test_an_appended_edge_leaves_the_edges_to_rank(
    run: Path, folder: Path, held_out: Pairs, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's held-out edges are ranked, and the new edge is no candidate any more. One warning says so."""
    vectors, known = exact_vectors(folder), pairs_of(read_csv(folder / "edges.csv"))
    before = brute_force_mrr(vectors, held_out, known)
    assert last_table(run)["embeddings"]["z_graph"]["mrr"] == pytest.approx(before, abs=1e-3)
    linked = {frozenset(edge) for edge in known}
    new = [(a, b) for a in vectors for b in vectors if a < b and frozenset((a, b)) not in linked]
    chosen = max(new, key=lambda edge: brute_force_mrr(vectors, held_out, [*known, edge]))
    append_edge(folder, *chosen)
    expected = brute_force_mrr(vectors, held_out, [*known, chosen])
    assert expected > before + 4e-3  # the test can see the effect of the edge
    table = evaluate(folder, run)
    assert table["embeddings"]["z_graph"]["mrr"] == pytest.approx(expected, abs=1e-3)
    assert table["edges"] == last_table(run)["edges"] and table["held_out"] == last_table(run)["held_out"]
    [warning] = warnings(capsys.readouterr().out)
    assert lines_with(warning, folder / "edges.csv", run / "split")


def test_nodes_in_another_order_have_the_same_ranks(
    run: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also for feature files that have ids."""
    nodes = read_csv(folder / "nodes.csv").sample(frac=1, random_state=0)
    nodes.to_csv(folder / "nodes.csv", index=False)
    expected = last_table(run)
    table = evaluate(folder, run)
    assert table["edges"] == expected["edges"]
    for name in FIXED:
        assert table["embeddings"][name] == pytest.approx(expected["embeddings"][name], abs=1e-3), name
    shutil.copytree(folder / "features", run / "features")
    table = evaluate(folder, run / "features/features_z_graph.parquet")
    assert table["embeddings"]["z_graph"] == pytest.approx(expected["embeddings"]["z_graph"], abs=1e-9)
    assert not warnings(capsys.readouterr().out)


@pytest.mark.parametrize("changed", [False, True])
@pytest.mark.parametrize("flags", [["--seed=7"], ["--eval_fraction=0.3"], ["--eval_fraction=0.1", "--seed=7"]])
def test_another_split_of_the_runs_table_is_refused(
    run: Path, folder: Path, capsys: pytest.CaptureFixture[str], flags: list[str], changed: bool
) -> None:
    """The run was trained on edges of the other split, also if the table has changed since."""
    if changed:
        append_edge(folder, "003", "005")
    assert main(["evaluate", str(run), *flags]) == 2
    error = error_of(capsys.readouterr().err, "--eval_fraction", "--seed", "--eval_fraction 0.2", "--seed 42")
    assert "--eval_edges" in error


def test_another_split_of_a_copy(run: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A copy with the same bytes is the run's table. With other bytes, it is another table: one warning."""
    copy = Path(shutil.copy(folder / "edges.csv", folder / "copy.csv"))
    assert main(["evaluate", str(run), f"--edges={copy}", "--seed=7"]) == 2
    error_of(capsys.readouterr().err, "--seed 7")
    with copy.open("a") as file:
        file.write("003,005\n")
    table = evaluate(folder, run, f"--edges={copy}", "--seed=7")
    [warning] = warnings(capsys.readouterr().out)
    assert str(copy) in warning and table["edges"] > 0


def test_other_edges_are_ranked_and_leaks_counted(
    run: Path, folder: Path, trained: Pairs, held_out: Pairs, capsys: pytest.CaptureFixture[str]
) -> None:
    """A warning counts the edges whose nodes a training edge links, but not the run's own held-out edges."""
    known = pairs_of(read_csv(folder / "edges.csv"))
    linked = {frozenset(edge) for edge in known}
    ids = [f"{i:03d}" for i in range(40)]
    new = [(a, b) for a in ids for b in ids if a < b and frozenset((a, b)) not in linked][:20]
    seen = [(b, a) for a, b in trained if a != b][:9]  # reversed
    mine = held_out[:10]
    for rows, leaks in (([*seen, *mine, *new], len(set(seen))), ([*mine, *new], 0)):
        pd.DataFrame(rows, columns=ENDS).to_csv(folder / "other.csv", index=False)
        capsys.readouterr()
        table = evaluate(folder, run, f"--eval_edges={folder / 'other.csv'}")
        assert table["edges"] == len(set(rows))
        found = [re.findall(r"\d+", line) for line in warnings(capsys.readouterr().out)]
        assert found == ([[str(leaks), str(len(set(rows)))]] if leaks else [])
        expected = brute_force_mrr(exact_vectors(folder), rows, known)
        assert table["embeddings"]["z_graph"]["mrr"] == pytest.approx(expected, abs=1e-3)


@pytest.fixture(scope="module")
def other_run(graph: Path, folder: Path, held_out: Pairs) -> Path:
    """A run of one step that ranks the edges of a separate table, with z_graph as a feature file."""
    pd.DataFrame(held_out[:6], columns=ENDS).to_csv(folder / "eval.csv", index=False)
    tables = [f"--nodes={folder / 'nodes.csv'}", f"--edges={folder / 'edges.csv'}"]
    more = [f"--eval_edges={folder / 'eval.csv'}", "--max_steps=1"]
    assert train_main(settings(graph, folder / "other", *tables, *more)) == 0
    assert main(["encode", str(folder / "other"), "--features=z_graph"]) == 0
    return folder / "other"


def test_features_of_runs_with_different_held_out_edges(
    run: Path, folder: Path, other_run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(folder / "features", run / "features")
    files = [run / "features/features_z_graph.parquet", other_run / "features/features_z_graph.pt"]
    assert main(["evaluate", *map(str, files)]) == 2
    error_of(capsys.readouterr().err, run, other_run)
    same = Path(shutil.copytree(run, folder / "same"))
    table = evaluate(folder, files[0], same / "features/features_z_graph.parquet")
    assert len(table["embeddings"]) == 3 and table["edges"] == last_table(run)["edges"]
    shutil.rmtree(same)


def test_a_changed_table_of_edges_to_rank(
    run: Path, folder: Path, other_run: Path, held_out: Pairs, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run's edges are ranked, with one warning. A flag with the same path ranks the edges that are there now."""

    def remarks() -> list[str]:
        return [line for line in warnings(capsys.readouterr().out) if "held-out edges link nodes" not in line]

    features = other_run / "features/features_z_graph.pt"
    table = evaluate(folder, features)
    assert table["embeddings"]["z_graph"] == last_table(other_run)["embeddings"]["z_graph"]
    assert not remarks()
    pd.DataFrame(held_out[:3], columns=ENDS).to_csv(folder / "eval.csv", index=False)
    assert evaluate(folder, features) == table
    assert lines_with(*remarks(), folder / "eval.csv", other_run / "split")
    append_edge(folder, "003", "005")
    assert evaluate(folder, features)["edges"] == table["edges"]
    assert lines_with(*remarks(), folder / "edges.csv", folder / "eval.csv")
    assert evaluate(folder, features, f"--eval_edges={folder / 'eval.csv'}")["edges"] == len(set(held_out[:3]))
    (folder / "eval.csv").unlink()
    assert evaluate(folder, features)["edges"] == table["edges"]


def test_other_edges_after_the_table_has_changed(run: Path, folder: Path, held_out: Pairs) -> None:
    append_edge(folder, "003", "005")
    pd.DataFrame(held_out[:5], columns=ENDS).to_csv(folder / "other.csv", index=False)
    table = evaluate(folder, run, f"--eval_edges={folder / 'other.csv'}")
    known = pairs_of(read_csv(folder / "edges.csv"))
    expected = brute_force_mrr(exact_vectors(folder), held_out[:5], known)
    assert table["embeddings"]["z_graph"]["mrr"] == pytest.approx(expected, abs=1e-2)


def test_a_run_without_held_out_edges_ranks_no_training_edges(
    run: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run without ``--eval_fraction`` has no edges to rank, and a new split would rank training edges."""
    record = json.loads((run / "split/split.json").read_text())
    record |= {"eval_fraction": 0.0, "held_out_edges": 0, "held_out_fingerprint": ""}
    (run / "split/split.json").write_text(json.dumps(record))
    text = (run / "config.yaml").read_text()
    assert main(["evaluate", str(run)]) == 2
    error_of(capsys.readouterr().err, "--eval_fraction 0.2", "--eval_fraction 0")
    (run / "config.yaml").write_text(text.replace("eval_fraction: 0.2", "eval_fraction: 0.0"))
    assert main(["evaluate", str(run)]) == 2
    error_of(capsys.readouterr().err, "--eval_edges")


class TestOlderRun:
    """A run of an older version, which wrote no split."""

    @pytest.fixture
    def older(self, run: Path) -> Path:
        shutil.rmtree(run / "split")
        return run

    def test_unchanged_tables(self, older: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        assert evaluate(folder, older) == last_table(older)
        assert not warnings(capsys.readouterr().out)

    @pytest.mark.parametrize("name", ["nodes.csv", "edges.csv"])
    def test_a_changed_table_is_refused(
        self, older: Path, folder: Path, held_out: Pairs, capsys: pytest.CaptureFixture[str], name: str
    ) -> None:
        """Other edges can still be ranked."""
        if name == "edges.csv":
            append_edge(folder, "003", "005")
        else:
            read_csv(folder / name)[::-1].to_csv(folder / name, index=False)
        assert main(["evaluate", str(older)]) == 2
        error = error_of(capsys.readouterr().err, str(folder / name))
        assert "split/" in error and "--eval_edges" in error
        pd.DataFrame(held_out, columns=ENDS).to_csv(folder / "other.csv", index=False)
        table = evaluate(folder, older, f"--eval_edges={folder / 'other.csv'}")
        assert table["edges"] == last_table(older)["edges"]

    def test_without_a_resume_state_there_is_a_warning(
        self, older: Path, folder: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        shutil.rmtree(older / "state")
        assert evaluate(folder, older) == last_table(older)
        lines = warnings(capsys.readouterr().out)
        assert len(lines) == 2
        assert str(folder / "nodes.csv") in lines[0] and str(folder / "edges.csv") in lines[1]

    def test_neighbors_after_a_change(self, older: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        append_edge(folder, "003", "005")
        assert main(["neighbors", str(older), "--node=003"]) == 0
        text = capsys.readouterr().out
        assert str(folder / "edges.csv") in line_with(text, "edges are not shown")
        assert edge_labels(text) is None


def edge_labels(text: str) -> dict[str, str] | None:
    """Return the label of each node in the table of ``mmgraph neighbors``; None if the table has no such column."""
    lines = text.splitlines()
    start = next(i for i, line in enumerate(lines) if re.match(r"\s*#  similarity", line))
    header = lines[start].split()
    cells = [re.split(r"\s{2,}", line.strip()) for line in lines[start + 1 :]]
    if "edge" not in header:
        return None
    return {row[header.index("node_id")]: row[header.index("edge")] for row in cells}


@pytest.mark.parametrize("sort", [False, True])
def test_neighbors_are_marked_as_trained_or_held_out(
    run: Path, folder: Path, trained: Pairs, held_out: Pairs, capsys: pytest.CaptureFixture[str], sort: bool
) -> None:
    """Also after the nodes were put in another order."""
    if sort:
        read_csv(folder / "nodes.csv")[::-1].to_csv(folder / "nodes.csv", index=False)
    node = next(a for a, b in held_out if a != b)
    assert main(["neighbors", str(run), f"--node={node}", "--top_k=99"]) == 0
    labels = edge_labels(capsys.readouterr().out)

    def others(pairs: Pairs) -> set[str]:
        return {b for a, b in pairs if a == node} | {a for a, b in pairs if b == node} - {node}

    expected = {f"{i:03d}": "-" for i in range(40)}
    expected |= dict.fromkeys(others(trained), "trained") | dict.fromkeys(others(held_out), "held out")
    del expected[node]
    assert labels == expected and {*expected.values()} == {"-", "trained", "held out"}


def test_neighbors_after_the_edges_have_changed(run: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    append_edge(folder, "003", "005")
    assert main(["neighbors", str(run), "--node=003", "--top_k=5"]) == 0
    text = capsys.readouterr().out
    assert line_with(text, "edges are not shown") and edge_labels(text) is None


@pytest.mark.parametrize("name", ["split.json", "training_rows.npy", "held_out_edges.parquet"])
def test_a_damaged_split_is_one_error(run: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    """``neighbors`` shows the nodes without their edges."""
    content = (run / "split" / name).read_bytes()
    (run / "split" / name).write_bytes(content[: len(content) // 2])
    assert main(["evaluate", str(run)]) == 2
    error_of(capsys.readouterr().err, run / "split" / name)
    assert main(["neighbors", str(run), "--node=003"]) == 0
    text = capsys.readouterr().out
    assert str(run / "split" / name) in line_with(text, "edges are not shown") and edge_labels(text) is None
