"""``bench data``: decoding, tokenising, what the shared image cache spares, and the memory of tables."""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch.utils.data import DataLoader

from mmgraph.bench.report import report
from mmgraph.config import Config
from mmgraph.data.batches import EdgeCollator, EdgeRows, build_loader, shared_pictures, start_worker
from mmgraph.data.graph import Graph, load_graph
from mmgraph.data.node_inputs import NodeInputs, node_text
from mmgraph.data.node_table import NodeTable
from mmgraph.data.sampler import GlobalBatchSampler
from mmgraph.distributed.collectives import broadcast_from_main_process, raise_on_all_ranks
from mmgraph.distributed.launch import build_accelerator, check_batch_size
from mmgraph.towers.load import load_tokenizer_and_processor

SAMPLE, WARM = 256, 10


def bench_data(config: Config, tables_only: bool, path: Path | None) -> None:
    """Measure and report; all ranks of a launch take part. Pictures are cached in a folder that is removed."""
    accelerator = build_accelerator(config.collective_timeout)
    before, begun = resident_mb(), time.perf_counter()
    graph = raise_on_all_ranks(accelerator, lambda: load_graph(config))
    check_batch_size(config.global_batch_size, len(graph.rows), accelerator.num_processes)
    figures: dict[str, Any] = {"nodes": len(graph.nodes), "edges": len(graph.rows)}
    figures["opening the tables, s"] = time.perf_counter() - begun
    figures |= _table_memory(config, graph, before)
    rows: list[dict[str, Any]] = []
    if not tables_only:
        inputs = NodeInputs(*load_tokenizer_and_processor(config.model_name), 0, config.truncated_images)
        rows += _speeds(graph, inputs)
        figures |= _cache_hits(config, accelerator, graph)
    if accelerator.is_main_process:
        report(f"data: {config.nodes}, {config.num_workers} workers", rows or [{"what": "tables"}], figures, path)
    accelerator.end_training()


def _speeds(graph: Graph, inputs: NodeInputs) -> list[dict[str, Any]]:
    """Median ms of one text and of one image, on one thread, over up to SAMPLE nodes drawn by seed."""
    drawn = np.random.default_rng(0).permutation(len(graph.nodes))[:SAMPLE].tolist()
    nodes = [graph.nodes[row] for row in drawn]
    references = [graph.images.locate(node) for node in nodes]
    texts = [node_text(node) for node in nodes]
    kinds: dict[str, tuple[Callable[[Any], object], Sequence[Any]]] = {
        "read a node": (lambda row: graph.nodes[row], drawn),
        "tokenise a text": (lambda text: inputs.texts([text]), texts),
        "read an image file": (graph.images.read, references),
        "decode and resize it": (lambda reference: inputs.picture_of(*graph.images.read(reference)), references),
    }
    return [{"what": what, "ms": 1000 * statistics.median(_seconds(act, over))} for what, (act, over) in kinds.items()]


def _seconds(act: Callable[[Any], object], over: Sequence[Any]) -> list[float]:
    found = []
    for item in over:
        begun = time.perf_counter()
        act(item)
        found.append(time.perf_counter() - begun)
    return found


def _cache_hits(config: Config, accelerator: Accelerator, graph: Graph) -> dict[str, float]:
    """Which share of an epoch's lookups (two an edge) decode nothing, in the first epoch and in the second."""
    figures = {}
    with tempfile.TemporaryDirectory() as own:
        folder = Path(broadcast_from_main_process(accelerator, lambda: own))
        inputs = NodeInputs(*load_tokenizer_and_processor(config.model_name), config.cache_size)
        if config.image_cache_gb:
            inputs.picture_file = shared_pictures(config, graph, inputs.preprocessing, folder)
        sampler = GlobalBatchSampler(len(graph.rows), config.global_batch_size, config.seed)
        loader = accelerator.prepare(
            build_loader(graph, inputs, sampler, config.num_workers, config.collective_timeout)
        )
        for epoch in (1, 2):
            sampler.begin(epoch)
            begun, lookups, decoded = time.perf_counter(), 0, 0
            for batch in loader:
                lookups, decoded = lookups + len(batch.rows), decoded + batch.decoded
            seconds = time.perf_counter() - begun
            lookups, decoded = (sum(gather_object([count])) for count in (lookups, decoded))
            figures[f"epoch {epoch}: lookups that decode nothing"] = 1 - decoded / lookups
            figures[f"epoch {epoch}: edges/s"] = lookups / 2 / seconds
        accelerator.wait_for_everyone()  # before the folder goes
    return figures


class _NodeReader(EdgeCollator):
    """Reads a batch's nodes and drops them; tells the memory of the process it is in."""

    def __init__(self, nodes: NodeTable):
        super().__init__()
        self.nodes = nodes

    def __call__(self, items: Sequence[tuple[int, int, int]]) -> Any:
        for row in super().__call__(items).unique.tolist():
            self.nodes[row]
        return os.getpid(), resident_mb(), private_mb()


def _table_memory(config: Config, graph: Graph, before: float) -> dict[str, float]:
    """Growth in MB over an epoch in which workers read each batch's nodes.

    The main process's is from before the tables were opened; a worker's from its tenth batch, when Python's own pages
    that a fork shares have become its own.
    """
    opened = resident_mb()
    sampler = GlobalBatchSampler(len(graph.rows), config.global_batch_size, config.seed)
    workers = max(1, config.num_workers)
    loader = DataLoader(
        EdgeRows(graph.rows),
        batch_sampler=sampler,
        collate_fn=_NodeReader(graph.nodes),
        num_workers=workers,
        timeout=config.collective_timeout,
        worker_init_fn=start_worker,
    )
    begun, seen = time.perf_counter(), dict[int, list[tuple[float, float]]]()
    for process, *memory in loader:
        seen.setdefault(process, []).append((memory[0], memory[1]))
    seconds, after = time.perf_counter() - begun, resident_mb()
    figures = {"main process, opening": opened - before, "main process, with an epoch": after - before}
    for number, name in enumerate(("resident", "private")):
        growth = [max(m[number] for m in of[WARM:] or of[-1:]) - of[min(WARM, len(of) - 1)][number]
                  for of in seen.values()]  # fmt: skip
        figures[f"a worker, {name}, over an epoch"] = max(growth)
    return {f"{name}, MB": value for name, value in figures.items()} | {"the epoch's reading, s": seconds}


def resident_mb() -> float:
    """Resident memory of this process, in MB (10^6 bytes)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) * 1024 / 1e6


def private_mb() -> float:
    """What this process alone holds: without what it shares with the one that it was forked from."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return (sizes["Private_Clean"] + sizes["Private_Dirty"]) * 1024 / 1e6
