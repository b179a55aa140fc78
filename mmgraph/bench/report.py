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
    print("\n" + as_text(title, rows, figures))
    if path is not None:
        content = {"title": title, "rows": list(rows), "figures": dict(figures), "machine": machine()}
        with explain_disk_errors(path, "set --json to a file in an existing folder with free disk space"):
            write_durably(path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + "\n"))
        print(f"wrote the results to {path}")


def as_text(title: str, rows: Sequence[Row], figures: Row) -> str:
    """Return a title, a table of the rows, and the figures below it, as :func:`report` prints them."""
    columns = list(rows[0])
    cells = [columns, *([shown(row[column]) for column in columns] for row in rows)]
    table = text_table(cells, "<" + ">" * (len(columns) - 1))
    return "\n".join([title, *table, *(f"{name}: {shown(value)}" for name, value in figures.items())])


def shown(value: Any) -> str:
    """Format a value for a table."""
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return f"{value:,}" if isinstance(value, int) else str(value)
