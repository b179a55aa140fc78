"""``bench study``: what training is worth on held-out edges, by batch size and negatives, against baselines."""

import json
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from tqdm import tqdm

from mmgraph.bench.baselines import Baselines, check_baselines
from mmgraph.bench.report import report
from mmgraph.bench.runs import finish, flags, launch
from mmgraph.config import Config
from mmgraph.data.graph import Graph
from mmgraph.data.split import HeldOut
from mmgraph.errors import UserError
from mmgraph.utils.log import log

_baselines: Baselines  # in a process of the pool
SETTINGS = ("keep", "mask_same", "mask_neighbors")


class Case(NamedTuple):
    """One training run, but for its seed."""

    batch_size: int
    false_negatives: str
    more: str = ""  # other flags


def bench_study(
    config: Config,
    graph: Graph,
    batch_sizes: Sequence[int],
    num_seeds: int,
    variants: Sequence[str],
    at_once: int,
    folder: Path | None,
    path: Path | None,
) -> None:
    """Train and rank the same held-out edges: real runs of ``launch.py``, and baselines on the same edges.

    Each batch size has runs of the three ``--false_negatives``, the first one has the variants too, and each case is
    trained from ``num_seeds`` seeds. MLPs on one vector a node are trained likewise with the same losses and edges,
    and a DistMult on the edges alone.

    Args:
        variants: flags of ``launch.py``, in one string each, of further runs.
        at_once: runs at a time, with one thread each.
        folder: where the runs are kept, and found again by a second start; default: nowhere.

    Raises:
        UserError: no ``--eval_edges``, a flag that the runs do not take, a run that fails.
    """
    if graph.held_out is None or config.eval_fraction:  # which every seed would split otherwise
        raise UserError("bench study ranks the same held-out edges again and again: give --eval_edges (or --demo)")
    check_baselines(config, graph)
    cases = [Case(batch_size, setting) for batch_size, setting in product(batch_sizes, SETTINGS)]
    cases += [Case(batch_sizes[0], setting, more) for more, setting in product(variants, ("keep", "mask_neighbors"))]
    seeds = range(config.seed, config.seed + num_seeds)
    with tempfile.TemporaryDirectory() as temporary:
        place = folder or Path(temporary)
        place.mkdir(parents=True, exist_ok=True)
        trained = _train_all(config, graph, graph.held_out, cases, seeds, at_once, place)
    rows = [_row("untrained", [table["before"] for tables in trained.values() for table in tables])]
    rows += [_fixed_row(name, trained) for name in ("text_only", "image_only", "concat", "random")]
    rows += [_row(_name(case), trained[case]) for case in cases]
    rows += _baseline_rows(config, batch_sizes, seeds, at_once)
    title = f"study: MRR on {len(graph.held_out.rows):,} held-out edges after {config.epochs} epochs, {num_seeds} seeds"
    report(title, rows, {}, path)


def _baseline_rows(config: Config, batch_sizes: Sequence[int], seeds: range, at_once: int) -> list[dict[str, Any]]:
    kinds = [("concat", size, setting) for size, setting in product(batch_sizes, SETTINGS)]
    kinds += [(given, batch_sizes[0], "keep") for given in ("text_only", "image_only", "random")]
    log(f"study: {(len(kinds) + 1) * len(seeds)} baselines")
    # Spawned: a fork would share the threads of this process.
    with ProcessPoolExecutor(at_once, get_context("spawn"), _open_baselines, (config,)) as pool:
        mlps = [[pool.submit(_mlp, *kind, seed) for seed in seeds] for kind in kinds]
        distmults = [pool.submit(_distmult, seed) for seed in seeds]
        rows = [
            _row(f"MLP on {given}, batch {size:,}, {setting}", [future.result() for future in futures])
            for (given, size, setting), futures in zip(kinds, mlps, strict=True)
        ]
        return [*rows, _row("DistMult, told relations", [future.result() for future in distmults])]


def _open_baselines(config: Config) -> None:
    global _baselines
    torch.set_num_threads(1)
    _baselines = Baselines(config)


def _mlp(*kind: Any) -> dict[str, Any]:
    return _baselines.mlp(*kind)


def _distmult(seed: int) -> dict[str, Any]:
    return _baselines.distmult(seed)


def _train_all(
    config: Config, graph: Graph, held_out: HeldOut, cases: Sequence[Case], seeds: range, at_once: int, folder: Path
) -> dict[Case, list[dict[str, Any]]]:
    """The last evaluation of each case's runs, with that before the first step under ``before``."""
    jobs = list(product(cases, seeds))
    settings = flags(config, demo=False)
    finish(launch(folder, "cache", ["cache", *settings], 1, threads=None), folder / "cache.log")
    with ThreadPoolExecutor(at_once) as pool, tqdm(total=len(jobs), unit="run", disable=None) as bar:

        def run(job: tuple[Case, int]) -> dict[str, Any]:
            table = _train(settings, *job, folder)
            steps = config.epochs * (len(graph.rows) // job[0].batch_size)
            if table["held_out"] != held_out.fingerprint or table["step"] != steps:
                raise UserError(f"{folder} holds runs of other edges, or of another length: give another --folder")
            bar.update()
            return table

        tables = dict(zip(jobs, pool.map(run, jobs), strict=True))
    return {case: [tables[case, seed] for seed in seeds] for case in cases}


def _train(settings: list[str], case: Case, seed: int, folder: Path) -> dict[str, Any]:
    name = "-".join(str(part) for part in (case.batch_size, case.false_negatives, seed)) + _slug(case.more)
    output = folder / name
    own = [f"--global_batch_size={case.batch_size}", f"--false_negatives={case.false_negatives}", f"--seed={seed}",
           f"--output_dir={output}", "--run_name=study", "--report_to=none", "--eval_every=0", "--save_every=0",
           *case.more.split()]  # fmt: skip
    finish(launch(folder, name, [*settings, *own], 1, threads=1), folder / f"{name}.log")
    for file in (output / "checkpoints").glob("*_epoch_*.pt"):
        file.unlink()  # of 27 runs or more
    table = json.loads((output / "evaluation.json").read_text())
    with (output / "metrics.jsonl").open() as rows:
        first = json.loads(next(rows))
    before = {kind: {"mrr": first[f"eval/{kind}/mrr"]} for kind in ("z_graph", "fused")}
    return {**table, "before": {"embeddings": before}}


def _slug(flags: str) -> str:
    return "".join(c if c.isalnum() or c in "._" else "-" for c in flags)


def _name(case: Case) -> str:
    return f"batch {case.batch_size:,}, {case.false_negatives}" + (f", {case.more}" if case.more else "")


def _row(name: str, tables: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means and, after ±, standard deviations over seeds."""
    kinds = [table["embeddings"] for table in tables]
    cells = {}
    for kind in ("z_graph", "fused"):
        cells[f"{kind} MRR"] = _spread([values[kind]["mrr"] for values in kinds if kind in values])
    cells["z_graph Hits@10"] = _spread([v["z_graph"]["hits@10"] for v in kinds if "hits@10" in v.get("z_graph", {})])
    for name_, key in (("finds its image", "retrieval"), ("shuffled", "retrieval_shuffled")):
        cells[name_] = _spread([table[key]["r@1"] for table in tables if table.get(key)])
    return {"": name, **cells}


def _fixed_row(kind: str, trained: dict[Case, list[dict[str, Any]]]) -> dict[str, Any]:
    tables = [{"embeddings": {"z_graph": table["embeddings"][kind]}} for tables in trained.values() for table in tables]
    return _row(kind, tables)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"
