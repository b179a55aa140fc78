"""What a bench found: a table on the screen, and JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmgraph.utils.environment import machine
from mmgraph.utils.files import write_durably

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
