"""The part ``steps`` of ``bench gpu``: time and memory of four kinds of training step."""

import math
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from itertools import count
from statistics import median
from typing import Any

import torch
from torch.utils.data import DataLoader

from mmgraph.bench.gpu_workload import NOT_MEASURED, Workload
from mmgraph.bench.loss import reset_peak_memory
from mmgraph.bench.step_kinds import Clock, PlainCollator, PlainModule, plain_loss
from mmgraph.checkpoints.progress import Progress
from mmgraph.data.batches import EdgeBatch, EdgeRows, build_loader, open_image_cache, start_worker
from mmgraph.data.node_inputs import NodeInputs
from mmgraph.data.sampler import GlobalBatchSampler
from mmgraph.distributed.launch import peak_memory_gb
from mmgraph.loader.multimodal_collator import MultimodalCollator
from mmgraph.losses.objective import Embeddings, Losses, Objective
from mmgraph.models.multimodal_graph_encoder import TrainedModule
from mmgraph.towers.cached import CachedTowers
from mmgraph.towers.cost import matmul_flops_per_s
from mmgraph.towers.live import LiveTowers, run_towers
from mmgraph.towers.load import load_towers, tower_shapes
from mmgraph.towers.token_source import TokenSource
from mmgraph.towers.tokens import Tokens
from mmgraph.training import estimate
from mmgraph.training.build import build_optimizer
from mmgraph.training.train_step import TrainStep

KINDS = ("plain", "live", "stored, disk", "stored, device")
LOOPS, LOOP_SECONDS, MAX_LOOP = 3, 1.0, 50  # loops per row; seconds that a loop should take; its most steps
MIN_PHASES, MAX_PHASES = 3, 20  # number of steps whose phases are measured
WARM_UP = {"cuda": 3, "cpu": 1}  # steps before the measurement
MAX_TOWER_NODES = 4096  # most nodes of a plain or live step: more would need seconds per step to read images
MEMORY_SHARE = 0.8  # a step is measured if its estimated memory is at most this share of the free memory
COLUMNS = (
    "edges/s", "ms", "data", "towers", "forward", "back+optim", "fusion share", "of matmul", "matmul TFLOP/s",
    "unique nodes", "peak GB",
)  # fmt: skip


class PlainStep:
    """The step of the original trainer, on both ends of each edge. Its loader has the workers of a run.

    Attributes:
        batches: an endless iterator of batches.
        clock: measures the phases of the next step; None: they are not measured.
    """

    def __init__(self, work: Workload, edges: int):
        config, self.work = work.config, work
        self.clock: Clock | None = None
        torch.manual_seed(config.seed)
        self.towers = load_towers(config.model_name).to(work.device)
        module = PlainModule(TrainedModule(*self.towers.widths, config.fused_dim, config.proj_dim))
        optimizer = torch.optim.AdamW(module.parameters(), config.learning_rate, weight_decay=config.weight_decay)
        sampler = GlobalBatchSampler(len(work.graph.rows), edges, config.seed)
        collator = MultimodalCollator(*work.tokenizer_and_processor, config.cache_size, rules=work.inputs.rules)
        loader: DataLoader[Any] = DataLoader(
            EdgeRows(work.graph.rows),
            batch_sampler=sampler,
            collate_fn=PlainCollator(work.graph, collator),
            num_workers=config.num_workers,
            persistent_workers=config.num_workers > 0,
            timeout=config.collective_timeout if config.num_workers else 0,
            pin_memory=work.device.type == "cuda",
            worker_init_fn=start_worker,
        )
        self.module, self.optimizer, loader = work.accelerator.prepare(module, optimizer, loader)
        self.batches = _endless(sampler, lambda: loader)

    def step(self, inputs: dict[str, torch.Tensor]) -> None:
        """Train on a batch of tower inputs."""
        with torch.no_grad(), self.work.accelerator.autocast():
            tokens = run_towers(self.towers, **inputs)
        _done(self.clock, "towers")
        z_graph, z_text, z_vis = self.module(*tokens[:3])
        loss = plain_loss(z_graph, z_text, z_vis, self.work.config.temperature)
        _done(self.clock, "forward")
        self.optimizer.zero_grad(set_to_none=True)
        self.work.accelerator.backward(loss)
        self.optimizer.step()


class TrainedStep:
    """A run's own :class:`TrainStep` and loader, with one of its token sources.

    Attributes:
        batches: an endless iterator of batches.
        clock: measures the phases of the next step; None: they are not measured.
    """

    def __init__(self, work: Workload, edges: int, source: TokenSource, inputs: NodeInputs | None):
        config, self.source = work.config, source
        self.clock: Clock | None = None
        torch.manual_seed(config.seed)
        module = TrainedModule(*tower_shapes(config.model_name).widths, config.fused_dim, config.proj_dim)
        optimizer = build_optimizer(config, work.accelerator, module)
        sampler = GlobalBatchSampler(len(work.graph.rows), edges, config.seed)
        loader = build_loader(work.graph, inputs, sampler, config.num_workers, config.collective_timeout)
        module, optimizer, loader = work.accelerator.prepare(module, optimizer, loader)
        self.batches = _endless(sampler, lambda: source.batches(loader))
        self._objective = Objective(config, None)
        observed: Any = self  # stands for the source and the objective, to see the ends of two phases
        self.step = TrainStep(
            module, optimizer, observed.objective, observed, work.accelerator, Progress(), edges,
            lambda _: config.learning_rate, 1, config.max_grad_norm,
        )  # fmt: skip

    def tokens(self, batch: EdgeBatch, micro_batches: int = 1) -> Tokens:
        tokens = self.source.tokens(batch, micro_batches)
        _done(self.clock, "towers")
        return tokens

    def objective(self, embeddings: Embeddings, batch: EdgeBatch) -> Losses:
        losses = self._objective(embeddings, batch)
        _done(self.clock, "forward")
        return losses


def _done(clock: Clock | None, phase: str) -> None:
    if clock is not None:
        clock.done(phase)


def _endless(sampler: GlobalBatchSampler, batches: Any) -> Iterator[Any]:
    """Yield the batches of all epochs. ``batches()`` returns those of an epoch."""
    for epoch in count(1):
        sampler.begin(epoch)
        yield from batches()


def measure_steps(work: Workload, sizes: list[int]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Measure each kind of step with each number of edges.

    Args:
        sizes: edges per step.

    Returns:
        The rows of the table, and the figures below it.
    """
    rows = []
    figures: dict[str, Any] = {
        "fusion share": "forward, backward and optimizer in the sum of the phases",
        "of matmul": "FLOP/s of the fusion in these phases, as if texts had 77 tokens, in those of a matrix product",
    }
    for kind in KINDS:
        source, inputs = None, None
        for edges in sizes:
            start = {"step": kind, "edges": edges}
            if (reason := _reason_to_skip(work, kind, edges)) is not None:
                rows.append({**start, **dict.fromkeys(COLUMNS, NOT_MEASURED)})
                figures[f"not measured: {kind}, {edges:,} edges"] = reason
                continue

            def measure(kind: str = kind, edges: int = edges) -> dict[str, Any]:
                nonlocal source, inputs
                if kind != "plain" and source is None:
                    source, inputs = open_source(work, kind)
                step = PlainStep(work, edges) if source is None else TrainedStep(work, edges, source, inputs)
                with closing(step.batches):  # type: ignore[type-var]
                    return _measure(work, step, edges)

            rows.append(work.row(start, COLUMNS, measure))
    return rows, figures


def _reason_to_skip(work: Workload, kind: str, edges: int) -> str | None:
    stored = kind.startswith("stored")
    if not stored and 2 * edges > MAX_TOWER_NODES:
        return f"its {2 * edges:,} nodes exceed the limit of {MAX_TOWER_NODES:,} for steps that read images"
    half = work.dtype != torch.float32
    needed, free = estimate.memory_gb(work.sizes, edges, None, work.device.type, half, stored), work.free_memory_gb
    if needed > MEMORY_SHARE * free:
        return f"it needs about {needed:.0f} GB of memory, more than {MEMORY_SHARE:.0%} of the free {free:.0f} GB"
    return None


def open_source(work: Workload, kind: str) -> tuple[TokenSource, NodeInputs | None]:
    """Open the token source of a kind of step, and for live towers the inputs that its loader needs."""
    if kind != "live":
        return work.stored(resident=kind == "stored, device"), None
    inputs = NodeInputs(*work.tokenizer_and_processor, work.config.cache_size, work.inputs.rules)
    inputs.picture_file = open_image_cache(work.config, work.graph, inputs.preprocessing, work.folder)
    nodes, images = work.graph.nodes, work.graph.images
    # The cache is filled before the measurement, as it is after the first epoch of a run.
    with ThreadPoolExecutor() as pool:
        for _ in pool.map(
            lambda row: inputs.read_images([images.locate(nodes[row])], [row], images), range(len(nodes))
        ):
            pass
    towers = load_towers(work.config.model_name)
    return LiveTowers(towers, inputs.preprocessing, work.device, work.dtype), inputs


def _measure(work: Workload, step: PlainStep | TrainedStep, edges: int) -> dict[str, Any]:
    """Return the cells of a row. Total times are from loops without waits, phases from steps that wait."""
    # Workers fill their queues and finish batches at the same time. So the warm-up empties the queues, and a loop takes
    # at least a batch from each worker.
    workers = 0 if isinstance(step, TrainedStep) and isinstance(step.source, CachedTowers) else work.config.num_workers
    run_steps(work, step, max(WARM_UP[work.device.type], 2 * workers))
    reset_peak_memory(work.device)
    length = max(workers, loop_length(run_steps(work, step, max(1, workers))))
    seconds = median(run_steps(work, step, length) for _ in range(LOOPS))
    peak = peak_memory_gb(work.device)
    phases, nodes = [], []
    for _ in range(max(MIN_PHASES, min(MAX_PHASES, length))):
        clock = Clock(work.device)
        batch = next(step.batches)
        clock.done("data")
        step.clock = clock
        step.step(batch)
        clock.done("optimizer")  # and the backward pass, which TrainStep does not separate from it
        phases.append(clock.seconds)
        nodes.append(2 * edges if isinstance(step, PlainStep) else len(batch.unique))
    data, towers, forward, rest = (
        median(p[name] for p in phases) for name in ("data", "towers", "forward", "optimizer")
    )
    total = median(sum(p.values()) for p in phases)
    matmul = matmul_flops_per_s(work.device, work.dtype)
    flops = 3 * median(nodes) * work.sizes.fusion_flops
    cells = (
        edges / seconds, 1000 * seconds, 1000 * data, 1000 * towers, 1000 * forward, 1000 * rest,
        (forward + rest) / total, flops / (forward + rest) / matmul, matmul / 1e12, int(median(nodes)), peak,
    )  # fmt: skip
    return dict(zip(COLUMNS, cells, strict=True))


def run_steps(work: Workload, step: PlainStep | TrainedStep, steps: int) -> float:
    """Run steps as training does: the host waits for the device only at the end. Return the seconds per step."""
    step.clock = None
    work.synchronize()
    start = time.perf_counter()
    for _ in range(steps):
        step.step(next(step.batches))
    work.synchronize()
    return (time.perf_counter() - start) / steps


def loop_length(seconds: float) -> int:
    """Return the number of steps of a loop, given the seconds of a step."""
    return max(1, min(MAX_LOOP, math.ceil(LOOP_SECONDS / seconds)))
