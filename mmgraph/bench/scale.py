"""``bench scale``: compares one run of N processes with N runs of one process. Each process has one thread."""

import json
import statistics
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch

from mmgraph.bench.report import report
from mmgraph.bench.runs import finish, flags, launch
from mmgraph.config import Config
from mmgraph.data.graph import Graph, load_graph
from mmgraph.utils.log import log

WARM_UP_STEPS = 3  # first steps of a run; they are not counted, because loader, buffers and threads start in them
# Size of the sample. It is so large that 64 of its edges have about as many unique nodes as 64 edges of a large graph.
NODES, EDGES = 640, 20_000


def bench_scale(config: Config, largest: int, steps: int, repeats: int, path: Path | None) -> None:
    """Measure runs of 1 to ``largest`` processes on this machine, and report their throughput.

    One run of N processes and N simultaneous runs of one process take turns. Each process has ``global_batch_size``
    edges per step, so both variants do the same work. The difference in throughput is the cost of a joint run: gathers,
    reductions and waiting. The runs train on a sample of the nodes with random edges, so that the tower store is built
    quickly.

    Args:
        config: settings of the runs.
        largest: largest number of processes.
        steps: steps per run.
        repeats: number of rounds; each reported value is the median over the rounds.
        path: JSON file to write; None writes no file.

    Raises:
        UserError: a run failed; the message contains the error of the run.
    """
    graph = load_graph(config)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        runs_folder = Path(folder)
        settings = _sample(config, graph, runs_folder)
        finish(launch(runs_folder, "cache", ["cache", *settings], 1, threads=None), runs_folder / "cache.log")
        for count in range(1, largest + 1):
            together, alone = [], []
            for repeat in range(repeats):
                log(f"scale: {count} process(es), round {repeat + 1} of {repeats}")
                runs = [
                    _start(config, settings, runs_folder, f"alone-{count}-{repeat}-{i}", 1, steps) for i in range(count)
                ]
                alone.append(sum(_edges_per_s(*run) for run in runs))
                name = f"together-{count}-{repeat}"
                together.append(
                    alone[-1]
                    if count == 1
                    else _edges_per_s(*_start(config, settings, runs_folder, name, count, steps))
                )
            efficiency = statistics.median(a / b for a, b in zip(together, alone, strict=True))
            rows.append(
                {
                    "processes": count,
                    "one run, edges/s": statistics.median(together),
                    "as many runs, edges/s": statistics.median(alone),
                    "efficiency": efficiency,
                }
            )
    first = rows[0]["one run, edges/s"]
    rows = [{**row, "against one": row["one run, edges/s"] / first} for row in rows]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report(f"scale: {config.global_batch_size} edges per process, {device}, medians of {repeats}", rows, {}, path)


def _sample(config: Config, graph: Graph, folder: Path) -> list[str]:
    """Write a graph of random nodes with random edges between them. Return the flags of a run on this graph."""
    generator = np.random.default_rng(0)
    drawn = generator.permutation(len(graph.nodes))[:NODES]
    nodes = [graph.nodes[int(row)] for row in drawn]
    paths = [graph.images.locate(node) for node in nodes]
    table = pd.DataFrame(
        {
            "node_id": drawn.astype(str),
            "short_name": [node["short_name"] for node in nodes],
            "summary": [node["summary"] for node in nodes],
            "image_path": [str(Path(str(path)).absolute()) if path is not None else "" for path in paths],
        }
    )
    table.to_parquet(folder / "nodes.parquet")
    ends = pd.DataFrame(drawn[generator.integers(0, len(drawn), (EDGES, 2))], columns=["src_id", "dst_id"])
    ends.astype(str).to_parquet(folder / "edges.parquet")
    return flags(
        config,
        nodes=folder / "nodes.parquet",
        edges=folder / "edges.parquet",
        image_root=None,
        demo=False,
        eval_edges=None,
        eval_fraction=0,
        keep_best=None,
        early_stopping_patience=None,
        tower_cache=folder,
    )


def _start(
    config: Config, settings: list[str], folder: Path, name: str, processes: int, steps: int
) -> tuple[Any, Path, int]:
    """Start a run in its own output folder.

    Returns:
        The process, the output folder, and the edges per step of all processes together.
    """
    output, edges = folder / name, config.global_batch_size * processes
    arguments = [f"--global_batch_size={edges}", f"--output_dir={output}", f"--max_steps={steps}", "--report_to=none",
                 "--resume=never", "--save_every=0"]  # fmt: skip
    return launch(folder, name, [*settings, *arguments], processes, threads=1), output, edges


def _edges_per_s(process: Any, output: Path, edges: int) -> float:
    finish(process, output.with_suffix(".log"))
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["edges_per_s"] for row in rows[WARM_UP_STEPS:])
