"""Run by test_table_cache.py: opens generated tables and reads each row, and prints times and memory as JSON."""

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


def resident() -> float:
    """Memory of this process, anonymous and of files, in MB (2^20 bytes)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return sum(int(status[name].split()[0]) for name in ("RssAnon", "RssFile")) / 1024


class Reader:
    """Reads both nodes of each edge, and tells its process's memory."""

    def __init__(self, graph: Graph):
        self.nodes = graph.nodes

    def __call__(self, items: Any) -> tuple[float, float]:
        before = resident()
        seen = 0
        for _, source, destination in items:
            seen += sum(len(self.nodes[row]["summary"]) for row in (source, destination))
        assert seen > 0
        return before, resident()


def epoch(graph: Graph, workers: int) -> float:
    """Growth of the process that reads, over an epoch."""
    loader = DataLoader(
        EdgeRows(graph.rows),
        batch_sampler=GlobalBatchSampler(len(graph.rows), 256, seed=0),
        collate_fn=Reader(graph),
        num_workers=workers,
    )
    first, most = 0.0, 0.0
    for number, (before, after) in enumerate(loader):
        first = before if number == 0 else first
        most = max(most, after)
        if number * 256 >= len(graph.nodes) // 2:  # as many rows read as there are nodes
            break
    return most - first


folder = sys.argv[1]
config = Config(nodes=f"{folder}/nodes.csv", edges=f"{folder}/edges.csv", image_root=folder)
start, began = resident(), time.monotonic()
graph = load_graph(config)
loaded, grown = time.monotonic() - began, resident() - start
every = graph.nodes
for row in np.random.default_rng(0).permutation(len(every)).tolist():
    every[row]
read = resident() - start
of_worker = epoch(graph, workers=1)
print(
    "\n"
    + json.dumps(
        {
            "nodes": len(graph.nodes),
            "edges": len(graph.rows),
            "load_s": loaded,
            "after_load_mb": grown,
            "after_every_row_mb": read,
            "main_epoch_mb": epoch(graph, workers=0),
            "worker_epoch_mb": of_worker,
        }
    )
)
