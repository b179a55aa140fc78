"""Writes the edges that a run trained on as a table."""

from collections.abc import Iterator
from contextlib import ExitStack
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pyarrow import csv

from mmgraph.data.readers import ARROW, PARQUET, fingerprint, read_chunks
from mmgraph.data.run_split import RunSplit
from mmgraph.data.tables import EDGE_COLUMNS
from mmgraph.errors import UserError
from mmgraph.utils.error_text import one_line
from mmgraph.utils.files import explain_disk_errors, write_durably
from mmgraph.utils.log import log

ROW_CHUNK = 1 << 16  # rows of the edge table in memory at a time


def write_training_edges(split: RunSplit, edges: str | Path, output: Path) -> None:
    """Write the rows of the edge table that a run trained on, with all columns, in the order of the table.

    Args:
        split: the split in the run's folder.
        edges: the run's edge table.
        output: the file to write: ``.csv``, ``.parquet`` or ``.arrow``.

    Raises:
        UserError: ``output`` exists, or its suffix is unknown or its format cannot hold a column of the edge table; or
            the edge table has changed since the run was trained.
        RunError: the file cannot be written.
    """
    if output.suffix not in (*PARQUET, *ARROW, ".csv"):
        raise UserError(f"{output}: unknown format; give a file that ends in .csv, .parquet or .arrow")
    if output.exists():
        raise UserError(f"{output} exists; give the path of a new file")
    if fingerprint(edges) != split.edges_fingerprint:
        raise UserError(
            f"{edges} has changed since the run was trained, so the rows of {split.folder} do not fit it; restore the "
            "table, or set --edges to the run's table"
        )
    try:
        with explain_disk_errors(output, "give a file in an existing folder with free disk space"):
            write_durably(output, lambda temporary: _write(temporary, output.suffix, _training_rows(split, edges)))
    except pa.ArrowException as error:
        reason = one_line(error)
        raise UserError(
            f"{output}: {output.suffix} cannot hold a column of {edges} ({reason}); choose another format"
        ) from None
    log(f"wrote {split.training_edges:,} training edges to {output}")


def _training_rows(split: RunSplit, edges: str | Path) -> Iterator[pa.Table]:
    rows, trained = split.trained_rows(), np.empty(0, bool)
    for table in read_chunks(edges, EDGE_COLUMNS, EDGE_COLUMNS, ROW_CHUNK):
        while len(trained) < len(table):
            trained = np.concatenate([trained, next(rows)])
        yield table.filter(pa.array(trained[: len(table)]))
        trained = trained[len(table) :]


def _decoded(table: pa.Table) -> pa.Table:
    """Return a table whose dictionary-encoded columns, such as pandas' categories, are plain columns."""
    for number, field in enumerate(table.schema):
        if pa.types.is_dictionary(field.type):
            table = table.set_column(number, field.name, table[number].cast(field.type.value_type))
    return table


def _write(path: Path, suffix: str, tables: Iterator[pa.Table]) -> None:
    if suffix in ARROW:  # an Arrow file can hold only one dictionary per column, but each chunk may have its own
        tables = map(_decoded, tables)
    first = next(tables)
    with ExitStack() as stack:
        writer: Any
        match suffix:
            case ".csv":
                writer = csv.CSVWriter(path, first.schema)
            case _ if suffix in PARQUET:
                writer = pq.ParquetWriter(path, first.schema)
            case _:
                writer = pa.ipc.new_file(path, first.schema)
        stack.enter_context(writer)
        for table in chain([first], tables):
            writer.write_table(table)
