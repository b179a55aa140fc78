"""``bench study``: measures MRR for several batch sizes and values of ``--false_negatives``, and for baselines."""

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

_baselines: Baselines  # each process of the pool sets its own
SETTINGS = ("keep", "mask_same", "mask_neighbors")  # values of --false_negatives


class Case(NamedTuple):
    """The settings of a training run, without its seed."""

    batch_size: int
    false_negatives: str
    more: str = ""  # additional flags


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
    """Train runs of ``launch.py`` and baselines, and evaluate all of them on the same held-out edges.

    There is a case for each batch size with each of the three values of ``--false_negatives``. Each variant gives
    two cases with the first batch size, one with ``keep`` and one with ``mask_neighbors``. Each case is trained with
    ``num_seeds`` seeds.

    The baselines are MLPs and a DistMult. The MLPs get one text and one image vector per node, and are trained with the
    losses and the edges of the runs. The DistMult is trained on the edges and their relations.

    Args:
        config: settings of the runs.
        graph: the graph; it must have held-out edges.
        batch_sizes: batch sizes in edges.
        num_seeds: number of seeds per case. The first is the seed of ``config``; the others follow it.
        variants: flags of ``launch.py`` for additional runs, one string per variant.
        at_once: number of concurrent runs, with one thread each.
        folder: folder for the runs. A later call with this folder reuses them. None uses a temporary folder.
        path: JSON file to write; None writes no file.

    Raises:
        UserError: ``--eval_edges`` is not set, the baselines cannot be trained, ``folder`` has runs of another study,
            or a run failed, for example because of an unknown flag.
    """
    if graph.held_out is None or config.eval_fraction:  # with --eval_fraction, each seed would hold out other edges
        raise UserError(
            "bench study needs the same held-out edges for all seeds: set --eval_edges or --demo, not --eval_fraction"
        )
    check_baselines(config, graph)
    cases = [Case(batch_size, setting) for batch_size, setting in product(batch_sizes, SETTINGS)]
    cases += [Case(batch_sizes[0], setting, more) for more, setting in product(variants, ("keep", "mask_neighbors"))]
    seeds = range(config.seed, config.seed + num_seeds)
    with tempfile.TemporaryDirectory() as temporary:
        runs_folder = folder or Path(temporary)
        runs_folder.mkdir(parents=True, exist_ok=True)
        trained = _train_all(config, graph, graph.held_out, cases, seeds, at_once, runs_folder)
    rows = [_row("untrained", [table["before"] for tables in trained.values() for table in tables])]
    rows += [_fixed_row(name, trained) for name in ("text_only", "image_only", "concat", "random")]
    rows += [_row(_name(case), trained[case]) for case in cases]
    rows += _baseline_rows(config, batch_sizes, seeds, at_once)
    title = f"study: MRR on {len(graph.held_out.rows):,} held-out edges after {config.epochs} epochs, {num_seeds} seeds"
    report(title, rows, {}, path)


def _baseline_rows(config: Config, batch_sizes: Sequence[int], seeds: range, at_once: int) -> list[dict[str, Any]]:
    settings = [("concat", size, negatives) for size, negatives in product(batch_sizes, SETTINGS)]
    settings += [(source, batch_sizes[0], "keep") for source in ("text_only", "image_only", "random")]
    log(f"study: training {(len(settings) + 1) * len(seeds)} baselines")
    # The processes are not forked. A forked process inherits the locks that other threads hold, but not these threads.
    with ProcessPoolExecutor(at_once, get_context("spawn"), _open_baselines, (config,)) as pool:
        mlps = [[pool.submit(_mlp, *setting, seed) for seed in seeds] for setting in settings]
        distmults = [pool.submit(_distmult, seed) for seed in seeds]
        rows = [
            _row(f"MLP on {source}, batch {size:,}, {negatives}", [future.result() for future in futures])
            for (source, size, negatives), futures in zip(settings, mlps, strict=True)
        ]
        return [*rows, _row("DistMult, with relations", [future.result() for future in distmults])]


def _open_baselines(config: Config) -> None:
    global _baselines
    torch.set_num_threads(1)
    _baselines = Baselines(config)


def _mlp(*settings: Any) -> dict[str, Any]:
    return _baselines.mlp(*settings)


def _distmult(seed: int) -> dict[str, Any]:
    return _baselines.distmult(seed)


def _train_all(
    config: Config, graph: Graph, held_out: HeldOut, cases: Sequence[Case], seeds: range, at_once: int, folder: Path
) -> dict[Case, list[dict[str, Any]]]:
    """Train all runs that ``folder`` does not have yet.

    Returns:
        For each case, a list of the last evaluations of its runs, one per seed. The key ``before`` of an evaluation has
        the MRRs before the first step.
    """
    jobs = list(product(cases, seeds))
    settings = flags(config, demo=False)
    finish(launch(folder, "cache", ["cache", *settings], 1, threads=None), folder / "cache.log")
    with ThreadPoolExecutor(at_once) as pool, tqdm(total=len(jobs), unit="run", disable=None) as bar:

        def run(job: tuple[Case, int]) -> dict[str, Any]:
            table = _train(settings, *job, folder)
            steps = config.epochs * (len(graph.rows) // job[0].batch_size)
            if table["held_out"] != held_out.fingerprint or table["step"] != steps:
                raise UserError(
                    f"{folder}: its runs have other held-out edges or another number of steps; choose another --folder"
                )
            bar.update()
            return table

        tables = dict(zip(jobs, pool.map(run, jobs), strict=True))
    return {case: [tables[case, seed] for seed in seeds] for case in cases}


def _train(settings: list[str], case: Case, seed: int, folder: Path) -> dict[str, Any]:
    name = "-".join(str(part) for part in (case.batch_size, case.false_negatives, seed)) + _slug(case.more)
    output = folder / name
    arguments = [f"--global_batch_size={case.batch_size}", f"--false_negatives={case.false_negatives}",
                 f"--seed={seed}", f"--output_dir={output}", "--run_name=study", "--report_to=none", "--eval_every=0",
                 "--save_every=0", *case.more.split()]  # fmt: skip
    finish(launch(folder, name, [*settings, *arguments], 1, threads=1), folder / f"{name}.log")
    for file in (output / "checkpoints").glob("*_epoch_*.pt"):
        file.unlink()  # these files are not needed, and those of 27 or more runs would take much disk space
    table = json.loads((output / "evaluation.json").read_text())
    with (output / "metrics.jsonl").open() as rows:
        first = json.loads(next(rows))
    before = {name: {"mrr": first[f"eval/{name}/mrr"]} for name in ("z_graph", "fused")}
    return {**table, "before": {"embeddings": before}}


def _slug(flags: str) -> str:
    return "".join(c if c.isalnum() or c in "._" else "-" for c in flags)


def _name(case: Case) -> str:
    return f"batch {case.batch_size:,}, {case.false_negatives}" + (f", {case.more}" if case.more else "")


def _row(name: str, tables: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return a row for the report. Each cell has the mean and the standard deviation over the tables."""
    metrics = [table["embeddings"] for table in tables]
    cells = {}
    for embedding in ("z_graph", "fused"):
        cells[f"{embedding} MRR"] = _spread([values[embedding]["mrr"] for values in metrics if embedding in values])
    cells["z_graph Hits@10"] = _spread([v["z_graph"]["hits@10"] for v in metrics if "hits@10" in v.get("z_graph", {})])
    for column, key in (("finds its image", "retrieval"), ("shuffled", "retrieval_shuffled")):
        cells[column] = _spread([table[key]["r@1"] for table in tables if table.get(key)])
    return {"": name, **cells}


def _fixed_row(embedding: str, trained: dict[Case, list[dict[str, Any]]]) -> dict[str, Any]:
    tables = [
        {"embeddings": {"z_graph": table["embeddings"][embedding]}} for tables in trained.values() for table in tables
    ]
    return _row(embedding, tables)


def _spread(values: Sequence[float]) -> str:
    if not values:
        return ""
    deviation = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.mean(values):.3f} ± {deviation:.3f}"
