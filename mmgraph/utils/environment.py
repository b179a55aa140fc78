"""Hardware, processes and package versions of a run or benchmark."""

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
    """Return this process's processor, threads, GPU and package versions, and the time (UTC)."""
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


def host_memory() -> tuple[int, int]:
    """Return the available and the total memory in bytes. A memory limit of the cgroup lowers both values."""
    lines = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    free, total = (int(lines[name].split()[0]) * 1024 for name in ("MemAvailable", "MemTotal"))
    limit, used = (Path(f"/sys/fs/cgroup/memory.{name}") for name in ("max", "current"))
    if limit.exists() and (maximum := limit.read_text().strip()).isdigit():
        free, total = min(free, int(maximum) - int(used.read_text())), min(total, int(maximum))
    return free, total


def versions(packages: Iterable[str]) -> dict[str, str]:
    """Return the versions of the installed packages among ``packages``.

    The version of mmgraph is read from the module, because mmgraph also runs from a checkout that is not installed.
    """
    installed = {}
    for name in packages:
        with suppress(PackageNotFoundError):
            installed[name] = mmgraph.__version__ if name == "mmgraph" else version(name)
    return installed


def record_start(folder: Path, accelerator: Accelerator, step: int) -> None:
    """Record a start of a run in the run's ``environment.json``, a list with one entry per start.

    Args:
        folder: output folder of the run.
        accelerator: the run's Accelerator.
        step: optimizer step that the run continues from; 0 for a new run.
    """
    entry = {
        "from_step": step,
        "processes": accelerator.num_processes,
        "distributed_type": accelerator.distributed_type.value,
        "mixed_precision": accelerator.mixed_precision,
        **machine(),
    }
    content = json.dumps([*read_starts(folder), entry], indent=1)
    write_durably(folder / FILE, lambda path: path.write_text(content, encoding="utf-8"))


def read_starts(folder: Path) -> list[dict[str, Any]]:
    """Return the recorded starts of a run, or an empty list if ``environment.json`` is missing or invalid."""
    with suppress(OSError, ValueError, RecursionError):
        starts = json.loads((folder / FILE).read_text(encoding="utf-8"))
        if isinstance(starts, list):
            return [start for start in starts if isinstance(start, dict)]
    return []
