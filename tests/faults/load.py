"""Measure a long run: the memory and open files of each process, and the use of /dev/shm over time.

    python tests/faults/load.py FOLDER --nodes 200000 --edges 2000000 --minutes 30

generates a graph with texts and images, and small towers. It then builds the tower store and trains on two processes.
"""

import argparse
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import psutil
from PIL import Image

sys.path.insert(0, str(Path(__file__).parent.parent))
from conftest import WORDS
from launches import launch_command

from mmgraph.demo.towers import build_towers


class Sample(NamedTuple):
    """Memory and open files of the processes of a run at one time."""

    seconds: float  # since the first step
    resident: list[float]  # MB of each process, the launcher first
    files: list[int]  # open files of each process
    shared: float  # MB in use in /dev/shm


def make_graph(folder: Path, nodes: int, edges: int) -> None:
    """Write a random graph with a fixed seed, its images, and towers."""
    generator = np.random.default_rng(0)
    for part in range((nodes + 999) // 1000):
        (folder / f"images/{part}").mkdir(parents=True)
    pixels = generator.integers(0, 256, (nodes, 6, 6, 3), dtype=np.uint8)
    for row in range(nodes):
        Image.fromarray(pixels[row]).save(folder / f"images/{row // 1000}/{row}.png", compress_level=1)
    words = np.array(WORDS)[generator.integers(len(WORDS), size=(nodes, 8))]
    table = {
        "node_id": [f"n{row}" for row in range(nodes)],
        "short_name": [f"node {row}" for row in range(nodes)],
        "summary": [f"{' '.join(words[row])} {row}" for row in range(nodes)],
        "image_path": [f"images/{row // 1000}/{row}.png" for row in range(nodes)],
    }
    pd.DataFrame(table).to_csv(folder / "nodes.csv", index=False)
    ends = generator.integers(nodes, size=(edges, 2))
    pd.DataFrame({"src_id": ends[:, 0], "dst_id": ends[:, 1]}).astype(str).radd("n").to_csv(
        folder / "edges.csv", index=False
    )
    build_towers(folder / "towers", [*WORDS, "node 0 1 2 3 4 5 6 7 8 9"])


def sampled(command: list[str], output: Path, minutes: float, every: float) -> Iterator[Sample]:
    """Yield samples of a run from its first step on, and stop the run at the end.

    Args:
        command: the command of the run.
        output: the run's output folder.
        minutes: time from the first step to the stop.
        every: seconds between samples.
    """
    with (output.parent / "load.out").open("w") as file:
        process = subprocess.Popen(
            command, stdout=file, stderr=subprocess.STDOUT, env={**os.environ, "OMP_NUM_THREADS": "1"}
        )
    metrics = output / "metrics.jsonl"
    while not (metrics.exists() and metrics.stat().st_size):
        assert process.poll() is None, (output.parent / "load.out").read_text()[-3000:]
        time.sleep(0.2)
    start = time.monotonic()
    launcher = psutil.Process(process.pid)
    while (seconds := time.monotonic() - start) < 60 * minutes:
        assert process.poll() is None, (output.parent / "load.out").read_text()[-3000:]
        processes = [launcher, *sorted(launcher.children(recursive=True), key=lambda child: child.pid)]
        shared = psutil.disk_usage("/dev/shm").used / 1e6
        yield Sample(
            seconds,
            [each.memory_info().rss / 1e6 for each in processes],
            [each.num_fds() for each in processes],
            shared,
        )
        time.sleep(every)
    for rank in launcher.children():
        rank.send_signal(signal.SIGTERM)
    process.wait(120)


def growth(values: list[float]) -> float:
    """Return the median of the last third of a curve minus the median of the third before it."""
    third = len(values) // 3
    return float(np.median(values[-third:]) - np.median(values[-2 * third : -third]))


def load(folder: Path, nodes: int, edges: int, minutes: float, every: float) -> list[Sample]:
    """Train on a generated graph for ``minutes`` minutes, and return samples taken every ``every`` seconds.

    A graph that already exists in the folder is reused.
    """
    if not (folder / "edges.csv").exists():
        make_graph(folder, nodes, edges)
    output = folder / f"run-{time.time_ns()}"
    flags = [
        f"--nodes={folder / 'nodes.csv'}", f"--edges={folder / 'edges.csv'}", f"--model_name={folder / 'towers'}",
        f"--output_dir={output}", "--fused_dim=64", "--proj_dim=64", "--batch_size=128", "--epochs=100000",
        "--save_every=200", "--log_every=200", "--num_workers=1", f"--tower_cache={folder / 'store'}",
        "--report_to=none",
    ]  # fmt: skip
    samples = list(sampled(launch_command("cpu_2proc.yaml", *flags), output, minutes, every))
    steps = [json.loads(line)["step"] for line in (output / "metrics.jsonl").read_text().splitlines()]
    print(f"{steps[-1]:,} steps, {len(samples)} samples")
    return samples


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    for name, number_type in (("nodes", int), ("edges", int), ("minutes", float)):
        parser.add_argument(f"--{name}", type=number_type, required=True)
    arguments = parser.parse_args()
    samples = load(arguments.folder, arguments.nodes, arguments.edges, arguments.minutes, every=5)
    print("minute, resident MB of launcher and ranks, open files of each, MB in /dev/shm")
    step = max(1, len(samples) // 20)
    for sample in [*samples[::step], samples[-1]]:
        resident = " ".join(f"{megabytes:,.1f}" for megabytes in sample.resident)
        print(f"{sample.seconds / 60:5.1f}   {resident}   {' '.join(map(str, sample.files))}   {sample.shared:.2f}")
    columns = list(zip(*(sample.resident for sample in samples), strict=True))
    print("growth of the last third, MB:", " ".join(f"{growth(list(column)):.2f}" for column in columns))


if __name__ == "__main__":
    main()
