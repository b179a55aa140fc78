"""``bench step``: times three kinds of step: the original trainer's, one with live towers, and one with stored tokens.

The variants take turns on the same edges. They are measured in float32. If the launch has another precision, they are
also measured in that precision.
"""

import math
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

import torch
from accelerate import Accelerator

from mmgraph.bench.report import report
from mmgraph.bench.step_kinds import PHASES, VARIANTS, Steps
from mmgraph.config import Config
from mmgraph.data.graph import Graph
from mmgraph.data.sampler import GlobalBatchSampler
from mmgraph.distributed.launch import compute_dtype
from mmgraph.errors import UserError
from mmgraph.towers.cost import matmul_flops_per_s
from mmgraph.towers.load import load_towers, tower_shapes
from mmgraph.training import estimate

Times = dict[tuple[str, str], list[dict[str, float]]]  # (precision, variant) -> seconds of each step by phase


def bench_step(config: Config, accelerator: Accelerator, graph: Graph, repeats: int, path: Path | None) -> None:
    """Measure and report. Each variant first runs one warm-up step, which is not counted.

    Args:
        config: settings of a run.
        accelerator: the Accelerator of this launch.
        graph: the graph to train on.
        repeats: measured steps per variant; each reported value is the median over the steps.
        path: JSON file to write; None writes no file.

    Raises:
        UserError: the graph has fewer edges than a batch, or the tower store cannot be built.
    """
    sampler = GlobalBatchSampler(len(graph.rows), config.global_batch_size, config.seed)
    batches = [batch for _, batch in zip(range(repeats + 1), sampler, strict=False)]
    if not batches:
        raise UserError(
            f"--global_batch_size {config.global_batch_size} exceeds the number of edges in the graph; lower this value"
        )
    towers = load_towers(config.model_name)
    dtypes = {"no": torch.float32, accelerator.mixed_precision: compute_dtype(accelerator)}
    steps_by_precision = {
        name: Steps(config, accelerator, graph, batches, towers, dtype) for name, dtype in dtypes.items()
    }
    times: Times = {(precision, variant): [] for precision in steps_by_precision for variant in VARIANTS}
    with tempfile.TemporaryDirectory() as folder:
        for precision, steps in steps_by_precision.items():
            steps.prepare_store(Path(folder) / precision, precision)
        for number in range(repeats + 1):
            for (precision, variant), seconds in times.items():
                seconds.append(steps_by_precision[precision].step(variant, number))
    times = {key: seconds[1:] for key, seconds in times.items()}
    report(
        f"step: {config.model_name}, {config.global_batch_size} edges, {accelerator.device.type}, medians of "
        f"{repeats}, ms",
        [_row(*key, config.global_batch_size, seconds) for key, seconds in times.items()],
        {
            name: value
            for precision in steps_by_precision
            for name, value in _figures(steps_by_precision, times, precision).items()
        },
        path,
    )


def _row(precision: str, variant: str, edges: int, seconds: list[dict[str, float]]) -> dict[str, Any]:
    phases = {phase: 1000 * median(t[phase] for t in seconds) for phase in PHASES}
    total = median(_totals(seconds))
    return {"step": f"{_name(precision)}, {variant}", **phases, "total": 1000 * total, "edges/s": edges / total}


def _name(precision: str) -> str:
    return "float32" if precision == "no" else precision


def _totals(seconds: list[dict[str, float]]) -> list[float]:
    return [sum(t.values()) for t in seconds]


def _figures(steps_by_precision: dict[str, Steps], times: Times, precision: str) -> dict[str, Any]:
    """Return the figures of a precision. Its steps are compared with plain steps in that precision and in float32."""
    steps = steps_by_precision[precision]
    config, rows = steps.config, steps.graph.rows
    unique_nodes = median(len({row for _, *ends in edges for row in ends}) for edges in steps.edges)
    build_seconds = steps.build_seconds
    if math.isnan(build_seconds):  # the store already existed, so its build time is estimated from live towers
        live = median(t["data"] + t["towers"] for t in times["no", "live"])
        build_seconds = live * steps.entries / 2 / unique_nodes
    num_steps = config.epochs * (len(rows) // config.global_batch_size)
    stored = times[precision, "stored"]
    figures: dict[str, Any] = {}
    for other in dict.fromkeys((precision, "no")):
        plain = _totals(times[other, "plain"])
        for variant in VARIANTS[1:]:
            ratios = (p / v for p, v in zip(plain, _totals(times[precision, variant]), strict=True))
            figures[f"{variant} against plain in {_name(other)}"] = median(ratios)
        epochs = f"{config.epochs} epochs, including {build_seconds:,.0f} s to build the store, against plain"
        figures[f"{epochs} in {_name(other)}"] = (
            num_steps * median(plain) / (num_steps * median(_totals(stored)) + build_seconds)
        )
    fusion = [t["forward"] + t["backward"] + t["optimizer"] for t in stored]
    speed = matmul_flops_per_s(steps.accelerator.device, steps.dtype)
    flops = 3 * unique_nodes * estimate.model_sizes(tower_shapes(config.model_name), config).fusion_flops
    figures |= {
        "fraction of the stored step: fusion and optimizer": median(
            f / w for f, w in zip(fusion, _totals(stored), strict=True)
        ),
        "fraction of the stored step: waiting for data": median(
            t["data"] / w for t, w in zip(stored, _totals(stored), strict=True)
        ),
        "unique nodes per step": unique_nodes,
        "matrix product, GFLOP/s": speed / 1e9,
        "fraction that the fusion reaches": flops / median(fusion) / speed,
    }
    return {f"{_name(precision)}: {name}": value for name, value in figures.items()}
