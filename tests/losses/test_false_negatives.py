"""Masks for false negatives and missing images: against brute force on one and two ranks, and in training runs."""

import math
from itertools import product
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.nn.functional as F
from conftest import LOSSES, loss_difference, read_metrics, settings
from launches import launch, run_warm
from targets import LOGIT_CHUNK

from mmgraph.data.adjacency import Adjacency
from mmgraph.data.content_hashes import HASH, ContentHashes, image_hash
from mmgraph.data.images import IMAGE_STATUS
from mmgraph.losses.contrastive import BatchNodes, contrastive_losses
from mmgraph.losses.negative_mask import FalseNegatives, image_numbers

EDGES, NODES = 12, 14  # a global batch with repeated nodes
CASES = [(False, False, False), (True, False, False), (True, True, False), (False, False, True), (True, True, True)]


def batch() -> dict:
    """Return 12 edges between 14 nodes. Some nodes share an image, and some have no image."""
    generator = np.random.default_rng(4)
    rows = generator.integers(0, NODES, 2 * EDGES)
    rows[5] = rows[EDGES + 5]  # self-loop
    graph = generator.integers(0, NODES, (20, 2))
    keys = sorted({a * NODES + b for a, b in graph.tolist()} | {b * NODES + a for a, b in graph.tolist()})
    pictures = np.arange(NODES)
    pictures[[3, 8]] = pictures[1]
    missing = np.isin(rows, [2, 6])
    z = [F.normalize(torch.randn(2 * EDGES, 6, generator=torch.Generator().manual_seed(i)), dim=1) for i in range(3)]
    return {
        "z": z, "rows": torch.from_numpy(rows), "keys": torch.tensor(keys), "num_nodes": NODES, "cases": CASES,
        "pictures": torch.from_numpy(pictures), "missing": torch.from_numpy(missing), "graph": graph,
    }  # fmt: skip


def brute_force(inputs: dict, same: bool, linked: bool, missing: bool) -> tuple[list[float], torch.Tensor]:
    """Return the losses, the masked entries per query, and the gradients, from the definition: float64, plain loops."""
    z = [tensor.double().requires_grad_() for tensor in inputs["z"]]
    rows, pictures = inputs["rows"].tolist(), inputs["pictures"].tolist()
    anchors, positives = rows[:EDGES], rows[EDGES:]
    linked_pairs = {(a, b) for a, b in inputs["graph"].tolist()} | {(b, a) for a, b in inputs["graph"].tolist()}
    masked = {"graph": 0, "mm": 0}

    def alike(a: int, b: int) -> bool:
        return a == b or pictures[a] == pictures[b]

    def cross_entropy(
        loss: str,
        query: torch.Tensor,
        columns: torch.Tensor,
        label: int,
        false_negative: list[bool],
        absent: list[bool],
    ) -> torch.Tensor:
        masked[loss] += sum(flag for j, flag in enumerate(false_negative) if j != label)
        columns_used = [j for j in range(len(columns)) if j == label or not (false_negative[j] or absent[j])]
        scores = torch.stack([(query * columns[j]).sum() / 0.2 for j in columns_used])
        return torch.logsumexp(scores, 0) - scores[columns_used.index(label)]

    graph_terms = []
    for nodes, others, left, right in (
        (anchors, positives, z[0][:EDGES], z[0][EDGES:]), (positives, anchors, z[0][EDGES:], z[0][:EDGES]),
    ):  # fmt: skip
        for i in range(EDGES):
            false_negative = [
                (same and (alike(others[j], others[i]) or alike(others[j], nodes[i])))
                or (linked and (nodes[i], others[j]) in linked_pairs)
                for j in range(EDGES)
            ]  # fmt: skip
            graph_terms.append(cross_entropy("graph", left[i], right, i, false_negative, [False] * EDGES))
    mm_terms = []
    absent = [missing and flag for flag in inputs["missing"].tolist()]
    for left, right in ((z[1], z[2]), (z[2], z[1])):
        for i in range(2 * EDGES):
            false_negative = [same and alike(rows[j], rows[i]) for j in range(2 * EDGES)]
            term = cross_entropy("mm", left[i], right, i, false_negative, absent)
            if not absent[i]:
                mm_terms.append(term)
    graph, mm = torch.stack(graph_terms).mean(), torch.stack(mm_terms).mean()
    total = mm + 0.7 * graph
    total.backward()
    counts = [masked["mm"] / (4 * EDGES), masked["graph"] / (2 * EDGES)] if same else []
    return [total.item(), mm.item(), graph.item(), *counts], torch.stack([tensor.grad for tensor in z])


@pytest.mark.parametrize("config", ["cpu.yaml", "cpu_2proc.yaml"])
def test_losses_against_brute_force(tmp_path: Path, config: str) -> None:
    """Every case is computed with the complete logit matrix and in chunks.

    The launched script also checks that the case without masks has exactly the losses of the original trainer.
    """
    inputs = batch()
    torch.save({name: value for name, value in inputs.items() if name != "graph"}, tmp_path / "given.pt")
    script = str(Path(__file__).parent / "false_negative_shares.py")
    done = run_warm([script, str(tmp_path / "found.pt"), str(tmp_path / "given.pt")], config)
    assert done.returncode == 0, done.stderr[-3000:]
    results = torch.load(tmp_path / "found.pt")
    totals = set()
    for case, chunk in product(CASES, (1 << 24, 30)):
        expected, gradients = brute_force(inputs, *case)
        values, actual = results[(chunk, *case)]
        assert values.tolist() == pytest.approx(expected, rel=1e-5)
        assert (actual.double() - gradients).norm() < 1e-5 * gradients.norm()
        totals.add(round(expected[0], 4))
    assert len(totals) == len(CASES)  # each case has a different loss


def brute_force_chance(inputs: dict, linked: bool) -> float:
    """Return the mean of ln(candidates left) over both directions and all queries, from the definition."""
    rows, pictures, graph = inputs["rows"].tolist(), inputs["pictures"].tolist(), inputs["graph"].tolist()
    linked_pairs = {(a, b) for a, b in graph} | {(b, a) for a, b in graph} if linked else set()
    logarithms = []
    for nodes, others in ((rows[:EDGES], rows[EDGES:]), (rows[EDGES:], rows[:EDGES])):
        for i in range(EDGES):
            own = {pictures[nodes[i]], pictures[others[i]]}
            masked = [pictures[other] in own or (nodes[i], other) in linked_pairs for other in others]
            logarithms.append(math.log(sum(j == i or not masked[j] for j in range(EDGES))))
    return sum(logarithms) / len(logarithms)


@pytest.mark.parametrize("chunk", [1 << 24, 30])
def test_chance_is_the_loss_of_equal_embeddings(monkeypatch: pytest.MonkeyPatch, chunk: int) -> None:
    """The chance of a batch depends on its masks only. It is not computed if the graph loss masks nothing."""
    monkeypatch.setattr(LOGIT_CHUNK, chunk)
    inputs, chances = batch(), []
    equal = torch.full((2 * EDGES, 6), 6**-0.5)
    for same, linked, missing in CASES:
        neighbors = Adjacency(inputs["keys"], NODES) if linked else None
        masks = FalseNegatives(inputs["pictures"], same, neighbors, missing)
        nodes = BatchNodes(inputs["rows"], inputs["missing"])
        chance = contrastive_losses(*inputs["z"], 0.2, 0.7, masks, nodes).graph_chance
        found = contrastive_losses(equal, equal, equal, 0.2, 0.7, masks, nodes)
        if not same:
            assert chance is None and found.graph_chance is None
            assert found.graph.item() == pytest.approx(math.log(EDGES), rel=1e-6)
            continue
        assert chance is not None and found.graph_chance is not None and torch.equal(chance, found.graph_chance)
        assert chance.item() == pytest.approx(brute_force_chance(inputs, linked), rel=1e-6)
        assert found.graph.item() == pytest.approx(chance.item(), rel=1e-6)
        chances.append(chance.item())
    assert chances[1] == chances[2] < chances[0] < math.log(EDGES)  # missing images do not change the graph loss


def test_images_are_identified_by_their_bytes() -> None:
    """Files with the same bytes have the same image number. Each node without a file has a unique number."""
    hashes = [image_hash(b"a", 0), image_hash(b"b", 0), image_hash(b"a", 0)]
    hashes += [image_hash(None, status) for status in (1, 1, IMAGE_STATUS.index("file not found"))]
    numbers = image_numbers(ContentHashes(np.zeros(6, HASH), np.array(hashes, HASH))).tolist()
    assert numbers[0] == numbers[2] and len(set(numbers)) == 5


@pytest.fixture(scope="module")
def gaps(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a node table in which some nodes share an image and some have no image."""
    folder = tmp_path_factory.mktemp("gaps")
    nodes = pd.read_csv(graph / "nodes.csv", dtype=str)
    nodes["image_path"] = [str(graph / path.replace("\\", "/")) for path in nodes["image_path"]]
    nodes.loc[3:5, "image_path"] = nodes.loc[2, "image_path"]
    nodes.loc[6:12, "image_path"] = ""
    nodes.to_csv(folder / "nodes.csv", index=False)
    return folder


def test_a_run_counts_masked_false_negatives(graph: Path, one_process: Path, gaps: Path, tmp_path: Path) -> None:
    """The counts are the same for one and two processes, and for live towers and stored tokens.

    ``mask_neighbors`` masks more than ``mask_same``. By default, nothing is masked or counted.
    """
    assert "false_negatives_mm" not in read_metrics(one_process)[0]
    flags = ["--max_steps=6", "--missing_image=mask", f"--nodes={gaps / 'nodes.csv'}"]
    counts = {}
    for name, config, *more in (
        ("neighbors", "cpu.yaml", "--false_negatives=mask_neighbors"),
        ("two", "cpu_2proc.yaml", "--false_negatives=mask_neighbors"),
        ("live", "cpu.yaml", "--false_negatives=mask_neighbors", "--tower_cache=off"),
        ("same", "cpu.yaml", "--false_negatives=mask_same"),
        ("plain", "cpu.yaml"),
    ):
        launch(config, *settings(graph, tmp_path / name, *flags, *more))
        counts[name] = [
            tuple(row.get(f"false_negatives_{loss}") for loss in ("mm", "graph"))
            for row in read_metrics(tmp_path / name)
        ]
    for name in ("two", "live"):
        assert loss_difference(tmp_path / name, tmp_path / "neighbors", 6) < 1e-5
        assert np.allclose(counts[name], counts["neighbors"])
    assert all(a[0] == b[0] > 0 and a[1] > b[1] > 0 for a, b in zip(counts["neighbors"], counts["same"], strict=True))
    assert counts["plain"] == [(None, None)] * 6
    chance = {name: [row.get("chance_graph") for row in read_metrics(tmp_path / name)] for name in counts}
    assert np.allclose(chance["two"], chance["neighbors"]) and np.allclose(chance["live"], chance["neighbors"])
    assert all(a < b < math.log(12) for a, b in zip(chance["neighbors"], chance["same"], strict=True))
    assert chance["plain"] == [None] * 6
    first = [read_metrics(tmp_path / name)[0] for name in ("neighbors", "same", "plain")]
    assert first[0]["loss_graph"] < first[1]["loss_graph"] < first[2]["loss_graph"]  # fewer negatives, smaller loss


def test_a_batch_without_any_image(graph: Path, tmp_path: Path) -> None:
    """The text-image loss is 0, not NaN. The graph loss is computed as usual."""
    nodes = pd.read_csv(graph / "nodes.csv", dtype=str)
    nodes["image_path"] = ""
    nodes.to_csv(tmp_path / "nodes.csv", index=False)
    flags = ["--max_steps=3", "--missing_image=mask", f"--nodes={tmp_path / 'nodes.csv'}"]
    launch("cpu_2proc.yaml", *settings(graph, tmp_path / "run", *flags))
    rows = read_metrics(tmp_path / "run")
    assert [row["loss_mm"] for row in rows] == [0.0] * 3 and all(row["loss_graph"] > 0 for row in rows)
    assert all(math.isfinite(row[name]) for row in rows for name in LOSSES)
