"""``bench scale``: one run on N processes against N runs on one each, all with one thread a process."""

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

LEFT_OUT = 3  # first steps of a run: its loader, buffers and threads begin
NODES, EDGES = 640, 20_000  # of the part that is trained on: 64 edges of it have as many distinct nodes as of a graph


def bench_scale(config: Config, largest: int, steps: int, repeats: int, path: Path | None) -> None:
    """Measure and report 1 to ``largest`` processes on this machine; real runs, in turn.

    Each process has ``global_batch_size`` edges: N runs of one process have as much to do as one run of N. What is
    compared is only what the processes of a run cost each other: gathers, reductions, waiting. The runs train on a
    sample of the nodes with edges drawn between them, whose tower store is quickly built.

    Raises:
        UserError: a run fails, with its last line.
    """
    graph = load_graph(config)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        settings = _sample(config, graph, place)
        finish(launch(place, "cache", ["cache", *settings], 1, threads=None), place / "cache.log")
        for count in range(1, largest + 1):
            raise_on_all_ranks, alone = [], []
            for repeat in range(repeats):
                log(f"scale: {count} process(es), round {repeat + 1} of {repeats}")
                runs = [_start(config, settings, place, f"alone-{count}-{repeat}-{i}", 1, steps) for i in range(count)]
                alone.append(sum(_edges_per_s(*run) for run in runs))
                name = f"together-{count}-{repeat}"
                raise_on_all_ranks.append(
                    alone[-1] if count == 1 else _edges_per_s(*_start(config, settings, place, name, count, steps))
                )
            efficiency = statistics.median(a / b for a, b in zip(raise_on_all_ranks, alone, strict=True))
            rows.append(
                {
                    "processes": count,
                    "one run, edges/s": statistics.median(raise_on_all_ranks),
                    "as many runs, edges/s": statistics.median(alone),
                    "efficiency": efficiency,
                }
            )
    first = rows[0]["one run, edges/s"]
    rows = [{**row, "against one": row["one run, edges/s"] / first} for row in rows]
    device = "cuda" if torch.cuda.is_available() else "cpu"
    report(f"scale: {config.global_batch_size} edges a process, {device}, medians of {repeats}", rows, {}, path)


def _sample(config: Config, graph: Graph, folder: Path) -> list[str]:
    """Write a small graph of some of the nodes, and return the flags of a run on it."""
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
    """Launch a run of some steps in a folder of its own."""
    output, edges = folder / name, config.global_batch_size * processes
    own = [f"--global_batch_size={edges}", f"--output_dir={output}", f"--max_steps={steps}", "--report_to=none",
           "--resume=never", "--save_every=0"]  # fmt: skip
    return launch(folder, name, [*settings, *own], processes, threads=1), output, edges


def _edges_per_s(process: Any, output: Path, edges: int) -> float:
    finish(process, output.with_suffix(".log"))
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["edges_per_s"] for row in rows[LEFT_OUT:])
