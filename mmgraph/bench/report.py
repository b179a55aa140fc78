"""What a bench found: a table on the screen, and JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmgraph.utils.environment import machine
from mmgraph.utils.files import explain_disk_errors, write_durably
from mmgraph.utils.text_table import text_table

Row = Mapping[str, Any]


def report(title: str, rows: Sequence[Row], figures: Row, path: Path | None) -> None:
    """Print rows as a table and the figures below it, and write both, with the machine's description, to ``path``."""
    print(f"\n{title}")
    columns = list(rows[0])
    cells = [columns, *([shown(row[column]) for column in columns] for row in rows)]
    for line in text_table(cells, "<" + ">" * (len(columns) - 1)):
        print(line)
    for name, value in figures.items():
        print(f"{name}: {shown(value)}")
    if path is not None:
        content = {"title": title, "rows": list(rows), "figures": dict(figures), "machine": machine()}
        with explain_disk_errors(path, "give --json a file in a folder that exists and has room"):
            write_durably(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))
        print(f"written: {path}")


def shown(value: Any) -> str:
    """A value as a table has it."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
