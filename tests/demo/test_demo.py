"""The demo graph: tables, held-out edges, summaries that do not reveal edges, images, towers, and equal rebuilds."""

import json
import re
from collections import Counter
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import tree
from launches import launch
from PIL import Image

from mmgraph.cli import main, train_main
from mmgraph.data.tables import read_edges, read_nodes
from mmgraph.demo.graph import read_nodes_of_packages
from mmgraph.towers.clip import load_tokenizer_and_processor, load_towers

RELATIONS = {
    "borders", "composed_of", "gender_variant", "mentions", "next_in_subgroup", "same_currency", "same_language",
    "same_subregion", "shares_keyword",
}  # fmt: skip


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the demo graph."""
    folder = tmp_path_factory.mktemp("demo") / "graph"
    assert main(["demo", str(folder)]) == 0
    return folder


def all_edges(demo: Path) -> pd.DataFrame:
    """Return the training edges and the held-out edges."""
    return pd.concat([read_edges(demo / name) for name in ("edges.csv", "eval_edges.csv")], ignore_index=True)


def test_tables(demo: Path) -> None:
    assert {path.name for path in demo.iterdir()} == {
        "nodes.csv", "edges.csv", "eval_edges.csv", "relations.csv", "images", "towers", "README",
    }  # fmt: skip
    nodes, edges, relations = read_nodes(demo / "nodes.csv"), all_edges(demo), pd.read_csv(demo / "relations.csv")
    assert len(nodes) == 1906 and set(relations["relation"]) == RELATIONS
    assert not edges.duplicated().any() and (edges["src_id"] != edges["dst_id"]).all()
    assert set(edges["src_id"]) | set(edges["dst_id"]) <= set(nodes["node_id"])
    counts = Counter(edges["rel_id"])
    assert 12_000 < len(edges) < 15_000 and len(counts) == 9 and min(counts.values()) > 90
    names = dict(zip(nodes["node_id"], nodes["short_name"], strict=True))
    edges_of = {row.relation: edges[edges["rel_id"] == str(row.rel_id)] for row in relations.itertuples()}
    pairs = {
        relation: {(names[a], names[b]) for a, b in zip(table["src_id"], table["dst_id"], strict=True)}
        for relation, table in edges_of.items()
    }
    assert ("flag: Austria", "flag: Switzerland") in pairs["borders"] | {(b, a) for a, b in pairs["borders"]}
    assert ("firefighter", "fire engine") in pairs["composed_of"]
    assert ("person running", "woman running") in pairs["gender_variant"]


def test_held_out_edges(demo: Path) -> None:
    """A tenth of the edges is held out. Each of their nodes has training edges, and no node pair is in both tables."""
    train, held_out = read_edges(demo / "edges.csv"), read_edges(demo / "eval_edges.csv")
    assert len(held_out) / (len(train) + len(held_out)) == pytest.approx(0.1, abs=0.001)

    def pairs(edges: pd.DataFrame) -> set[frozenset[str]]:
        return {frozenset(pair) for pair in zip(edges["src_id"], edges["dst_id"], strict=True)}

    assert not pairs(train) & pairs(held_out)
    assert set(held_out["src_id"]) | set(held_out["dst_id"]) <= set(train["src_id"]) | set(train["dst_id"])


def test_summaries_do_not_reveal_edges(demo: Path) -> None:
    """A summary has no name of a neighbor, no subregion of its country, and no keyword that 2 to 10 nodes share."""
    nodes = read_nodes(demo / "nodes.csv").set_index("node_id")
    for edge in all_edges(demo).itertuples():
        for node_id, neighbor in ((edge.src_id, edge.dst_id), (edge.dst_id, edge.src_id)):
            name = nodes.at[neighbor, "short_name"].removeprefix("flag: ")
            summary = nodes.at[node_id, "summary"]
            assert not re.search(rf"(?<!\w){re.escape(name)}(?!\w)", summary, re.IGNORECASE), (summary, name)
    sources = read_nodes_of_packages()
    counts = Counter(word.lower() for node in sources for word in set(node.keywords))
    for node in sources:
        summary = nodes.at[node.node_id, "summary"]
        assert len(summary.split()) > 3  # more text than the name
        if node.country:
            assert node.country["subregion"] not in summary or not node.country["subregion"]
        keywords = {word for word in node.keywords if 2 <= counts[word.lower()] <= 10}
        revealed = [word for word in keywords if re.search(rf"(?<!\w){re.escape(word)}(?!\w)", summary, re.IGNORECASE)]
        assert not revealed, (summary, revealed)


def test_images_and_their_license(demo: Path) -> None:
    nodes = read_nodes(demo / "nodes.csv")
    modes = Counter(Image.open(demo / path).mode for path in nodes["image_path"])
    assert sum(modes.values()) == 1906 and {"P", "RGBA"} <= set(modes)
    assert {Image.open(demo / path).size for path in nodes["image_path"][:50]} == {(72, 72)}
    assert "CC-BY 4.0" in (demo / "README").read_text()


def test_every_build_has_the_same_bytes(demo: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["demo", str(tmp_path / "again")]) == 0
    assert tree(tmp_path / "again") == tree(demo)
    before = (demo / "nodes.csv").stat().st_mtime_ns
    assert main(["demo", str(demo)]) == 0  # an existing graph is not rebuilt
    assert (demo / "nodes.csv").stat().st_mtime_ns == before


def test_towers_are_a_standard_clip_model(demo: Path) -> None:
    towers = load_towers(str(demo / "towers"))
    tokenizer, processor = load_tokenizer_and_processor(str(demo / "towers"))
    ids = tokenizer("Grinning CAT")["input_ids"]
    assert tokenizer.decode(ids[1:-1]).strip() == "grinning cat" and tokenizer.model_max_length == 77
    assert ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    config = json.loads((demo / "towers/config.json").read_text())
    assert config["text_config"]["eos_token_id"] == tokenizer.eos_token_id
    padded = tokenizer(["grinning cat"], padding="max_length", max_length=77, return_tensors="pt")
    hidden = towers.text_model(**padded)
    assert torch.equal(hidden.pooler_output[0], hidden.last_hidden_state[0, len(ids) - 1])
    assert processor.crop_size["height"] == 72 and len(ids) < 10


def test_launch_with_demo(demo: Path, tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/demo").symlink_to(demo)
    flags = ("--demo", "--max_steps=2", "--tower_cache=off", "--eval_every=0", "--no_report", "--report_to=none")
    lines = launch("cpu.yaml", *flags, cwd=tmp_path).stdout.splitlines()
    assert "data/demo" in lines[0]
    assert sum("--model_name openai/clip-vit-base-patch32" in line for line in lines) == 1  # the weights are random
    assert "runs/demo/checkpoints/multimodal_encoder_final.pt" in lines[-1]
    assert (tmp_path / "runs/demo/checkpoints/multimodal_encoder_final.pt").is_file()


@pytest.mark.slow
def test_demo_learns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A full demo run lowers the loss and ranks held-out edges higher.

    The mean loss of the last epoch is at least 20 % below that of the first. The MRR of ``z_graph`` more than doubles,
    and is more than twice that of the best baseline.
    """
    monkeypatch.chdir(tmp_path)
    assert train_main(["--demo"]) == 0
    losses: dict[int, list[float]] = {}
    rows: dict[int, dict[str, float]] = {}  # by step
    for line in (tmp_path / "runs/demo/metrics.jsonl").read_text().splitlines():
        row = json.loads(line)
        if row["step"] > 0:  # the row of step 0 has only the first evaluation
            losses.setdefault(row["epoch"], []).append(row["loss"])
        rows[row["step"]] = row
    means = [sum(values) / len(values) for _, values in sorted(losses.items())]
    print("mean losses:", [round(mean, 3) for mean in means])
    assert means[-1] < 0.8 * means[0]
    before, after = rows[0], rows[max(rows)]
    baseline = max(after[f"eval/{name}/mrr"] for name in ("text_only", "image_only", "concat", "random"))
    mrr = before["eval/z_graph/mrr"], after["eval/z_graph/mrr"]
    print(f"MRR of z_graph: {mrr[0]:.3f} before, {mrr[1]:.3f} after; the best baseline: {baseline:.3f}")
    assert mrr[1] > 2 * max(mrr[0], baseline)
