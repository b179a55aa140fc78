"""What a bench found: a table on the screen, and JSON."""

import json
import platform
import time
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from mmgraph.files import write_durably

Row = Mapping[str, Any]


def report(title: str, rows: Sequence[Row], figures: Row, path: Path | None) -> None:
    """Print rows as a table and the figures below it, and write both, with the machine's description, to ``path``."""
    print(f"\n{title}")
    columns = list(rows[0])
    cells = [columns, *([shown(row[column]) for column in columns] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        print("  ".join(text.ljust(width) if i == 0 else text.rjust(width) for i, (text, width) in
                        enumerate(zip(row, widths, strict=True))))  # fmt: skip
    for name, value in figures.items():
        print(f"{name}: {shown(value)}")
    if path is not None:
        content = {"title": title, "rows": list(rows), "figures": dict(figures), "machine": machine()}
        write_durably(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))
        print(f"written: {path}")


def shown(value: Any) -> str:
    """A value as a table has it."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)


def machine() -> dict[str, Any]:
    """What the figures were measured on."""
    model = ""
    info = Path("/proc/cpuinfo")
    if info.exists():
        model = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), "")
    return {
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "cpu": model or platform.machine(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "versions": {name: version(name) for name in ("mmgraph", "torch", "torchvision", "transformers")},
    }
