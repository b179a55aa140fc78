"""``bench step``: the original's kind of step, the live one and the stored one, in turn on the same edges.

In float32, and beside it in the launch's precision.
"""

import math
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator

from mmgraph.bench.report import report
from mmgraph.bench.step_kinds import KINDS, PHASES, Steps
from mmgraph.config import Config
from mmgraph.data.graph import Graph
from mmgraph.data.sampler import GlobalBatchSampler
from mmgraph.distributed.launch import compute_dtype
from mmgraph.errors import UserError
from mmgraph.towers.cost import matmul_flops_per_s
from mmgraph.towers.load import load_towers, tower_shapes
from mmgraph.training import estimate

Times = dict[tuple[str, str], list[dict[str, float]]]  # of a precision and a kind: a step's seconds by phase


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
    speed = matmul_flops_per_s(steps.accelerator.device, steps.dtype)
    flops = 3 * distinct * estimate.shape(tower_shapes(config.model_name), config).fusion_flops
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
