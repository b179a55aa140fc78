"""Converts edge tables to files that can be memory-mapped, and loads these files.

See :mod:`mmgraph.data.table_cache` for the files.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mmgraph.data.bits import BitWriter
from mmgraph.data.edge_table import EdgeTable, EdgeWriter
from mmgraph.data.node_table import NodeTable
from mmgraph.data.tables import EDGE_COLUMNS, check_dropped, find_ids
from mmgraph.utils.files import save_array, write_durably
from mmgraph.utils.log import log

RELATION = "rel_id"
EDGE_CHUNK = 1 << 20  # minimum number of edges whose node ids are looked up at a time


class Edges(NamedTuple):
    """The edges that have both ends in the node table, in the order of the edge table."""

    rows: EdgeTable  # (E, 2) node rows of source and destination
    relations: EdgeTable | None  # (E,) indices into names; None: the table has no relations
    names: list[str]  # names of the relations, from ``rel_id``; empty if the table has none
    table_rows: int  # number of rows of the edge table, including the dropped edges
    known: Path | None  # file with one bit for each row of the edge table: 1 for the edges of ``rows``; None: all are 1


def load_converted_edges(converted: Path) -> tuple[Edges, list[Any]]:
    """Load a converted edge table. Return the edges, and the arguments of ``check_dropped`` about the dropped edges.

    Raises:
        FileNotFoundError, ValueError, KeyError, TypeError: a file is damaged, or an older version lacks it.
    """
    summary = json.loads(converted.with_suffix(".json").read_text())
    relations = EdgeTable(converted.with_suffix(".relations.npy")) if summary["relations"] else None
    rows, (count, total, _) = EdgeTable(converted), summary["dropped"]
    known = converted.with_suffix(".known.npy") if count else None
    if known is not None and not known.is_file():
        raise FileNotFoundError(f"{known.name} is missing")
    if known is not None and np.load(known, mmap_mode="r").shape != ((total + 7) // 8,):
        raise ValueError(f"{known.name} has another number of rows")
    if len(rows) != total - count:
        raise ValueError(f"{len(rows):,} edges instead of {total - count:,}")
    return Edges(rows, relations, summary["relations"], total, known), summary["dropped"]


def write_edges(file: BinaryIO, target: Path, path: str | Path, chunks: Iterator[pa.Table], nodes: NodeTable) -> None:
    """Convert the chunks of an edge table.

    Args:
        file: an empty file for the edges, open for reading and writing.
        target: final path of this file. The other files of the conversion are written beside it.
        path: path of the edge table, for messages.
        chunks: the chunks of the edge table.
        nodes: the node table.

    Raises:
        UserError: no edge has both ends in the node table.
    """
    writer, relations = EdgeWriter(file, len(nodes)), _Relations()
    bits = BitWriter()
    total, unknown = 0, None
    # Each look-up builds the index of the node ids again. With few edges per look-up, this would be most of the work.
    for part in _gathered(chunks, max(EDGE_CHUNK, len(nodes) // 4)):
        both = pa.chunked_array([chunk for name in EDGE_COLUMNS for chunk in part[name].chunks])
        with nodes.column("node_id") as ids:
            ends = find_ids(ids.cast(pa.large_string()), both).reshape(2, -1).T
        known = np.all(ends >= 0, axis=1)
        if unknown is None and not known.all():
            first = int(np.argmin(known))
            unknown = part[EDGE_COLUMNS[0 if ends[first, 0] < 0 else 1]][first].as_py()
        writer.write(ends[known])
        bits.add(known)
        if RELATION in part.column_names:
            relations.add(path, part[RELATION], known)
        total += len(part)
    writer.finish()
    dropped = total - writer.count, total, unknown
    if not writer.count:
        check_dropped(path, *dropped)  # raises, so that the file is discarded
    if dropped[0]:
        save_array(target.with_suffix(".known.npy"), bits.finish())
    names = list(relations.names) if relations.usable else []
    if names:
        save_array(target.with_suffix(".relations.npy"), np.concatenate(relations.codes))
    summary = json.dumps({"dropped": dropped, "relations": names})
    write_durably(target.with_suffix(".json"), lambda temporary: temporary.write_text(summary), shared=True)


class _Relations:
    """Collects the relations of edges chunk by chunk, as numbers. A missing relation gets an empty name."""

    def __init__(self) -> None:
        self.names: dict[str, int] = {}
        self.codes: list[np.ndarray] = []  # int32
        self.usable = True

    def add(self, path: str | Path, column: pa.ChunkedArray, known: np.ndarray) -> None:
        try:
            text = pc.fill_null(column.cast(pa.large_string()), "").combine_chunks()
        except pa.ArrowException:
            if not self.codes:
                log(
                    f"{path}: column '{RELATION}' has type {column.type}, which cannot be converted to text; relations "
                    "are ignored"
                )
            text = pa.array([""] * len(column), pa.large_string())
            self.usable = False
        encoded = text.filter(pa.array(known)).dictionary_encode()
        numbers = [self.names.setdefault(name, len(self.names)) for name in encoded.dictionary.to_pylist()]
        self.codes.append(np.array(numbers, np.int32)[encoded.indices.to_numpy()])


def _gathered(tables: Iterator[pa.Table], rows: int) -> Iterator[pa.Table]:
    """Join the edge columns of the tables into chunks of at least ``rows`` rows. The last chunk may have fewer rows."""
    pending: list[pa.Table] = []
    for table in tables:
        pending.append(table.select([*EDGE_COLUMNS, *[RELATION] * (table.column_names.count(RELATION) == 1)]))
        if sum(map(len, pending)) >= rows:
            yield pa.concat_tables(pending, promote_options="permissive")
            pending = []
    if pending:
        yield pa.concat_tables(pending, promote_options="permissive")
