"""The part ``profile`` of ``bench gpu``: the kernels of a training step, and the time in which the device is idle."""

import json
import tempfile
from collections import defaultdict
from collections.abc import Sequence
from contextlib import closing
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from torch.profiler import ProfilerActivity, profile

from mmgraph.bench.gpu_steps import LOOPS, WARM_UP, TrainedStep, loop_length, open_source, run_steps
from mmgraph.bench.gpu_workload import NOT_MEASURED, Workload

STEPS = 5  # profiled steps
TOP = 10  # kernels that are listed
NAME = 90  # most characters of a kernel's name
COPIES = ("gpu_memcpy", "gpu_memset")
LAUNCHES = {"cuda": "kernels", "cpu": "operators"}  # name of the first column
COLUMNS = ("copies", "ms", "busy ms", "idle share", "ms, profiled", "idle, profiled")

Cells = tuple[Any, ...]  # the measured cells of a row
Event = dict[str, Any]  # an event of Chrome's trace format: cat, name, ts and dur in microseconds


def profile_steps(work: Workload, sizes: list[int]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Profile the step with stored tokens in device memory, with each number of edges.

    On CUDA, the table has the number of kernels, and of copies and fills of device memory. On the CPU, it has the
    number of calls of ATen operators, with those by other operators, and there is no idle share.

    Args:
        sizes: edges per step.

    Returns:
        The rows of the table, and the figures below it: the kernels or operators that take most time.
    """
    rows, figures = [], dict[str, Any]()
    columns = (LAUNCHES[work.device.type], *COLUMNS)
    figures["idle share"] = "of the step without the profiler, which slows the host down"
    source, _ = open_source(work, "stored, device")
    for edges in sizes:

        def measure(edges: int = edges) -> dict[str, Any]:
            step = TrainedStep(work, edges, source, None)
            with closing(step.batches):  # type: ignore[type-var]
                values, top = _profile(work, step)
            figures.update({f"{edges:,} edges, {name}": text for name, text in top.items()})
            return dict(zip(columns, values, strict=True))

        rows.append(work.row({"edges": edges}, columns, measure))
    return rows, figures


def _profile(work: Workload, step: TrainedStep) -> tuple[Cells, dict[str, str]]:
    run_steps(work, step, WARM_UP[work.device.type])
    length = loop_length(run_steps(work, step, 1))
    seconds = median(run_steps(work, step, length) for _ in range(LOOPS))
    cuda = work.device.type == "cuda"
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if cuda else [])]
    with profile(activities=activities):  # the first profile in a process starts the profiler, which takes seconds
        run_steps(work, step, 1)
    with profile(activities=activities) as profiler:
        profiled = run_steps(work, step, STEPS)
    if not cuda:
        operators = [event for event in profiler.key_averages() if event.key.startswith("aten::")]
        launches = sum(event.count for event in operators) / STEPS
        totals = {event.key: (event.count, event.self_cpu_time_total) for event in operators}
        cells = (launches, NOT_MEASURED, 1000 * seconds, NOT_MEASURED, NOT_MEASURED, 1000 * profiled, NOT_MEASURED)
        return cells, _top(totals)
    with tempfile.TemporaryDirectory() as folder:
        profiler.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text(errors="replace"))["traceEvents"]
    return _device_cells(events, seconds, profiled)


def _device_cells(events: Sequence[Event], seconds: float, profiled: float) -> tuple[Cells, dict[str, str]]:
    """Return the cells of a row and the list of kernels, from the events of :data:`STEPS` steps on a GPU.

    Args:
        events: the events of the trace.
        seconds: seconds of a step without the profiler.
        profiled: seconds of a step with the profiler, which slows the host down.
    """
    kernels = [event for event in events if event.get("cat") == "kernel"]
    copies = [event for event in events if event.get("cat") in COPIES]
    if not kernels:
        raise RuntimeError("the profiler recorded no kernels (is CUPTI available?)")
    busy = busy_microseconds([*kernels, *copies]) / 1e6 / STEPS
    totals = defaultdict[str, tuple[int, float]](lambda: (0, 0.0))
    for event in kernels:
        number, duration = totals[event["name"]]
        totals[event["name"]] = number + 1, duration + event["dur"]
    cells = (
        len(kernels) / STEPS, len(copies) / STEPS, 1000 * seconds, 1000 * busy, max(0.0, 1 - busy / seconds),
        1000 * profiled, max(0.0, 1 - busy / profiled),
    )  # fmt: skip
    return cells, _top(totals)


def busy_microseconds(events: Sequence[Event]) -> float:
    """Return the time in which at least one event runs, so that events on several streams count once."""
    busy, end = 0.0, float("-inf")
    for event in sorted(events, key=lambda event: event["ts"]):
        start, stop = event["ts"], event["ts"] + event["dur"]
        busy += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return busy


def _top(totals: dict[str, tuple[int, float]]) -> dict[str, str]:
    """Describe the kernels or operators that take most time, from their counts and microseconds in all steps."""
    whole = sum(duration for _, duration in totals.values())
    ordered = sorted(totals.items(), key=lambda item: -item[1][1])
    lines = {}
    for place, (name, (number, duration)) in enumerate(islice(ordered, TOP), 1):
        share, milliseconds = duration / whole, duration / STEPS / 1000
        lines[f"{place:2}"] = f"{share:6.1%} {milliseconds:9.3f} ms {number / STEPS:6.1f} times  {name[:NAME]}"
    return lines
