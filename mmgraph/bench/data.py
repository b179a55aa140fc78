"""``bench data``: measures decoding and tokenization, hits of the image cache, and memory of the tables."""

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
from mmgraph.data.batches import EdgeCollator, EdgeRows, build_loader, open_image_cache, start_worker
from mmgraph.data.graph import Graph, load_graph
from mmgraph.data.input_rules import InputRules
from mmgraph.data.node_inputs import NodeInputs
from mmgraph.data.node_table import NodeTable
from mmgraph.data.sampler import GlobalBatchSampler
from mmgraph.distributed.collectives import broadcast_from_main_process, raise_on_all_ranks
from mmgraph.distributed.launch import build_accelerator, check_batch_size
from mmgraph.towers.load import load_tokenizer_and_processor

SAMPLE, WARM = 256, 10  # number of nodes to time; number of batches that a worker reads before its memory is measured


def bench_data(config: Config, tables_only: bool, path: Path | None) -> None:
    """Measure and report. All ranks must call this function. The image cache is in a temporary folder.

    Args:
        config: names the graph, the towers and the settings of the loader.
        tables_only: whether only the memory of the tables is measured.
        path: JSON file to write; None writes no file.
    """
    accelerator = build_accelerator(config.collective_timeout)
    before, start = resident_mb(), time.perf_counter()
    graph = raise_on_all_ranks(accelerator, lambda: load_graph(config))
    check_batch_size(config.global_batch_size, len(graph.rows), accelerator.num_processes)
    figures: dict[str, Any] = {"nodes": len(graph.nodes), "edges": len(graph.rows)}
    figures["opening the tables, s"] = time.perf_counter() - start
    figures |= _table_memory(config, graph, before)
    rows: list[dict[str, Any]] = []
    if not tables_only:
        inputs = NodeInputs(*load_tokenizer_and_processor(config.model_name), 0, InputRules.of(config))
        rows += _speeds(graph, inputs)
        figures |= _cache_hits(config, accelerator, graph)
    if accelerator.is_main_process:
        report(f"data: {config.nodes}, {config.num_workers} workers", rows or [{"what": "tables"}], figures, path)
    accelerator.end_training()


def _speeds(graph: Graph, inputs: NodeInputs) -> list[dict[str, Any]]:
    """Return the median milliseconds of each operation over up to :data:`SAMPLE` random nodes, in one thread."""
    drawn = np.random.default_rng(0).permutation(len(graph.nodes))[:SAMPLE].tolist()
    nodes = [graph.nodes[row] for row in drawn]
    references = [graph.images.locate(node) for node in nodes]
    texts = [inputs.rules.text(node) for node in nodes]
    operations: dict[str, tuple[Callable[[Any], object], Sequence[Any]]] = {
        "read a node": (lambda row: graph.nodes[row], drawn),
        "tokenise a text": (lambda text: inputs.tokenize([text]), texts),
        "read an image file": (graph.images.read, references),
        "decode and resize it": (lambda reference: inputs.decode_image_of(*graph.images.read(reference)), references),
    }
    return [
        {"what": what, "ms": 1000 * statistics.median(_seconds(run, items))}
        for what, (run, items) in operations.items()
    ]


def _seconds(run: Callable[[Any], object], items: Sequence[Any]) -> list[float]:
    seconds = []
    for item in items:
        start = time.perf_counter()
        run(item)
        seconds.append(time.perf_counter() - start)
    return seconds


def _cache_hits(config: Config, accelerator: Accelerator, graph: Graph) -> dict[str, float]:
    """Return which fraction of the image lookups decodes no image, for the first and for the second epoch.

    There are two lookups per edge, one for each end.
    """
    figures = {}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(broadcast_from_main_process(accelerator, lambda: temporary))
        inputs = NodeInputs(*load_tokenizer_and_processor(config.model_name), config.cache_size)
        if config.image_cache_gb:
            inputs.picture_file = open_image_cache(config, graph, inputs.preprocessing, folder)
        sampler = GlobalBatchSampler(len(graph.rows), config.global_batch_size, config.seed)
        loader = accelerator.prepare(
            build_loader(graph, inputs, sampler, config.num_workers, config.collective_timeout)
        )
        for epoch in (1, 2):
            sampler.begin(epoch)
            start, lookups, decoded = time.perf_counter(), 0, 0
            for batch in loader:
                lookups, decoded = lookups + len(batch.rows), decoded + batch.decoded
            seconds = time.perf_counter() - start
            lookups, decoded = (sum(gather_object([count])) for count in (lookups, decoded))
            figures[f"epoch {epoch}: lookups that decode nothing"] = 1 - decoded / lookups
            figures[f"epoch {epoch}: edges/s"] = lookups / 2 / seconds
        accelerator.wait_for_everyone()  # before the main process removes the folder
    return figures


class _NodeReader(EdgeCollator):
    """Reads and discards the nodes of a batch.

    In place of the batch, it returns the id of its process, and the resident and the private memory of this process in
    MB.
    """

    def __init__(self, nodes: NodeTable):
        super().__init__()
        self.nodes = nodes

    def __call__(self, items: Sequence[tuple[int, int, int]]) -> Any:
        for row in super().__call__(items).unique.tolist():
            self.nodes[row]
        return os.getpid(), resident_mb(), private_mb()


def _table_memory(config: Config, graph: Graph, before: float) -> dict[str, float]:
    """Return how much memory grows, in MB, during an epoch in which workers read the nodes of each batch.

    For the main process, the growth counts from ``before``, the memory before the tables were opened. For a worker, it
    counts from the end of its first :data:`WARM` batches. At this point, the worker has its own copies of the Python
    pages that it shared with the main process after the fork.
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
    start, seen = time.perf_counter(), dict[int, list[tuple[float, float]]]()
    for process, *memory in loader:
        seen.setdefault(process, []).append((memory[0], memory[1]))
    seconds, after = time.perf_counter() - start, resident_mb()
    figures = {"main process, opening": opened - before, "main process, with an epoch": after - before}
    for number, name in enumerate(("resident", "private")):
        growth = [max(m[number] for m in batches[WARM:] or batches[-1:]) - batches[min(WARM, len(batches) - 1)][number]
                  for batches in seen.values()]  # fmt: skip
        figures[f"a worker, {name}, over an epoch"] = max(growth)
    return {f"{name}, MB": value for name, value in figures.items()} | {"the epoch's reading, s": seconds}


def resident_mb() -> float:
    """Return the resident memory of this process in MB (10^6 bytes)."""
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmRSS"].split()[0]) * 1024 / 1e6


def private_mb() -> float:
    """Return the private memory of this process in MB. Pages that other processes share are not counted."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    sizes = {line.split(":")[0]: int(line.split()[1]) for line in lines}
    return (sizes["Private_Clean"] + sizes["Private_Dirty"]) * 1024 / 1e6
