"""``bench scale``: one run on N processes against N runs on one each, all with one thread a process."""

import dataclasses
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from mmgraph.bench.report import report
from mmgraph.config import Config
from mmgraph.errors import UserError
from mmgraph.text_log import log

LEFT_OUT = 3  # first steps of a run: its loader, buffers and threads begin
TRAIN = "from mmgraph.cli import train_main\nraise SystemExit(train_main())\n"


def bench_scale(config: Config, largest: int, steps: int, repeats: int, path: Path | None) -> None:
    """Measure and report 1 to ``largest`` processes on this machine; real runs, in turn.

    Each process has ``global_batch_size`` edges: N runs of one process have as much to do as one run of N. What is
    compared is only what the processes of a run cost each other: gathers, reductions, waiting.

    Raises:
        UserError: a run fails, with its last line.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        (place / "train.py").write_text(TRAIN)
        for count in range(1, largest + 1):
            together, alone = [], []
            for repeat in range(repeats):
                log(f"scale: {count} process(es), round {repeat + 1} of {repeats}")
                runs = [_start(config, place, f"alone-{count}-{repeat}-{i}", 1, steps) for i in range(count)]
                alone.append(sum(_edges_per_s(*run) for run in runs))
                together.append(_edges_per_s(*_start(config, place, f"together-{count}-{repeat}", count, steps)))
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
    report(f"scale: {config.global_batch_size} edges a process, {device}, medians of {repeats}", rows, {}, path)


def _start(config: Config, folder: Path, name: str, processes: int, steps: int) -> tuple[Any, Path, int]:
    """Launch a run of some steps in a folder of its own."""
    output = folder / name
    edges = config.global_batch_size * processes
    settings = {
        **dataclasses.asdict(config),
        "global_batch_size": edges,
        "output_dir": str(output),
        "max_steps": steps,
        "report_to": "none",
        "resume": "never",
        "save_every": 0,
        "demo": False,
    }
    flags = [f"--{key}={value}" for key, value in settings.items() if value is not None]
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(folder / "train.py"), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    log_file = (folder / f"{name}.log").open("w")
    return subprocess.Popen(command, env=environment, stdout=log_file, stderr=subprocess.STDOUT), output, edges


def _edges_per_s(process: Any, output: Path, edges: int) -> float:
    if process.wait() != 0:
        lines = output.with_suffix(".log").read_text().splitlines()
        said = [line for line in lines if line.startswith("mmgraph: error:")] or lines[-1:]
        raise UserError(f"bench scale: a run failed: {said[0]}")
    rows = [json.loads(line) for line in (output / "metrics.jsonl").read_text().splitlines()]
    return statistics.median(row["edges_per_s"] for row in rows[LEFT_OUT:])
