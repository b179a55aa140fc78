"""Plain-text tables for the terminal and the log."""

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], alignment: str) -> list[str]:
    """Return the lines of a table, with two spaces between columns.

    Args:
        rows: cells of each row. All rows have the same number of cells, and the first row may be a header.
        alignment: one character per column: ``<`` left, ``>`` right, ``-`` not padded (for a last column of text).
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    columns = [(side, 0 if side == "-" else width) for side, width in zip(alignment, widths, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if side == ">" else cell.ljust(width)
            for cell, (side, width) in zip(row, columns, strict=True)
        )
        for row in rows
    ]
