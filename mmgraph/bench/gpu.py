"""``bench gpu``: measures a GPU in a few minutes, in parts that each write their result as soon as they are done."""

import gc
import json
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmgraph.bench import GPU_PARTS
from mmgraph.bench.gpu_parts import measure_evaluation, measure_loss, measure_store
from mmgraph.bench.gpu_profile import profile_steps
from mmgraph.bench.gpu_steps import LOOPS, measure_steps
from mmgraph.bench.gpu_workload import GraphSize, Workload
from mmgraph.bench.report import as_text, report
from mmgraph.config import Config
from mmgraph.errors import RunError, UserError
from mmgraph.utils.environment import machine
from mmgraph.utils.error_text import describe_error
from mmgraph.utils.files import explain_disk_errors, write_durably
from mmgraph.utils.log import log

TABLES, ERRORS = "gpu.txt", "gpu_errors.txt"

Result = tuple[list[dict[str, Any]], dict[str, Any]]  # rows and figures of a part


class Sizes(NamedTuple):
    """The sizes that ``bench gpu`` measures."""

    edges: list[int]  # edges per step
    loss_edges: list[int]  # edges of the losses
    store_nodes: int
    eval_nodes: int
    real_towers: bool  # whether the towers have the size of ViT-B/32; otherwise they are those of the demo


def bench_gpu(
    config: Config,
    sizes: Sizes,
    parts: Sequence[str],
    out: Path,
    folder: Path | None,
    device: str,
    precision: str,
) -> None:
    """Measure the parts that ``out`` lacks. Write ``gpu_<part>.json`` after each part, and all tables to ``gpu.txt``.

    An error in a part is logged and written to ``gpu_errors.txt``, and the next part starts.

    Args:
        config: settings of a run. The benchmark replaces its tables, towers and store with generated ones.
        sizes: what to measure.
        parts: names among :data:`mmgraph.bench.GPU_PARTS`.
        out: folder for the results. The results that it contains are not measured again.
        folder: folder for the generated graph and its store, so that a later start can use them. None uses a temporary
            folder.
        device: ``"cuda"`` or ``"cpu"``.
        precision: Accelerate's mixed precision: ``no``, ``bf16`` or ``fp16``.

    Raises:
        UserError: there is no CUDA device, or a folder cannot be used.
        RunError: a part failed. The other parts were measured.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "bench gpu: this machine has no CUDA device that torch can use; set --device cpu to measure the CPU"
        )
    start = time.perf_counter()
    with explain_disk_errors(out, "set --out to another folder"):
        out.mkdir(parents=True, exist_ok=True)
    open_parts = [part for part in GPU_PARTS if part in parts and not _path(out, part).exists()]
    for part in (part for part in GPU_PARTS if part in parts and part not in open_parts):
        log(f"{part}: skipped, because {_path(out, part)} has its result; remove this file to measure it again")
    failed = []
    with tempfile.TemporaryDirectory() if folder is None else nullcontext(folder) as used, _fast_collections():
        Path(used).mkdir(parents=True, exist_ok=True)
        size = GraphSize(max(sizes.edges), sizes.store_nodes, sizes.real_towers)
        work = Workload(config, size, Path(used), device, precision) if open_parts else None
        for part in open_parts:
            assert work is not None
            begin = time.perf_counter()
            log(f"{part}: started after {begin - start:.0f} s")
            try:
                rows, figures = _measures(work, sizes)[part]()
                figures["time of this part, s"] = time.perf_counter() - begin
                report(_title(part, sizes, work), rows, figures, _path(out, part))
            except Exception as error:  # the machine may be available only now, so the other parts go on
                failed.append(f"{part} ({describe_error(error)})")
                log(f"{part}: failed: {describe_error(error)}")
                with (out / ERRORS).open("a") as file:
                    file.write(f"{part}\n{traceback.format_exc()}\n")
            _write_tables(out)
            work.free()
    log(f"{out / TABLES} has all tables; {time.perf_counter() - start:.0f} s")
    if failed:
        raise RunError(
            f"bench gpu: failed parts: {'; '.join(failed)}; see {out / ERRORS}, and start again to repeat them"
        )


@contextmanager
def _fast_collections() -> Iterator[None]:
    """Exclude the objects of the imported modules from garbage collections, which run after each row of a table."""
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _path(out: Path, part: str) -> Path:
    return out / f"gpu_{part}.json"


def _measures(work: Workload, sizes: Sizes) -> dict[str, Callable[[], Result]]:
    return {
        "steps": lambda: measure_steps(work, sizes.edges),
        "profile": lambda: profile_steps(work, sizes.edges),
        "loss": lambda: measure_loss(work, sizes.loss_edges),
        "store": lambda: measure_store(work, sizes.store_nodes),
        "evaluation": lambda: measure_evaluation(work, sizes.eval_nodes),
    }


def _title(part: str, sizes: Sizes, work: Workload) -> str:
    precision = {"no": "float32"}.get(work.accelerator.mixed_precision, work.accelerator.mixed_precision)
    device = torch.cuda.get_device_name(work.device) if work.device.type == "cuda" else "CPU"
    title = {
        "steps": f"{precision}; edges/s and ms from loops without waits (medians of {LOOPS}), phases in ms from steps "
        "that wait after each phase",
        "profile": f"{precision}; one step with stored tokens in device memory",
        "loss": "float32; InfoNCE, forward and backward; parts: in chunks",
        "store": f"float32; build of a tower store of {sizes.store_nodes:,} nodes",
        "evaluation": f"float32; seconds, {sizes.eval_nodes:,} nodes, which share the texts and images of a store of "
        f"{len(work.graph.nodes):,}",
    }[part]
    return f"{part}: {device}, {title}"


def _write_tables(out: Path) -> None:
    """Write the tables of all results in ``out`` to one text file."""
    paths = [path for part in GPU_PARTS if (path := _path(out, part)).exists()]
    results = [json.loads(path.read_text()) for path in paths]
    texts = [as_text(result["title"], result["rows"], result["figures"]) for result in results]
    content = "\n\n".join([*texts, f"machine: {json.dumps(machine())}"]) + "\n"
    with explain_disk_errors(out, "free disk space"):
        write_durably(out / TABLES, lambda path: path.write_text(content))
