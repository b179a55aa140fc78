"""Reads and checks node and edge tables, and looks up the nodes of edges."""

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
ID_CHUNK = 10_000_000  # ids that find_ids indexes at a time


def read_nodes(path: str | Path) -> pd.DataFrame:
    """Read a node table. Ids are text and are compared exactly: ``007`` is not ``7``, and ``NA`` is an id.

    Raises:
        UserError: the file does not exist or is not a table, a column or an id is missing, or two nodes have the same
            id. The message contains the file and the line.
    """
    nodes = _read(path, NODE_COLUMNS, NODE_COLUMNS[:1])
    check_unique(path, pa.chunked_array([pa.array(nodes["node_id"], pa.large_string())]))
    return nodes


def read_edges(path: str | Path) -> pd.DataFrame:
    """Read an edge table: ``src_id``, ``dst_id`` and any other columns.

    Raises:
        UserError: the file does not exist or is not a table, or a column or an id is missing. The message contains the
            file and the line.
    """
    return _read(path, EDGE_COLUMNS, EDGE_COLUMNS)


def _read(path: str | Path, columns: Sequence[str], id_columns: Sequence[str]) -> pd.DataFrame:
    [table] = read_chunks(path, columns, id_columns)
    return table.to_pandas()


def known_edges(nodes: pd.DataFrame, edges: pd.DataFrame, path: str | Path = "edges") -> np.ndarray:
    """Return edges as node rows. Drop edges with an end that is not in the node table, and log their number.

    Args:
        nodes: the node table.
        edges: the edge table.
        path: name of the edge table in messages.

    Returns:
        (E, 2) int64, rows of ``nodes`` for source and destination.

    Raises:
        UserError: no edge has both ends in the node table, or two nodes have the same id.
    """
    index = pd.Index(nodes["node_id"])
    if not index.is_unique:
        raise UserError(
            f"node_id '{index[index.duplicated()][0]}' is used more than once; every node needs a unique id"
        )
    ends = np.stack([index.get_indexer(edges[name]) for name in EDGE_COLUMNS], axis=1).astype(np.int64)
    known = np.all(ends >= 0, axis=1)
    if not known.all():
        first = int(np.argmin(known))
        unknown = edges[EDGE_COLUMNS[0 if ends[first, 0] < 0 else 1]].iloc[first]
        check_dropped(path, len(known) - int(known.sum()), len(known), unknown)
    return ends[known]


def check_dropped(path: str | Path, count: int, total: int, unknown: object) -> None:
    """Log the number of edges that were dropped because an end is not in the node table.

    Args:
        path: name of the edge table in messages.
        count: number of dropped edges.
        total: number of all edges.
        unknown: the first id that is not in the node table.

    Raises:
        UserError: all edges were dropped.
    """
    if count == total:
        raise UserError(
            f"{path}: no edge has both ends in the node table; the first unknown id is '{unknown}'; "
            "use the ids of the node table"
        )
    log(
        f"{path}: {count:,} of {total:,} edges dropped: an end is not in the node table (first unknown id: '{unknown}')"
    )


def check_unique(path: str | Path, ids: pa.ChunkedArray) -> None:
    """Raise :class:`UserError` if two nodes have the same id. The message contains the location of both."""
    first = find_ids(ids, ids)
    repeated = first != np.arange(len(ids))
    if repeated.any():
        second = int(repeated.argmax())
        raise UserError(
            f"{location(path, second)}: node_id '{ids[second]}' is already used in "
            f"{location(path, int(first[second]), short=True)}; every node needs a unique id"
        )


def find_ids(ids: pa.ChunkedArray, query: pa.ChunkedArray) -> np.ndarray:
    """Look up ids in a column of ids.

    At most 10^7 of ``ids`` are indexed at a time, so that the index takes limited memory for any number of ids.

    Args:
        ids: the column to search.
        query: ids to look up, of the same type.

    Returns:
        (len(query),) int64, the index of the first equal id in ``ids``, or -1 if there is no equal id.
    """
    rows = np.full(len(query), -1, dtype=np.int64)
    for start in range(0, len(ids), ID_CHUNK):
        indices = pc.index_in(query, value_set=ids.slice(start, ID_CHUNK)).fill_null(-1).to_numpy()
        rows = np.where((rows < 0) & (indices >= 0), indices + np.int64(start), rows)
    return rows
