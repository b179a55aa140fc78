"""Negatives that are left out: against brute force over two ranks, and in real runs."""

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

from mmgraph.data.content_hashes import HASH, ContentHashes, image_hash
from mmgraph.data.images import IMAGE_STATUS
from mmgraph.losses.negative_mask import image_numbers

EDGES, NODES = 12, 14  # a global batch with repeated nodes
CASES = [(False, False, False), (True, False, False), (True, True, False), (False, False, True), (True, True, True)]


def batch() -> dict:
    """12 edges between few nodes, of which some share a picture and some have none."""
    generator = np.random.default_rng(4)
    rows = generator.integers(0, NODES, 2 * EDGES)
    rows[5] = rows[EDGES + 5]  # a self-loop
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


def brute_force(given: dict, same: bool, linked: bool, missing: bool) -> tuple[list[float], torch.Tensor]:
    """Losses, counts a query and gradients in float64, one query and one entry at a time, by the definition."""
    z = [tensor.double().requires_grad_() for tensor in given["z"]]
    rows, pictures = given["rows"].tolist(), given["pictures"].tolist()
    anchors, positives = rows[:EDGES], rows[EDGES:]
    true = {(a, b) for a, b in given["graph"].tolist()} | {(b, a) for a, b in given["graph"].tolist()}
    left_out = {"graph": 0, "mm": 0}

    def alike(a: int, b: int) -> bool:
        return a == b or pictures[a] == pictures[b]

    def one(
        kind: str, query: torch.Tensor, columns: torch.Tensor, own: int, false: list[bool], gone: list[bool]
    ) -> torch.Tensor:
        left_out[kind] += sum(flag for j, flag in enumerate(false) if j != own)
        kept = [j for j in range(len(columns)) if j == own or not (false[j] or gone[j])]
        scores = torch.stack([(query * columns[j]).sum() / 0.2 for j in kept])
        return torch.logsumexp(scores, 0) - scores[kept.index(own)]

    graph_terms = []
    for nodes, others, left, right in (
        (anchors, positives, z[0][:EDGES], z[0][EDGES:]), (positives, anchors, z[0][EDGES:], z[0][:EDGES]),
    ):  # fmt: skip
        for i in range(EDGES):
            false = [
                (same and (alike(others[j], others[i]) or alike(others[j], nodes[i])))
                or (linked and (nodes[i], others[j]) in true)
                for j in range(EDGES)
            ]  # fmt: skip
            graph_terms.append(one("graph", left[i], right, i, false, [False] * EDGES))
    mm_terms = []
    gone = [missing and flag for flag in given["missing"].tolist()]
    for left, right in ((z[1], z[2]), (z[2], z[1])):
        for i in range(2 * EDGES):
            false = [same and alike(rows[j], rows[i]) for j in range(2 * EDGES)]
            term = one("mm", left[i], right, i, false, gone)
            if not gone[i]:
                mm_terms.append(term)
    graph, mm = torch.stack(graph_terms).mean(), torch.stack(mm_terms).mean()
    total = mm + 0.7 * graph
    total.backward()
    counts = [left_out["mm"] / (4 * EDGES), left_out["graph"] / (2 * EDGES)] if same else []
    return [total.item(), mm.item(), graph.item(), *counts], torch.stack([tensor.grad for tensor in z])


@pytest.mark.parametrize("config", ["cpu.yaml", "cpu_2proc.yaml"])
def test_losses_are_brute_forces(tmp_path: Path, config: str) -> None:
    """Every case whole and in parts; with nothing left out the loss is the original's, to the bit."""
    given = batch()
    torch.save({name: value for name, value in given.items() if name != "graph"}, tmp_path / "given.pt")
    script = str(Path(__file__).parent / "false_negative_shares.py")
    done = run_warm([script, str(tmp_path / "found.pt"), str(tmp_path / "given.pt")], config)
    assert done.returncode == 0, done.stderr[-3000:]
    results = torch.load(tmp_path / "found.pt")
    seen = set()
    for case, at_once in product(CASES, (1 << 24, 30)):
        expected, gradients = brute_force(given, *case)
        shares, whole = results[(at_once, *case)]
        assert shares.tolist() == pytest.approx(expected, rel=1e-5)
        assert (whole.double() - gradients).norm() < 1e-5 * gradients.norm()
        seen.add(round(expected[0], 4))
    assert len(seen) == len(CASES)  # each case is another loss


def test_pictures_are_told_by_their_bytes() -> None:
    """Files of the same bytes are one picture; nodes without a file are no two of the same."""
    hashes = [image_hash(b"a", 0), image_hash(b"b", 0), image_hash(b"a", 0)]
    hashes += [image_hash(None, cause) for cause in (1, 1, IMAGE_STATUS.index("file not found"))]
    numbers = image_numbers(ContentHashes(np.zeros(6, HASH), np.array(hashes, HASH))).tolist()
    assert numbers[0] == numbers[2] and len(set(numbers)) == 5


@pytest.fixture(scope="module")
def gaps(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The graph with pictures that are shared, and missing."""
    folder = tmp_path_factory.mktemp("gaps")
    nodes = pd.read_csv(graph / "nodes.csv", dtype=str)
    nodes["image_path"] = [str(graph / path.replace("\\", "/")) for path in nodes["image_path"]]
    nodes.loc[3:5, "image_path"] = nodes.loc[2, "image_path"]
    nodes.loc[6:12, "image_path"] = ""
    nodes.to_csv(folder / "nodes.csv", index=False)
    return folder


def test_a_run_counts_what_it_leaves_out(graph: Path, one_process: Path, gaps: Path, tmp_path: Path) -> None:
    """Two processes as one, live towers as stored ones; more with neighbours; none by default."""
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
            tuple(row.get(f"false_negatives_{kind}") for kind in ("mm", "graph"))
            for row in read_metrics(tmp_path / name)
        ]
    for name in ("two", "live"):
        assert loss_difference(tmp_path / name, tmp_path / "neighbors", 6) < 1e-5
        assert np.allclose(counts[name], counts["neighbors"])
    assert all(a[0] == b[0] > 0 and a[1] > b[1] > 0 for a, b in zip(counts["neighbors"], counts["same"], strict=True))
    assert counts["plain"] == [(None, None)] * 6
    first = [read_metrics(tmp_path / name)[0] for name in ("neighbors", "same", "plain")]
    assert first[0]["loss_graph"] < first[1]["loss_graph"] < first[2]["loss_graph"]  # fewer negatives, less to lose


def test_a_batch_without_any_image(graph: Path, tmp_path: Path) -> None:
    """The text-image loss of nothing is 0, not NaN, and the graph loss goes on."""
    nodes = pd.read_csv(graph / "nodes.csv", dtype=str)
    nodes["image_path"] = ""
    nodes.to_csv(tmp_path / "nodes.csv", index=False)
    flags = ["--max_steps=3", "--missing_image=mask", f"--nodes={tmp_path / 'nodes.csv'}"]
    launch("cpu_2proc.yaml", *settings(graph, tmp_path / "run", *flags))
    rows = read_metrics(tmp_path / "run")
    assert [row["loss_mm"] for row in rows] == [0.0] * 3 and all(row["loss_graph"] > 0 for row in rows)
    assert all(math.isfinite(row[name]) for row in rows for name in LOSSES)
