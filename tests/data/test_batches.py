"""Batches of edges: each edge has the relation of its row in the edge table."""

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from accelerate import Accelerator
from accelerate.utils import DataLoaderConfiguration
from conftest import graph_files

from mmgraph.bench.data import resident_mb
from mmgraph.config import Config
from mmgraph.data.batches import EdgeBatch, build_loader
from mmgraph.data.edge_table import EdgeTable, RemainingEdges
from mmgraph.data.graph import Graph, load_graph
from mmgraph.data.node_inputs import NodeInputs
from mmgraph.data.sampler import GlobalBatchSampler

RELATIONS = ["likes", "knows", "007", ""]


class Processor:
    size, crop_size, resample = {"shortest_edge": 32}, {"height": 32, "width": 32}, 3
    image_mean, image_std = [0.5] * 3, [0.25] * 3


def tokenize(texts: list[str], **_: Any) -> dict[str, Any]:
    return dict.fromkeys(("input_ids", "attention_mask"), torch.ones(len(texts), 1).long())


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = graph_files(tmp_path / "graph")
    table = pd.read_csv(folder / "edges.csv", dtype=str)
    table["rel_id"] = np.array(RELATIONS)[np.random.default_rng(0).integers(0, 4, len(table))]
    table.loc[5, "dst_id"] = "nobody"  # an edge to an unknown node is dropped
    table.to_csv(folder / "edges.csv", index=False)
    return folder


def open_graph(folder: Path, fraction: float) -> Graph:
    return load_graph(
        Config(nodes=str(folder / "nodes.csv"), edges=str(folder / "edges.csv"), eval_fraction=fraction, seed=3)
    )


def batches(graph: Graph, workers: int | None) -> list[EdgeBatch]:
    """Return the batches of an epoch, as prepared by Accelerate. If ``workers`` is None, they have no tower inputs."""
    inputs = None if workers is None else NodeInputs(tokenize, Processor(), 0)
    sampler = GlobalBatchSampler(len(graph.rows), 12, seed=0)
    settings = DataLoaderConfiguration(split_batches=True, even_batches=False, dispatch_batches=False)
    accelerator = Accelerator(cpu=True, dataloader_config=settings)
    return list(accelerator.prepare(build_loader(graph, inputs, sampler, workers or 0)))


def table_edges(folder: Path, batch: EdgeBatch) -> set[tuple[str, str, str]]:
    """Return (source, destination, relation) of the table's edges that connect the ends of the batch's edges."""
    table = pd.read_csv(folder / "edges.csv", dtype=str, keep_default_na=False)
    names = [f"{row:03d}" for row in batch.rows.tolist()]
    ends = {*zip(names[: len(batch.edges)], names[len(batch.edges) :], strict=True)}
    return {row for row in table[["src_id", "dst_id", "rel_id"]].itertuples(index=False, name=None) if row[:2] in ends}


@pytest.mark.parametrize("fraction", [0.0, 0.2])
@pytest.mark.parametrize("workers", [None, 0, 2])
def test_relations_equal_table(folder: Path, fraction: float, workers: int | None) -> None:
    graph = open_graph(folder, fraction)
    table = pd.read_csv(folder / "edges.csv", dtype=str, keep_default_na=False).drop(index=5).reset_index(drop=True)
    held_out = np.zeros(len(table), bool)
    if graph.held_out is not None:
        [stored] = (folder / "mmgraph_cache/tables").glob("*.held_out.npy")
        held_out[np.load(stored)] = True
    expected = table["rel_id"][~held_out].tolist()
    assert graph.relations is not None and len(graph.relations) == len(graph.rows) == len(expected)
    edge_count = 0
    for batch in batches(graph, workers):
        assert batch.relations is not None and batch.relations.dtype == batch.edges.dtype
        names = [graph.relation_names[number] for number in batch.relations.tolist()]
        assert names == [expected[edge] for edge in batch.edges.tolist()]
        rows = [f"{row:03d}" for row in batch.rows.tolist()]
        assert {*zip(rows[:12], rows[12:], names, strict=True)} <= table_edges(folder, batch)
        edge_count += len(names)
    assert edge_count == len(expected) // 12 * 12


@pytest.mark.parametrize("fraction", [0.0, 0.2])
def test_no_relations_without_a_column(folder: Path, fraction: float) -> None:
    table = pd.read_csv(folder / "edges.csv", dtype=str).drop(columns="rel_id")
    table.to_csv(folder / "edges.csv", index=False)
    graph = open_graph(folder, fraction)
    assert graph.relations is None and not graph.relation_names
    assert batches(graph, None)[0].relations is None


def test_stored_split_has_relations(folder: Path) -> None:
    """A split is stored once: opening it again writes nothing."""
    open_graph(folder, 0.2)
    before = {path: path.stat().st_mtime_ns for path in (folder / "mmgraph_cache").rglob("*")}
    assert sorted(path.suffix for path in before if path.is_file()) == [".arrow", ".json", *[".npy"] * 5]
    graph = open_graph(folder, 0.2)
    assert graph.relations is not None and len(graph.relations) == len(graph.rows)
    assert {path: path.stat().st_mtime_ns for path in (folder / "mmgraph_cache").rglob("*")} == before


def test_memory_of_reading_relations(tmp_path: Path) -> None:
    count = 20_000_000  # 80 MB
    np.save(tmp_path / "relations.npy", np.arange(count, dtype=np.int32))
    relations = RemainingEdges(EdgeTable(tmp_path / "relations.npy"), np.arange(0, count, count // 1000))
    edge_numbers = np.random.default_rng(0).integers(0, len(relations), (2_000, 256))
    before = resident_mb()
    for numbers in edge_numbers:
        values = relations[numbers]
    assert resident_mb() - before < 10
    expected = np.delete(np.arange(count), np.arange(0, count, count // 1000))
    assert np.array_equal(values, expected[numbers]) and values.dtype == np.int64
