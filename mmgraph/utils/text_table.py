"""Tables of plain text, for the screen and the log."""

from collections.abc import Sequence


def text_table(rows: Sequence[Sequence[str]], alignment: str) -> list[str]:
    """The lines of a table, with two spaces between columns.

    Args:
        rows: of cells, all of one length; the first may be a header.
        alignment: a character for each column: ``<`` left, ``>`` right, ``-`` not padded, for a last column of text.
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
