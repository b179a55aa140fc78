"""``bench step``: the original's kind of step, the live one and the stored one, in turn on the same edges.

In float32, and beside it in the launch's precision.
"""

import math
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn

from mmgraph import estimate
from mmgraph.batches import BatchCollator, EdgeCollator, EdgeRows
from mmgraph.bench.report import report
from mmgraph.config import Config
from mmgraph.contents import Contents, read_contents
from mmgraph.errors import UserError
from mmgraph.files import cache_folder
from mmgraph.graph import Graph
from mmgraph.loader.multimodal_collator import MultimodalCollator
from mmgraph.loader.node_inputs import NodeInputs
from mmgraph.losses import contrastive_losses, info_nce_loss
from mmgraph.models.multimodal_graph_encoder import TrainedModule
from mmgraph.order import GlobalBatchSampler
from mmgraph.tower_build import build
from mmgraph.tower_cache import StoredTokens
from mmgraph.tower_plan import cost, missing_shards, recipe, refusal
from mmgraph.tower_store import TowerStore
from mmgraph.towers import (
    LiveTowers,
    Tokens,
    Towers,
    fingerprint,
    load_tokenizer_and_processor,
    load_tower_configs,
    load_towers,
    run_towers,
    tower_state,
)
from mmgraph.world import compute_dtype

KINDS = ("plain", "live", "stored")
PHASES = ("data", "towers", "forward", "backward", "optimizer")
Times = dict[tuple[str, str], list[dict[str, float]]]  # of a precision and a kind: a step's seconds by phase


class PlainModule(nn.Module):
    """Fusion and heads as the original computes them, with a :class:`TrainedModule`'s parameters.

    Attention through ``nn.MultiheadAttention.forward``, each layer on each token.
    """

    def __init__(self, trained: TrainedModule):
        super().__init__()
        self.trained = trained

    def forward(self, text: torch.Tensor, mask: torch.Tensor, patches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """(N, L, d_text), (N, L), (N, P, d_vis) -> ``z_graph``, ``z_text``, ``z_vis``, each (N, proj_dim)."""
        fusion = self.trained.fusion
        text, patches = fusion.text_proj(text), fusion.vis_proj(patches)
        attend = nn.MultiheadAttention.forward
        to_vis, _ = attend(fusion.text2vis_attn, text, patches, patches, need_weights=False)
        to_text, _ = attend(fusion.vis2text_attn, patches, text, text, key_padding_mask=mask == 0, need_weights=False)
        text, vis = fusion.text_ffn(to_vis + text), fusion.vis_ffn(to_text + patches)
        weights = mask[:, :, None].to(text.dtype)
        text_pool = (text * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)
        vis_pool = vis.mean(dim=1)
        fused = fusion.fusion_mlp(torch.cat([text_pool, vis_pool], dim=-1))
        heads = (self.trained.graph_proj, self.trained.text_proj, self.trained.vis_proj)
        return tuple(
            F.normalize(head(x).float(), dim=-1) for head, x in zip(heads, (fused, text_pool, vis_pool), strict=True)
        )


class Steps:
    """The three kinds of step in one precision over the same batches, each with its own parameters and optimizer.

    Args:
        batches: numbers of edges.
        towers: shared by the live and the plain kind, whatever the precision.
        dtype: what all kinds compute in; 16-bit ones by autocast.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        graph: Graph,
        batches: list[list[int]],
        towers: Towers,
        dtype: torch.dtype,
    ):
        self.config, self.accelerator, self.graph, self.dtype = config, accelerator, graph, dtype
        self.edges = [EdgeRows(graph.rows).__getitems__(batch) for batch in batches]
        tokenizer, processor = load_tokenizer_and_processor(config.model_name)
        self.inputs = NodeInputs(tokenizer, processor, config.cache_size, config.truncated_images)
        self.plain_collator = MultimodalCollator(tokenizer, processor, config.cache_size)
        self.live_collator = BatchCollator(graph.nodes, graph.paths, self.inputs)
        self.live = LiveTowers(towers, self.inputs.preprocessing, accelerator.device, dtype)
        d_text, d_vis = (tower.hidden_size for tower in load_tower_configs(config.model_name))
        self.modules, self.optimizers = {}, {}
        for kind in KINDS:
            torch.manual_seed(config.seed)
            module = TrainedModule(d_text, d_vis, config.fused_dim, config.proj_dim).to(accelerator.device)
            self.modules[kind] = module
            self.optimizers[kind] = torch.optim.AdamW(
                module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=kind != "plain"
            )

    def prepare_store(self, folder: Path, precision: str) -> None:
        """The store of a run of that precision if it has all nodes; else one of the measured nodes, in ``folder``."""
        config, graph, accelerator = self.config, self.graph, self.accelerator
        contents = read_contents(
            graph.nodes, graph.paths, config.nodes, graph.nodes_fingerprint, cache_folder(config.nodes), accelerator
        )
        made_by = recipe(config, precision, self.inputs, fingerprint(tower_state(self.live.towers)))
        self.entries = sum(len(shard.rows) for shard in missing_shards(TowerStore(folder), contents))  # of all nodes
        store, self.build_seconds = TowerStore(made_by.folder), float("nan")
        shards = missing_shards(store, contents)
        if shards:
            rows = np.unique([ends for batch in self.edges for _, *ends in batch])
            shards = missing_shards(TowerStore(folder), contents, rows)
            made_by = made_by._replace(folder=folder)
            expected = cost(config, made_by, graph, self.inputs, shards)
            if (reason := refusal(folder, expected.bytes)) is not None:
                raise UserError(reason)
            begun = time.perf_counter()
            build(config, accelerator, graph, self.inputs, made_by, shards, expected)
            self.build_seconds = (time.perf_counter() - begun) * self.entries / sum(len(shard.rows) for shard in shards)
            store = TowerStore(folder)
            measured = np.isin(np.arange(len(graph.nodes)), rows)  # nobody reads the others
            contents = Contents(*(np.where(measured, hashes, hashes[rows[0]]) for hashes in contents))
        self.stored = StoredTokens(store, contents, accelerator.device, resident=accelerator.device.type == "cuda")
        edges = EdgeCollator()
        self.stored_batches = self.stored.batches(self._to_device(edges(items)) for items in self._endless())

    def _endless(self) -> Iterator[list[Any]]:
        while True:
            yield from self.edges

    def _to_device(self, batch: dict[str, Any]) -> dict[str, Any]:
        device = self.accelerator.device
        return {name: x.to(device) if isinstance(x, torch.Tensor) else x for name, x in batch.items()}

    def step(self, kind: str, number: int) -> dict[str, float]:
        """One step of a kind; seconds by phase. ``data`` is the time that the step waits for its batch."""
        clock = _Clock(self.accelerator.device)
        embed = self._plain(number, clock) if kind == "plain" else self._distinct(kind, number, clock)
        with self._autocast():
            z_graph, z_text, z_vis = embed()
        temperature, edges = self.config.temperature, len(z_graph) // 2
        if kind == "plain":
            loss = info_nce_loss(z_text @ z_vis.T / temperature)
            loss = loss + info_nce_loss(z_graph[:edges] @ z_graph[edges:].T / temperature)
        else:
            loss = contrastive_losses(z_graph, z_text, z_vis, temperature, 1.0).total
        clock.done("forward")
        self.optimizers[kind].zero_grad(set_to_none=True)
        loss.backward()
        clock.done("backward")
        self.optimizers[kind].step()
        clock.done("optimizer")
        return clock.seconds

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.accelerator.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _plain(self, number: int, clock: "_Clock") -> Callable[[], tuple[torch.Tensor, ...]]:
        pairs = [(self._node(source), self._node(destination)) for _, source, destination in self._edges(number)]
        inputs = self._to_device(self.plain_collator(pairs))
        clock.done("data")
        with torch.no_grad(), self._autocast():
            tokens, _, _ = run_towers(self.live.towers, **inputs)
        clock.done("towers")
        return lambda: PlainModule(self.modules["plain"])(*tokens)

    def _distinct(self, kind: str, number: int, clock: "_Clock") -> Callable[[], tuple[torch.Tensor, ...]]:
        source: StoredTokens | LiveTowers = self.stored if kind == "stored" else self.live
        if kind == "stored":
            batch = next(self.stored_batches)
        else:
            batch = self._to_device(self.live_collator(self._edges(number)))
        clock.done("data")
        tokens: Tokens = source.tokens(batch)
        clock.done("towers")
        module = self.modules[kind]
        return lambda: tuple(z.index_select(0, batch["inverse"]) for z in module(tokens))

    def _node(self, row: int) -> dict[str, Any]:
        node = self.graph.nodes[row]
        return {**node, "image_path": self.graph.paths.resolve(node["image_path"])}

    def _edges(self, number: int) -> list[Any]:
        return self.edges[number % len(self.edges)]


class _Clock:
    """Seconds between calls; waits for the device, so that each phase has its own work."""

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, dict.fromkeys(PHASES, 0.0)
        self.last = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def done(self, phase: str) -> None:
        now = self._now()
        self.seconds[phase] += now - self.last
        self.last = now


def bench_step(config: Config, accelerator: Accelerator, graph: Graph, repeats: int, path: Path | None) -> None:
    """Measure and report; the kinds of step take turns, after one of each that does not count.

    Raises:
        UserError: fewer edges than a batch.
    """
    sampler = GlobalBatchSampler(len(graph.rows), config.global_batch_size, config.seed)
    batches = [batch for _, batch in zip(range(repeats + 1), sampler, strict=False)]
    if not batches:
        raise UserError(f"--global_batch_size {config.global_batch_size} is larger than the graph's edges")
    towers = load_towers(config.model_name)
    dtypes = {"no": torch.float32, accelerator.mixed_precision: compute_dtype(accelerator)}
    every = {name: Steps(config, accelerator, graph, batches, towers, dtype) for name, dtype in dtypes.items()}
    times: Times = {(precision, kind): [] for precision in every for kind in KINDS}
    with tempfile.TemporaryDirectory() as folder:
        for precision, steps in every.items():
            steps.prepare_store(Path(folder) / precision, precision)
        for number in range(repeats + 1):
            for (precision, kind), of_kind in times.items():
                of_kind.append(every[precision].step(kind, number))
    times = {step: of_kind[1:] for step, of_kind in times.items()}
    report(
        f"step: {config.model_name}, {config.global_batch_size} edges, {accelerator.device.type}, medians of "
        f"{repeats}, ms",
        [_row(*step, config.global_batch_size, of_kind) for step, of_kind in times.items()],
        {name: value for precision in every for name, value in _figures(every, times, precision).items()},
        path,
    )


def _row(precision: str, kind: str, edges: int, of_kind: list[dict[str, float]]) -> dict[str, Any]:
    phases = {phase: 1000 * median(t[phase] for t in of_kind) for phase in PHASES}
    whole = median(_whole(of_kind))
    return {"step": f"{_name(precision)}, {kind}", **phases, "whole": 1000 * whole, "edges/s": edges / whole}


def _name(precision: str) -> str:
    return "float32" if precision == "no" else precision


def _whole(of_kind: list[dict[str, float]]) -> list[float]:
    return [sum(t.values()) for t in of_kind]


def _figures(every: dict[str, Steps], times: Times, precision: str) -> dict[str, Any]:
    """What is to be told of a precision. Its steps are compared with the plain ones in it, and in float32."""
    steps = every[precision]
    config, rows = steps.config, steps.graph.rows
    distinct = median(len({row for _, *ends in edges for row in ends}) for edges in steps.edges)
    build_seconds = steps.build_seconds
    if math.isnan(build_seconds):  # the store was there: what live towers took for as many nodes
        live = median(t["data"] + t["towers"] for t in times["no", "live"])
        build_seconds = live * steps.entries / 2 / distinct
    count = config.epochs * (len(rows) // config.global_batch_size)
    stored = times[precision, "stored"]
    figures: dict[str, Any] = {}
    for other in dict.fromkeys((precision, "no")):
        plain = _whole(times[other, "plain"])
        for kind in KINDS[1:]:
            ratios = (p / k for p, k in zip(plain, _whole(times[precision, kind]), strict=True))
            figures[f"{kind} against plain in {_name(other)}"] = median(ratios)
        epochs = f"{config.epochs} epochs, building the store ({build_seconds:,.0f} s) included, against plain"
        figures[f"{epochs} in {_name(other)}"] = (
            count * median(plain) / (count * median(_whole(stored)) + build_seconds)
        )
    fusion = [t["forward"] + t["backward"] + t["optimizer"] for t in stored]
    speed = estimate.matmul_flops_per_s(steps.accelerator.device, steps.dtype)
    flops = 3 * distinct * estimate.shape(*load_tower_configs(config.model_name), config).fusion_flops
    figures |= {
        "share of fusion and optimizer in the stored step": median(
            f / w for f, w in zip(fusion, _whole(stored), strict=True)
        ),
        "share of waiting for data in the stored step": median(
            t["data"] / w for t, w in zip(stored, _whole(stored), strict=True)
        ),
        "distinct nodes a step": distinct,
        "matrix product, GFLOP/s": speed / 1e9,
        "of which the fusion reaches": flops / median(fusion) / speed,
    }
    return {f"{_name(precision)}: {what}": value for what, value in figures.items()}
