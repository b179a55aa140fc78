"""Node and edge tables: read and checked, edges found in the node table, and image paths looked up."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.compute as pc

from mmgraph.data.readers import location, read_chunks
from mmgraph.errors import UserError
from mmgraph.utils.log import log

NODE_COLUMNS = ("node_id", "short_name", "summary", "image_path")
EDGE_COLUMNS = ("src_id", "dst_id")
ID_CHUNK = 10_000_000


def read_nodes(path: str | Path) -> pd.DataFrame:
    """Read a node table. Ids are text, compared exactly (``007`` is not ``7``, ``NA`` is a name).

    Raises:
        UserError: no such file, not a table, a column or an id missing, an id twice; with file and line.
    """
    nodes = _read(path, NODE_COLUMNS, NODE_COLUMNS[:1])
    check_unique(path, pa.chunked_array([pa.array(nodes["node_id"], pa.large_string())]))
    return nodes


def read_edges(path: str | Path) -> pd.DataFrame:
    """Read an edge table (``src_id``, ``dst_id`` and any other columns); errors as :func:`read_nodes`."""
    return _read(path, EDGE_COLUMNS, EDGE_COLUMNS)


def _read(path: str | Path, columns: Sequence[str], id_columns: Sequence[str]) -> pd.DataFrame:
    [table] = read_chunks(path, columns, id_columns)
    return table.to_pandas()


def known_edges(nodes: pd.DataFrame, edges: pd.DataFrame, path: str | Path = "edges") -> np.ndarray:
    """Edges as node rows, without those that have an end outside the node table (counted in the log).

    Returns:
        (E, 2) int64: rows of ``nodes`` for source and destination.

    Raises:
        UserError: no edge has both ends in the node table, or two nodes have one id.
    """
    index = pd.Index(nodes["node_id"])
    if not index.is_unique:
        raise UserError(f"node_id '{index[index.duplicated()][0]}' is used twice; every node needs an id of its own")
    ends = np.stack([index.get_indexer(edges[name]) for name in EDGE_COLUMNS], axis=1).astype(np.int64)
    known = np.all(ends >= 0, axis=1)
    if not known.all():
        first = int(np.argmin(known))
        unknown = edges[EDGE_COLUMNS[0 if ends[first, 0] < 0 else 1]].iloc[first]
        check_dropped(path, len(known) - int(known.sum()), len(known), unknown)
    return ends[known]


def check_dropped(path: str | Path, count: int, total: int, unknown: object) -> None:
    """Log that ``count`` of ``total`` edges have an end that is no node, first ``unknown``; an error if it is all."""
    if count == total:
        raise UserError(f"{path}: no edge has both ends in the node table; the first unknown id is '{unknown}'")
    log(f"{path}: {count:,} of {total:,} edges dropped: an end is not in the node table (first: '{unknown}')")


def check_unique(path: str | Path, ids: pa.ChunkedArray) -> None:
    """Raise :class:`UserError` with the file's two lines where a node has the id of one before it."""
    first = find_ids(ids, ids)
    repeated = first != np.arange(len(ids))
    if repeated.any():
        second = int(repeated.argmax())
        raise UserError(
            f"{location(path, second)}: node_id '{ids[second]}' is already used in "
            f"{location(path, int(first[second]), short=True)}; every node needs an id of its own"
        )


def find_ids(ids: pa.ChunkedArray, wanted: pa.ChunkedArray) -> np.ndarray:
    """The first of ``ids`` that equals each of ``wanted``, (len(wanted),) int64; -1 where none does.

    Both are of one type. The index of 10^7 ids or fewer is in memory while it works, whatever the number of ids.
    """
    rows = np.full(len(wanted), -1, dtype=np.int64)
    for start in range(0, len(ids), ID_CHUNK):
        found = pc.index_in(wanted, value_set=ids.slice(start, ID_CHUNK)).fill_null(-1).to_numpy()
        rows = np.where((rows < 0) & (found >= 0), found + np.int64(start), rows)
    return rows
