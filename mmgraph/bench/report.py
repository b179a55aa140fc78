"""Prints the results of a benchmark as a table and writes them as JSON."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmgraph.utils.environment import machine
from mmgraph.utils.files import explain_disk_errors, write_durably
from mmgraph.utils.text_table import text_table

Row = Mapping[str, Any]


def report(title: str, rows: Sequence[Row], figures: Row, path: Path | None) -> None:
    """Print the rows as a table, then the figures below it. Write both to a JSON file.

    Args:
        title: heading of the table.
        rows: the rows, which all have the same columns.
        figures: values to print below the table, by name.
        path: the JSON file, which also describes the machine; None writes no file.

    Raises:
        RunError: the file cannot be written.
    """
    print(f"\n{title}")
    columns = list(rows[0])
    cells = [columns, *([shown(row[column]) for column in columns] for row in rows)]
    for line in text_table(cells, "<" + ">" * (len(columns) - 1)):
        print(line)
    for name, value in figures.items():
        print(f"{name}: {shown(value)}")
    if path is not None:
        content = {"title": title, "rows": list(rows), "figures": dict(figures), "machine": machine()}
        with explain_disk_errors(path, "set --json to a file in an existing folder with free disk space"):
            write_durably(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))
        print(f"wrote the results to {path}")


def shown(value: Any) -> str:
    """Format a value for a table."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
