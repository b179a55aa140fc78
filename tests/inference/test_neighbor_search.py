"""``mmgraph neighbors``: results for nodes, texts and images against brute force; cached embeddings; wrong queries."""

import re
import shutil
import time
from pathlib import Path
from pkgutil import resolve_name

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from conftest import settings
from launches import launch, run_warm
from PIL import Image
from targets import MAKE_FEATURE_SHARDS, MIN_IMAGE_AGE_NS
from transformers import AutoTokenizer, CLIPImageProcessor

from mmgraph.cli import main
from mmgraph.data.content_hashes import MIN_AGE_NS
from mmgraph.inference.neighbor_search import nearest_neighbors
from mmgraph.loader.inference_collator import InferenceCollator
from mmgraph.models.multimodal_graph_encoder import MultimodalGraphEncoder


@pytest.fixture(scope="module")
def folder(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run on a copy of the graph in which two nodes have the same name."""
    folder = tmp_path_factory.mktemp("nearest") / "graph"
    shutil.copytree(graph, folder, ignore=shutil.ignore_patterns("mmgraph_cache"))
    nodes = pd.read_csv(folder / "nodes.csv", dtype=str)
    nodes.loc[[5, 6], "short_name"] = "twins"
    nodes.loc[7, "short_name"] = "008"  # the id of another node
    nodes.to_csv(folder / "nodes.csv", index=False)
    launch("cpu.yaml", *settings(folder, folder / "run", "--max_steps=12", "--eval_fraction=0.1"))
    return folder


@pytest.fixture(scope="module")
def encoder(folder: Path) -> MultimodalGraphEncoder:
    encoder = MultimodalGraphEncoder(str(folder / "towers"), 32, 16).eval()
    encoder.load_state_dict(torch.load(folder / "run/checkpoints/multimodal_encoder_final.pt"))
    return encoder


def embed(folder: Path, encoder: MultimodalGraphEncoder, nodes: list[dict[str, str]], kind: str) -> np.ndarray:
    """Embed each node alone with the public encoder and collator. Returns unit-length float64 rows."""
    towers, vectors = str(folder / "towers"), []
    collate = InferenceCollator(AutoTokenizer.from_pretrained(towers), CLIPImageProcessor.from_pretrained(towers))
    for node in nodes:
        inputs = collate([node])
        with torch.no_grad():
            vectors.append(encoder(**inputs)[0] if kind == "z_graph" else encoder.encode(**inputs)[kind])
    rows = torch.cat(vectors).double().numpy()
    return np.asarray(rows / np.linalg.norm(rows, axis=1, keepdims=True))


def all_nodes(folder: Path) -> list[dict[str, str]]:
    records = pd.read_csv(folder / "nodes.csv", dtype=str).to_dict("records")
    return [{**node, "image_path": str(folder / node["image_path"].replace("\\", "/"))} for node in records]


def table_rows(output: str) -> list[dict[str, str]]:
    """Parse the printed table. Returns its rows, by column header."""
    lines = output.splitlines()
    start = next(i for i, line in enumerate(lines) if re.match(r"\s*#  similarity", line))
    header = lines[start].split()
    rows = []
    for line in lines[start + 1 :]:
        cells = re.split(r"\s{2,}", line.strip())
        rows.append(dict(zip(header, cells, strict=True)))
    return rows


def check(output: str, similarities: np.ndarray, without: int | None, count: int) -> None:
    """Check the printed table against float64 similarities of all nodes.

    The order must be the same, except for nodes whose similarities differ by less than 1e-6.

    Args:
        without: row of the node that is excluded, if any.
    """
    rows, ids = table_rows(output), [f"{number:03d}" for number in range(len(similarities))]
    candidates = [row for row in range(len(similarities)) if row != without]
    best = sorted(candidates, key=lambda row: (-similarities[row], row))[:count]
    assert [float(row["similarity"]) for row in rows] == pytest.approx(similarities[best], abs=1e-4)
    nearest = [ids.index(row["node_id"]) for row in rows]
    assert len(set(nearest)) == count and similarities[nearest] == pytest.approx(similarities[best], abs=1e-6)


@pytest.mark.parametrize(("count", "dim", "k"), [(1000, 64, 10), (3, 8, 10), (1, 4, 5), (5000, 16, 1)])
def test_nearest_against_brute_force(count: int, dim: int, k: int) -> None:
    generator = np.random.default_rng(count)
    vectors = generator.normal(size=(count, dim)).astype(np.float32)
    vectors[count // 2 :] += 3  # half of the vectors have nearly equal similarities
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    own = generator.permutation(count)[:50].tolist()
    queries = np.concatenate([vectors[own], -vectors[:1]])
    results = nearest_neighbors(vectors, queries, k, [*own, None])
    scores = queries.astype(np.float64) @ vectors.T.astype(np.float64)
    for row, matches, score in zip([*own, None], results, scores, strict=True):
        order = [candidate for candidate in np.lexsort((np.arange(count), -score)) if candidate != row][:k]
        assert [match.row for match in matches] == order
        assert [match.similarity for match in matches] == pytest.approx(score[order].clip(-1, 1), abs=1e-12)


def test_equal_vectors() -> None:
    """Equal vectors are in table order with the same similarity, at most 1. The query node is not a result."""
    vectors = np.random.default_rng(1).normal(size=(400, 33)).astype(np.float32)
    vectors[100:] = vectors[100]
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    for own in (100, 250, 399):
        [matches] = nearest_neighbors(vectors, vectors[own : own + 1], 20, [own])
        rows = [match.row for match in matches]
        assert len(rows) == 20 and own not in rows and min(rows) >= 100 and rows == sorted(rows)
        [similarity] = {match.similarity for match in matches}
        assert 0.999999 < similarity <= 1


@pytest.mark.parametrize("kind", ["z_graph", "concat"])
def test_neighbors_of_a_node(
    folder: Path, encoder: MultimodalGraphEncoder, capsys: pytest.CaptureFixture[str], kind: str
) -> None:
    vectors = embed(folder, encoder, all_nodes(folder), kind)
    for name, row in (("012", 12), ("node 12", 12), ("008", 8)):  # 008 is an id and a name: the id wins
        assert main(["neighbors", str(folder / "run"), "--node", name, "--top_k=7", "--embedding", kind]) == 0
        output = capsys.readouterr().out
        final = str(folder / "run/checkpoints/multimodal_encoder_final.pt")
        [title] = [line for line in output.splitlines() if final in line]
        assert re.search(rf"\({row:03d}\).*\b40\b.*\b{kind}\b", title.replace(final, ""))
        check(output, vectors @ vectors[row], row, 7)


def test_edges_are_marked_in_the_table(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["neighbors", str(folder / "run"), "--node", "003", "--top_k=99"]) == 0
    rows = table_rows(capsys.readouterr().out)
    edges = pd.read_csv(folder / "edges.csv", dtype=str)
    linked = set(edges["src_id"][edges["dst_id"] == "003"]) | set(edges["dst_id"][edges["src_id"] == "003"])
    edge_of = {row["node_id"]: row["edge"] for row in rows}
    assert len(edge_of) == 39 and {node for node, edge in edge_of.items() if edge != "-"} == linked - {"003"}
    counts = dict.fromkeys(edge_of, 0)
    for node in edge_of:  # 20 of 200 edges are held out, with duplicates; each is marked in the tables of both nodes
        assert main(["neighbors", str(folder / "run"), "--node", node, "--top_k=99"]) == 0
        counts[node] = sum(row["edge"] == "held out" for row in table_rows(capsys.readouterr().out))
        if sum(counts.values()) > 3:
            break
    assert sum(counts.values()) > 3


def test_neighbors_of_a_new_text_and_image(
    folder: Path, encoder: MultimodalGraphEncoder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (50, 70, 3), np.uint8)).save(tmp_path / "new.png")
    vectors = embed(folder, encoder, all_nodes(folder), "z_graph")
    text, image = "small round green", str(tmp_path / "new.png")
    for flags, node in (
        (["--text", text], {"short_name": text}),
        (["--image", image], {"image_path": image}),
        (["--text", text, "--image", image], {"short_name": text, "image_path": image}),
    ):
        assert main(["neighbors", str(folder / "run"), *flags]) == 0
        check(capsys.readouterr().out, vectors @ embed(folder, encoder, [node], "z_graph")[0], None, 10)
    known = all_nodes(folder)[22]  # a query with the text and image of a node finds this node first
    flags = ["--text", known["summary"], "--image", known["image_path"], "--top_k=1"]
    assert main(["neighbors", str(folder / "run"), *flags]) == 0
    assert table_rows(capsys.readouterr().out) == [
        {"#": "1", "similarity": "1.0000", "node_id": "022", "name": "node 22"}
    ]


@pytest.mark.parametrize(
    ("flags", "facts"),
    [
        (["--node", "nobody"], ["--node 'nobody'", "node_id", "short_name"]),
        (["--node", "NODE 1"], ["--node 'NODE 1'", "node_id", "short_name", "'node 1' (001)"]),
        (["--node", "nod 12"], ["--node 'nod 12'", "node_id", "short_name", "'node 12' (012)"]),
        (["--node", ""], ["--node "]),
        (["--text", " "], ["--text "]),
        (["--text", "\udcff"], ["--text '\\udcff'", "UTF-8"]),
        (["--node", "twins"], ["--node 'twins'", " 2 ", "node_id", "short_name", "005, 006"]),
        ([], ["--node NAME", "--text TEXT", "--image FILE"]),
        (["--node", "001", "--text", "red"], ["--node ", "--text ", "--image "]),
        (["--image", "nowhere.png"], ["nowhere.png: file not found"]),  # the image status, as in the report
        (["--image", __file__], ["test_neighbor_search.py: unreadable"]),
        (["--node", "001", "--embedding", "z"], ["--embedding z:", "z_graph, fused, text_only, image_only, concat"]),
        (["--node", "001", "--top_k", "0"], ["--top_k/--top-k:", " 0"]),
        (["--node", "001", "--nodes", "gone.csv"], ["gone.csv"]),
    ],
)
def test_neighbors_rejects_wrong_queries(
    folder: Path,
    flags: list[str],
    facts: list[str],
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(MAKE_FEATURE_SHARDS, lambda *_: pytest.fail("all nodes were embedded first"))
    shutil.rmtree(folder / "run/embeddings", ignore_errors=True)
    assert main(["neighbors", str(folder / "run"), *flags]) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith("mmgraph: error: ") and all(fact in error for fact in facts)
    assert ("node_id" in error) == ("node_id" in facts)  # only if the node was searched for
    assert ("NAME" in error) == (not flags)  # without a query, the error lists the query flags


def test_default_run_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The default is the run in runs/ that finished last. If there is no finished run, the error names runs/."""
    monkeypatch.chdir(tmp_path)
    assert main(["neighbors", "--node", "001"]) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith("mmgraph: error: ") and " runs/ " in error
    shutil.copytree(folder / "run", tmp_path / "runs/mine")
    assert main(["neighbors", "--node", "001"]) == 0
    assert "runs/mine/checkpoints/multimodal_encoder_final.pt" in capsys.readouterr().out


def test_embeddings_are_cached(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nodes are embedded again only if an image or the weights change, or if the cache folder cannot be written."""
    copy = tmp_path / "graph"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("mmgraph_cache", "embeddings"))
    built: list[int] = []
    make = resolve_name(MAKE_FEATURE_SHARDS)
    monkeypatch.setattr(MAKE_FEATURE_SHARDS, lambda self, numbers: built.extend(numbers) or make(self, numbers))
    command = ["neighbors", str(copy / "run"), "--node", "001", "--nodes", str(copy / "nodes.csv")]

    def shards_built() -> list[int]:
        time.sleep(0.5)
        built.clear()
        assert main(command) == 0
        return list(built)

    with monkeypatch.context() as patch:
        patch.setattr(MIN_IMAGE_AGE_NS, 3600 * 10**9)  # the copied images are too new to be trusted
        assert main(command) == 0 and main(command) == 0 and built == [0, 0]
    monkeypatch.setattr(MIN_IMAGE_AGE_NS, 300_000_000)  # shards_built() waits longer
    assert shards_built() == [0] and shards_built() == []
    Image.new("RGB", (30, 30), "red").save(copy / "images/4.png")
    assert shards_built() == [0] and shards_built() == []
    weights = torch.load(copy / "run/checkpoints/multimodal_encoder_final.pt")
    weights["graph_proj.bias"] += 1
    torch.save(weights, copy / "run/checkpoints/multimodal_encoder_final.pt")
    assert shards_built() == [0] and shards_built() == []
    shutil.rmtree(copy / "run/embeddings")
    (copy / "run/embeddings").write_text("in the way")
    capsys.readouterr()
    assert shards_built() == [0] and shards_built() == [0]
    warnings = [line for line in capsys.readouterr().out.splitlines() if str(copy / "run/embeddings") in line]
    assert len(warnings) == 2 and (copy / "run/embeddings").read_text() == "in the way"


def test_two_ranks_match_one(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["neighbors", str(folder / "run"), "--node", "017"]) == 0
    expected = table_rows(capsys.readouterr().out)
    shutil.rmtree(folder / "run/embeddings")
    done = run_warm(["-m", "mmgraph", "neighbors", str(folder / "run"), "--node", "017"], "cpu_2proc.yaml")
    assert done.returncode == 0, done.stderr[-2000:]
    assert table_rows(done.stdout) == expected


@pytest.mark.parametrize("kind", [pa.int64(), pa.string(), pa.string_view()])
def test_ids_of_an_arrow_table(
    folder: Path, kind: pa.DataType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An Arrow table is read without conversion. Nodes are found by the text of their id for every id type."""
    nodes = pd.read_csv(folder / "nodes.csv", dtype=str)
    paths = [str(folder / path.replace("\\", "/")) for path in nodes["image_path"]]
    ids = pa.array(range(40)).cast(pa.string()).cast(kind)
    columns = {"node_id": ids, "short_name": [None, *nodes["short_name"][1:]], "summary": nodes["summary"]}
    table = pa.table({**columns, "image_path": paths})
    with pa.ipc.new_file(tmp_path / "nodes.arrow", table.schema) as file:
        file.write_table(table)
    command = ["neighbors", str(folder / "run"), f"--nodes={tmp_path / 'nodes.arrow'}"]
    for name in ("12", "node 12"):
        assert main([*command, "--node", name, "--top_k=39"]) == 0
        rows = table_rows(capsys.readouterr().out)
        assert {row["node_id"] for row in rows} == {str(i) for i in range(40)} - {"12"}
        assert next(row["name"] for row in rows if row["node_id"] == "0") == "0"  # node 0 has no name: its id is shown
    assert main([*command, "--node", "nod 12"]) == 2
    [error] = capsys.readouterr().err.splitlines()
    assert error.startswith("mmgraph: error: ") and "'node 12' (12)" in error


def test_names_are_printed_on_one_line(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = pd.read_csv(folder / "nodes.csv", dtype=str)
    nodes["short_name"] = "a\n\x1b[31mred\tname"
    nodes["image_path"] = [str(folder / path.replace("\\", "/")) for path in nodes["image_path"]]
    nodes.to_csv(tmp_path / "nodes.csv", index=False)
    assert main(["neighbors", str(folder / "run"), f"--nodes={tmp_path / 'nodes.csv'}", "--node", "001"]) == 0
    output = capsys.readouterr().out
    assert "\x1b" not in output and {row["name"] for row in table_rows(output)} == {"a [31mred name"}


def test_embeddings_of_two_checkpoints_are_cached(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The cached embeddings of one checkpoint stay when another checkpoint's are built."""
    copy = tmp_path / "graph"
    shutil.copytree(folder, copy, ignore=shutil.ignore_patterns("mmgraph_cache", "embeddings"))
    final = copy / "run/checkpoints/multimodal_encoder_final.pt"
    weights = torch.load(final)
    weights["graph_proj.bias"] += 1
    torch.save(weights, final.with_name("multimodal_encoder_epoch_9.pt"))
    time.sleep(MIN_AGE_NS / 1e9)
    built: list[int] = []
    make = resolve_name(MAKE_FEATURE_SHARDS)
    monkeypatch.setattr(MAKE_FEATURE_SHARDS, lambda self, numbers: built.extend(numbers) or make(self, numbers))
    for _ in range(2):
        for name in ("final", "epoch_9"):
            assert main(["neighbors", str(final.with_name(f"multimodal_encoder_{name}.pt")), "--node", "001",
                         f"--nodes={copy / 'nodes.csv'}"]) == 0  # fmt: skip
    assert built == [0, 0]
