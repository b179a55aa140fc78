"""Held-out edges for the evaluation: drawn from the run's edges with a seed, or read from a separate table."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pandas as pd

from mmgraph.data.edge_conversion import Edges
from mmgraph.data.edge_table import EdgeTable, EdgeWriter, RemainingEdges
from mmgraph.data.node_table import NodeTable
from mmgraph.data.readers import fingerprint
from mmgraph.data.sampler import permuted
from mmgraph.data.table_cache import FORMAT, open_converted, open_edges
from mmgraph.errors import UserError
from mmgraph.utils.files import save_array
from mmgraph.utils.log import log

SPLIT_EPOCH = 0  # epoch in the key of the permutation that orders the pairs; training epochs start at 1


class HeldOut(NamedTuple):
    """Edges that are held out from training."""

    rows: np.ndarray  # (M, 2) int64, node rows of source and destination
    relations: np.ndarray | None  # (M,) int64, indices into names; None: the edges have no relations
    names: list[str]  # names of the relations
    fingerprint: str  # identifies the set of edges
    relation_ids: Sequence[str] = ()  # ids of the relations in the table of the edges
    numbers: np.ndarray | None = None  # (M,) int64, ascending, numbers among the run's edges; None: from another table


def split(rows: np.ndarray, num_nodes: int, fraction: float, seed: int) -> np.ndarray:
    """Draw edges to hold out.

    All edges between two nodes, in either direction, are held out together or kept together. The pairs of nodes are
    drawn in an order that depends only on their number and the seed. The last pair of each node in this order is kept,
    so that every node keeps an edge to train on. Self-loops are kept, because there is nothing to predict about them.

    Args:
        rows: (E, 2) int64, node rows of source and destination.
        num_nodes: number of nodes.
        fraction: fraction of the edges to hold out.
        seed: seed of the order.

    Returns:
        (E,) bool, true for held-out edges. Pairs are drawn until ``fraction`` is reached or the rest must be kept.
    """
    low, high = rows.min(axis=1), rows.max(axis=1)
    pairs, pair_of_edge, count = np.unique(low * num_nodes + high, return_inverse=True, return_counts=True)  # (P,)
    ends = np.stack([pairs // num_nodes, pairs % num_nodes])  # (2, P)
    turn = permuted(np.arange(len(pairs)), len(pairs), seed, SPLIT_EPOCH)  # position of each pair in the order
    loop = ends[0] == ends[1]
    last = np.full(num_nodes, -1)
    for end in ends:
        np.maximum.at(last, end[~loop], turn[~loop])
    free = ~loop & (turn != last[ends[0]]) & (turn != last[ends[1]])
    drawn = np.flatnonzero(free)[np.argsort(turn[free])]
    drawn = drawn[np.cumsum(count[drawn]) - count[drawn] < fraction * len(rows)]
    held_out = np.zeros(len(pairs), dtype=bool)
    held_out[drawn] = True
    return held_out[pair_of_edge]


def split_edges(
    path: str | Path,
    edges: Edges,
    names: list[str],
    digests: Sequence[str],
    num_nodes: int,
    fraction: float,
    seed: int,
) -> tuple[EdgeTable, RemainingEdges | None, HeldOut]:
    """Split the edges for training and evaluation. The split is computed once and stored beside the edge table.

    The relations are read from the edge table, because a split that an older version stored contains none.

    Args:
        path: the edge table.
        edges: the edges of this table, their relations, and the ids of the relations.
        names: names of the relations.
        digests: fingerprints of the edge table and the node table.
        num_nodes, fraction, seed: as in :func:`split`.

    Returns:
        The edges to train on, their relations (None if the edges have none), and the held-out edges.

    Raises:
        UserError: no edge can be held out.
    """
    name = f"split{FORMAT}-{fraction!r}-{seed}-{'-'.join(digest[:16] for digest in digests)}.npy"

    def load(converted: Path) -> tuple[EdgeTable, np.ndarray]:
        rows, numbers = EdgeTable(converted), np.load(converted.parent / f"{name}.held_out.npy")
        if len(rows) + len(numbers) != len(edges.rows):
            raise ValueError(f"{len(rows):,} + {len(numbers):,} edges instead of {len(edges.rows):,}")
        return rows, numbers

    rows, numbers = open_converted(
        path, name, lambda file, target: _write_split(file, target, edges, num_nodes, fraction, seed), load
    )
    requested = int(fraction * len(edges.rows))
    if len(numbers) < 0.9 * requested:
        log(
            f"{len(numbers):,} edges are held out instead of the requested {requested:,}, because every "
            "node must keep an edge to train on"
        )
    if not len(numbers):
        raise UserError(
            f"--eval_fraction {fraction:g}: no edge of {path} can be held out; set --eval_edges to a separate "
            "edge table instead"
        )
    relations = None if edges.relations is None else edges.relations[numbers]
    held_out = HeldOut(edges.rows[numbers], relations, names, name, edges.names, numbers)
    return (
        rows,
        None if edges.relations is None else RemainingEdges(edges.relations, numbers),
        held_out,
    )


def _write_split(file: BinaryIO, target: Path, edges: Edges, num_nodes: int, fraction: float, seed: int) -> None:
    rows = edges.rows[np.arange(len(edges.rows))]
    held_out = split(rows, num_nodes, fraction, seed)
    save_array(target.parent / f"{target.name}.held_out.npy", np.flatnonzero(held_out))
    writer = EdgeWriter(file, num_nodes)
    writer.write(rows[~held_out])
    writer.finish()


def read_held_out(path: str | Path, nodes: NodeTable, nodes_digest: str) -> HeldOut:
    """Read held-out edges from a separate table.

    Edges with an end that is not in the node table are dropped, and their number is logged.

    Args:
        path: the table of held-out edges.
        nodes: the node table.
        nodes_digest: fingerprint of the node table.

    Raises:
        UserError: as :func:`mmgraph.data.table_cache.open_edges`.
    """
    digest = fingerprint(path)
    edges = open_edges(path, digest, nodes, nodes_digest)
    numbers = np.arange(len(edges.rows))
    rows, relations = edges.rows[numbers], None if edges.relations is None else edges.relations[numbers]
    return HeldOut(rows, relations, relation_names(path, edges.names), digest, edges.names)


def relation_names(edges_path: str | Path, ids: list[str]) -> list[str]:
    """Return the names of an edge table's relations, from the ``relations.csv`` beside it.

    That file has the names in the column ``relation``, and their ids in ``rel_id``. Without ``rel_id``, the id of a
    relation is its row number, from 0. If the file does not exist or cannot be used, the ids are returned. An id
    without a name is used as the name. If several relations have the same name, the id is appended to each of these
    names in parentheses.

    Args:
        edges_path: the edge table.
        ids: ids of the relations in this table.
    """
    if not ids:
        return []
    path = Path(edges_path).parent / "relations.csv"
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        named_ids = table["rel_id"] if "rel_id" in table else table.index.astype(str)
        name_of = dict(zip(named_ids, table["relation"], strict=True))
    except (OSError, ValueError, KeyError):  # no such file, or a table with other columns
        return ids
    names = [name_of.get(relation_id, relation_id) for relation_id in ids]
    uses = Counter(names)
    return [
        name if uses[name] == 1 else f"{name} ({relation_id})" for name, relation_id in zip(names, ids, strict=True)
    ]
