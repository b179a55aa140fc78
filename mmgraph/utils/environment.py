"""What a run or a bench ran on: processor, GPU, processes, versions."""

import json
import platform
import time
from collections.abc import Iterable
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator

import mmgraph
from mmgraph.utils.files import write_durably

FILE = "environment.json"
PACKAGES = ("mmgraph", "torch", "torchvision", "transformers", "accelerate", "deepspeed")


def machine() -> dict[str, Any]:
    """Of this process: processor, threads, GPU, versions of what computes, and the time (UTC)."""
    model, info = "", Path("/proc/cpuinfo")
    if info.exists():
        model = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), "")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": model or platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {"python": platform.python_version(), **versions(PACKAGES)},
    }


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Versions of those packages that are installed, and of mmgraph, which also runs from a checkout."""
    found = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            found[name] = mmgraph.__version__ if name == "mmgraph" else version(name)
    return found


def record_start(folder: Path, accelerator: Accelerator, step: int) -> None:
    """Add a start of a run to its ``environment.json``: a list, one entry for each start.

    Args:
        step: that the start goes on from.
    """
    started = {
        "from_step": step,
        "processes": accelerator.num_processes,
        "distributed_type": accelerator.distributed_type.value,
        "mixed_precision": accelerator.mixed_precision,
        **machine(),
    }
    content = json.dumps([*read_starts(folder), started], indent=1)
    write_durably(folder / FILE, lambda path: path.write_text(content, encoding="utf-8"))


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """The starts of a run, as far as they were noted."""
    with suppress(OSError, ValueError, RecursionError):
        starts = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if isinstance(starts, list):
            return [start for start in starts if isinstance(start, dict)]
    return []
