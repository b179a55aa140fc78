"""The parts ``loss``, ``store`` and ``evaluation`` of ``bench gpu``."""

import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mmgraph.bench.gpu_workload import Workload, parallel_tokenizer
from mmgraph.bench.loss import MAX_PLAIN_EDGES, compare_losses
from mmgraph.data.adjacency import Adjacency, pair_keys
from mmgraph.data.content_hashes import ContentHashes
from mmgraph.data.split import HeldOut
from mmgraph.evaluation.evaluator import Evaluation, Ranks
from mmgraph.inference.node_outputs import NodeOutputs, Outputs
from mmgraph.models.multimodal_graph_encoder import TrainedModule
from mmgraph.towers.cached import CachedTowers
from mmgraph.towers.live import run_towers
from mmgraph.towers.load import load_towers, tower_shapes
from mmgraph.towers.store import TowerStore
from mmgraph.towers.store_builder import BATCH, build
from mmgraph.towers.store_plan import cost, missing_shards, recipe
from mmgraph.towers.tokens import Towers

LOSS_COLUMNS = ("plain s", "plain GB", "parts s", "parts GB", "time ratio", "difference")
LOSS_REPEATS = 3
RATE, SECONDS = "nodes/s", "s"
LARGE_BATCH = 512  # nodes per batch of the towers, for comparison with the batches of the store
HELD_OUT, DEGREE, WARM_NODES = 0.05, 5, 256  # evaluation: edges to rank and to train on per node; nodes of the warm-up
EVALUATION_COLUMNS = ("s", "embedding", "of which reading", "ranking", "rest")


def measure_loss(work: Workload, sizes: list[int]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measure the contrastive losses in float32, forward and backward, with each number of edges.

    Returns:
        The rows of :func:`mmgraph.bench.loss.compare_losses`, and no figures.
    """
    width, device = work.config.proj_dim, work.device
    compare_losses(256, width, device, 1)  # warm-up
    rows = []
    for edges in sizes:
        repeats = LOSS_REPEATS if edges <= MAX_PLAIN_EDGES else 1

        def measure(edges: int = edges, repeats: int = repeats) -> dict[str, Any]:
            return {
                name: value for name, value in compare_losses(edges, width, device, repeats).items() if name != "edges"
            }

        rows.append(work.row({"edges": edges}, LOSS_COLUMNS, measure))
    return rows, {}


def measure_store(work: Workload, nodes: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measure the build of a tower store of some nodes, and what the build consists of.

    Returns:
        A row for each operation: nodes per second and seconds. A node is a text and an image. And the figures.
    """
    rows, reading, loading = _row_by_operation(work, nodes)
    alone, size = rows[2][SECONDS], 0

    def measure() -> dict[str, Any]:
        nonlocal size
        seconds, size = _build(work, nodes)
        seconds -= loading
        return {RATE: nodes / seconds, SECONDS: seconds}

    rows.append(work.row({"operation": "build of the store, without loading the towers"}, (RATE, SECONDS), measure))
    built = rows[-1][SECONDS]
    figures: dict[str, Any] = {"loading the towers, s": loading, "store, GB": size / 1e9}
    if isinstance(built, float):
        figures["reading images alone, as a share of the build's time"] = reading / built
        if isinstance(alone, float):
            figures["nodes/s of the build as a share of those of the towers alone"] = alone / built
    return rows, figures


def _row_by_operation(work: Workload, nodes: int) -> tuple[list[dict[str, Any]], float, float]:
    """Measure what a build consists of.

    Returns:
        The rows (reading texts, reading images, towers in the way of the build, towers in other ways), and the seconds
        of reading the images and of loading the towers.
    """
    start = time.perf_counter()
    towers = load_towers(work.config.model_name).to(work.device)
    work.synchronize()
    loading = time.perf_counter() - start
    ids, pictures, rows, reading = _read_inputs(work, nodes)
    for dtype, batch in dict.fromkeys(
        ((torch.float32, BATCH), (torch.float32, LARGE_BATCH), (work.dtype, LARGE_BATCH))
    ):

        def measure(dtype: torch.dtype = dtype, batch: int = batch) -> dict[str, Any]:
            seconds = _towers_seconds(work, towers, ids, pictures, batch, dtype)
            return {RATE: nodes / seconds, SECONDS: seconds}

        name = f"towers alone, {str(dtype).removeprefix('torch.')}, batches of {batch}"
        rows.append(work.row({"operation": name}, (RATE, SECONDS), measure))
    return rows, reading, loading


Batches = list[tuple[torch.Tensor, torch.Tensor]]


def _read_inputs(work: Workload, nodes: int) -> tuple[Batches, torch.Tensor, list[dict[str, Any]], float]:
    """Read the inputs of the first nodes, and move them to the device.

    Returns:
        Token ids and attention masks in batches of the store, images (nodes, 3, S, S) uint8, the rows of both
        operations, and the seconds of reading the images.
    """
    table, images, inputs = work.graph.nodes, work.graph.images, work.inputs
    start = time.perf_counter()
    texts = [inputs.rules.text(table[row]) for row in range(nodes)]
    with parallel_tokenizer():
        ids = [inputs.tokenize(texts[first : first + BATCH]) for first in range(0, nodes, BATCH)]
    tokenizing = time.perf_counter() - start
    start = time.perf_counter()
    with ThreadPoolExecutor(max(1, work.config.num_workers)) as readers:  # as in store_builder.build

        def read(row: int) -> torch.Tensor:
            return inputs.decode_image_of(*images.read(images.locate(table[row])))[0]

        pictures = torch.stack(list(readers.map(read, range(nodes))))
    reading = time.perf_counter() - start
    rows = [
        {"operation": "reading and tokenizing texts", RATE: nodes / tokenizing, SECONDS: tokenizing},
        {"operation": f"reading images, {work.config.num_workers} threads", RATE: nodes / reading, SECONDS: reading},
    ]
    return [(i.to(work.device), m.to(work.device)) for i, m in ids], pictures.to(work.device), rows, reading


@torch.no_grad()
def _towers_seconds(
    work: Workload, towers: Towers, ids: Batches, pictures: torch.Tensor, size: int, dtype: torch.dtype
) -> float:
    """Return the seconds of both towers for inputs on the device. ``size`` is the batch size, a multiple of BATCH."""
    joined = [_join(ids[first : first + size // BATCH]) for first in range(0, len(ids), size // BATCH)]
    batches = list(zip(joined, pictures.split(size), strict=True))
    seconds = 0.0
    with torch.autocast(work.device.type, dtype, enabled=dtype != torch.float32):
        for part in (batches[:1], batches):  # the first batch alone is the warm-up
            work.synchronize()
            start = time.perf_counter()
            for (input_ids, mask), images in part:
                run_towers(towers, input_ids, mask, work.inputs.preprocessing.normalize(images))
            work.synchronize()
            seconds = time.perf_counter() - start
    return seconds


def _join(parts: Batches) -> tuple[torch.Tensor, torch.Tensor]:
    """Join batches of token ids and masks, which are padded with masked zeros to the longest text."""
    length = max(ids.shape[1] for ids, _ in parts)
    padded = [[torch.nn.functional.pad(tensor, (0, length - tensor.shape[1])) for tensor in part] for part in parts]
    ids, masks = zip(*padded, strict=True)
    return torch.cat(ids), torch.cat(masks)


def _build(work: Workload, nodes: int) -> tuple[float, int]:
    """Build a store of the first nodes. Return the seconds, and the size of its files in bytes."""
    config, accelerator, graph, inputs = work.config, work.accelerator, work.graph, work.inputs
    with tempfile.TemporaryDirectory(dir=work.folder) as temporary:
        folder = Path(temporary) / "store"
        folder.mkdir()
        store_recipe = recipe(config, accelerator.mixed_precision, inputs, work.towers_fingerprint)._replace(
            folder=folder
        )
        shards = missing_shards(TowerStore(folder), work.hashes, np.arange(nodes))
        expected = cost(config, store_recipe, graph, inputs, shards)
        work.synchronize()
        start = time.perf_counter()
        with parallel_tokenizer():
            build(config, accelerator, graph, inputs, store_recipe, shards, expected)
        work.synchronize()
        seconds = time.perf_counter() - start
        return seconds, sum(file.stat().st_size for file in folder.iterdir())


def measure_evaluation(work: Workload, num_nodes: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measure evaluations of a graph with random edges, whose nodes share the texts and images of the store.

    Args:
        num_nodes: number of nodes. Node i has the text and image of node i modulo the number of stored nodes.

    Returns:
        A row for the first evaluation of a run, which also ranks the embeddings that training does not change, and a
        row for a later one; and the figures.
    """
    config = work.config
    torch.manual_seed(config.seed)
    module = TrainedModule(*tower_shapes(config.model_name).widths, config.fused_dim, config.proj_dim)
    module = module.to(work.device).eval()
    repeated = np.arange(max(num_nodes, WARM_NODES)) % len(work.graph.nodes)
    hashes = ContentHashes(work.hashes.texts[repeated], work.hashes.images[repeated])
    stored = CachedTowers(work.store, hashes, work.device, resident=work.device.type == "cuda")
    _evaluate(work, _Evaluation(work, WARM_NODES), module, _TimedOutputs(work, stored, WARM_NODES))  # warm-up
    outputs, start = _TimedOutputs(work, stored, num_nodes), time.perf_counter()
    evaluation = _Evaluation(work, num_nodes)
    figures: dict[str, Any] = {"held-out edges": len(evaluation.rows), "training edges": DEGREE * num_nodes}
    figures["building the adjacency of the edges, s"] = time.perf_counter() - start
    rows = [
        work.row({"evaluation": name}, EVALUATION_COLUMNS, lambda: _evaluate(work, evaluation, module, outputs))
        for name in ("first", "later")
    ]
    if isinstance(rows[-1]["s"], float):
        # An evaluation embeds all nodes twice: the second time with shuffled images.
        figures["embedded nodes per second"] = 2 * num_nodes / rows[-1]["embedding"]
    return rows, figures


def _evaluate(
    work: Workload, evaluation: "_Evaluation", module: TrainedModule, outputs: "_TimedOutputs"
) -> dict[str, Any]:
    evaluation.seconds = outputs.seconds = outputs.reading = 0.0
    work.synchronize()
    start = time.perf_counter()
    evaluation.evaluate(module.embeddings, outputs)
    work.synchronize()
    total = time.perf_counter() - start
    rest = total - outputs.seconds - evaluation.seconds
    return dict(
        zip(EVALUATION_COLUMNS, (total, outputs.seconds, outputs.reading, evaluation.seconds, rest), strict=True)
    )


class _Evaluation(Evaluation):
    """An evaluation of random edges that measures the seconds in which it ranks held-out edges."""

    def __init__(self, work: Workload, nodes: int):
        generator = np.random.default_rng(0)
        trained = generator.integers(0, nodes, (DEGREE * nodes, 2))
        keys = pair_keys(trained, nodes)
        held_out = generator.integers(0, nodes, (max(8, int(HELD_OUT * nodes)), 2))
        held_out = held_out[~np.isin(held_out[:, 0] * nodes + held_out[:, 1], keys)]
        adjacency = Adjacency(torch.from_numpy(keys), nodes)
        super().__init__(work.accelerator, adjacency, HeldOut(held_out, None, [], "bench"), work.config.seed)
        self.work, self.seconds = work, 0.0

    def ranks(self, vectors: torch.Tensor) -> Ranks:
        self.work.synchronize()
        start = time.perf_counter()
        ranks = super().ranks(vectors)  # on the host, so the device has finished
        self.seconds += time.perf_counter() - start
        return ranks


class _TimedOutputs(NodeOutputs):
    """Tower outputs from the store. Measures the seconds in which all nodes are embedded, and those of reading.

    On CUDA, the tokens are in device memory, and the time of reading is that of the host alone.
    """

    def __init__(self, work: Workload, stored: CachedTowers, nodes: int):
        table: Any = range(nodes)  # only its length is used
        super().__init__(table, work.graph.images, work.inputs, stored, 0, work.config.collective_timeout)
        self.seconds = self.reading = 0.0

    def of(self, parts: Sequence[range], image_rows: np.ndarray | None = None) -> Iterator[Outputs]:
        start = resumed = time.perf_counter()
        for outputs in super().of(parts, image_rows):
            self.reading += time.perf_counter() - resumed
            yield outputs
            resumed = time.perf_counter()
        self.seconds += time.perf_counter() - start
