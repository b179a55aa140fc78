"""Opens generated tables, reads every row, and prints times and memory as JSON. Run by test_table_cache.py."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import DataLoader

from mmgraph.config import Config
from mmgraph.data.batches import EdgeRows
from mmgraph.data.graph import Graph, load_graph
from mmgraph.data.sampler import GlobalBatchSampler


def resident_mb() -> float:
    """Return the resident memory of this process, anonymous and file-backed, in MB (2^20 bytes)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(status[name].split()[0]) for name in ("RssAnon", "RssFile")) / 1024


class Reader:
    """Reads both nodes of each edge, and returns the memory of its process before and after, in MB."""

    def __init__(self, graph: Graph):
        self.nodes = graph.nodes

    def __call__(self, items: Any) -> tuple[float, float]:
        before = resident_mb()
        characters = 0
        for _, source, destination in items:
            characters += sum(len(self.nodes[row]["summary"]) for row in (source, destination))
        assert characters > 0
        return before, resident_mb()


def epoch_growth(graph: Graph, workers: int) -> float:
    """Return how much the memory of the reading process grows while it reads as many rows as there are nodes, in MB."""
    loader = DataLoader(
        EdgeRows(graph.rows),
        batch_sampler=GlobalBatchSampler(len(graph.rows), 256, seed=0),
        collate_fn=Reader(graph),
        num_workers=workers,
    )
    first, peak = 0.0, 0.0
    for number, (before, after) in enumerate(loader):
        first = before if number == 0 else first
        peak = max(peak, after)
        if number * 256 >= len(graph.nodes) // 2:  # two rows per edge
            break
    return peak - first


folder = sys.argv[1]
config = Config(nodes=f"{folder}/nodes.csv", edges=f"{folder}/edges.csv", image_root=folder)
start_mb, start_time = resident_mb(), time.monotonic()
graph = load_graph(config)
load_s, load_growth = time.monotonic() - start_time, resident_mb() - start_mb
nodes = graph.nodes
for row in np.random.default_rng(0).permutation(len(nodes)).tolist():
    nodes[row]
read_growth = resident_mb() - start_mb
worker_growth = epoch_growth(graph, workers=1)
print(
    "\n"
    + json.dumps(
        {
            "nodes": len(graph.nodes),
            "edges": len(graph.rows),
            "load_s": load_s,
            "after_load_mb": load_growth,
            "after_every_row_mb": read_growth,
            "main_epoch_mb": epoch_growth(graph, workers=0),
            "worker_epoch_mb": worker_growth,
        }
    )
)
