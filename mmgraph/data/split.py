"""Edges to evaluate on: split off the run's own by seed, or a table of their own."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import pandas as pd

from mmgraph.data.edge_table import EdgeTable, EdgeWriter, RemainingEdges
from mmgraph.data.node_table import NodeTable
from mmgraph.data.readers import fingerprint
from mmgraph.data.sampler import permuted
from mmgraph.data.table_cache import FORMAT, Edges, convert_once, open_edges
from mmgraph.errors import UserError
from mmgraph.utils.files import save_array
from mmgraph.utils.log import log

SPLIT_EPOCH = 0  # of the permutation that pairs are drawn in; training's epochs begin at 1


class HeldOut(NamedTuple):
    """Edges that are not trained on."""

    rows: np.ndarray  # (M, 2) int64: rows of source and destination
    relations: np.ndarray | None  # (M,) int64, places in names
    names: list[str]  # of relations
    fingerprint: str  # of what they are


def split(rows: np.ndarray, num_nodes: int, fraction: float, seed: int) -> np.ndarray:
    """Draw edges to hold out: (E,) bool, true for ``fraction`` of them, or as many as can be.

    All edges of a pair of nodes, in either direction, go the same way. Pairs are drawn in an order that depends on the
    seed alone; of each node the pair that comes last in it is kept, so no node is left without an edge to train on.
    Self-loops are kept: there is nothing to predict about them.

    Args:
        rows: (E, 2) int64.
    """
    low, high = rows.min(axis=1), rows.max(axis=1)
    pairs, pair_of_edge, count = np.unique(low * num_nodes + high, return_inverse=True, return_counts=True)  # (P,)
    ends = np.stack([pairs // num_nodes, pairs % num_nodes])  # (2, P)
    turn = permuted(np.arange(len(pairs)), len(pairs), seed, SPLIT_EPOCH)  # when each pair is drawn
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
    path: str | Path, edges: Edges, digests: Sequence[str], num_nodes: int, fraction: float, seed: int
) -> tuple[EdgeTable, RemainingEdges | None, HeldOut]:
    """The edges to train on, their relations, and those held out; split once and kept beside the edge table.

    The relations are read from the edge table, so a split that was kept by an older version has them too.

    Args:
        edges: with the names that their relations are to have.
        digests: the fingerprints of edge and node table.

    Raises:
        UserError: no edge can be held out.
    """
    name = f"split{FORMAT}-{fraction!r}-{seed}-{'-'.join(digest[:16] for digest in digests)}.npy"
    kept = convert_once(path, name, lambda file, target: _write_split(file, target, edges, num_nodes, fraction, seed))
    numbers = np.load(kept.parent / f"{name}.held_out.npy")
    asked = int(fraction * len(edges.rows))
    if len(numbers) < 0.9 * asked:
        log(f"{len(numbers):,} edges are held out, not {asked:,}: more would leave a node without an edge to train on")
    if not len(numbers):
        raise UserError(f"--eval_fraction {fraction:g}: no edge of {path} can be held out; give --eval_edges")
    relations = None if edges.relations is None else edges.relations[numbers]
    held_out = HeldOut(edges.rows[numbers], relations, edges.names, name)
    return EdgeTable(kept), None if edges.relations is None else RemainingEdges(edges.relations, numbers), held_out


def _write_split(file: BinaryIO, target: Path, edges: Edges, num_nodes: int, fraction: float, seed: int) -> None:
    rows = edges.rows[np.arange(len(edges.rows))]
    held_out = split(rows, num_nodes, fraction, seed)
    save_array(target.parent / f"{target.name}.held_out.npy", np.flatnonzero(held_out))
    writer = EdgeWriter(file, num_nodes)
    writer.write(rows[~held_out])
    writer.finish()


def read_held_out(path: str | Path, nodes: NodeTable, nodes_digest: str) -> HeldOut:
    """Edges to evaluate on from a table of their own; those with an end that is no node are counted in the log.

    Raises:
        UserError: as :func:`mmgraph.data.table_cache.open_edges`.
    """
    digest = fingerprint(path)
    edges = open_edges(path, digest, nodes, nodes_digest)
    every = np.arange(len(edges.rows))
    rows, relations = edges.rows[every], None if edges.relations is None else edges.relations[every]
    return HeldOut(rows, relations, relation_names(path, edges.names), digest)


def relation_names(edges_path: str | Path, ids: list[str]) -> list[str]:
    """What ``relations.csv`` beside an edge table calls its relations, by ``rel_id`` or the row; else the ids."""
    if not ids:
        return []
    path = Path(edges_path).parent / "relations.csv"
    try:
        table = pd.read_csv(path, dtype=str, keep_default_na=False)
        known = table["rel_id"] if "rel_id" in table else table.index.astype(str)
        names = dict(zip(known, table["relation"], strict=True))
    except (OSError, ValueError, KeyError):  # none, or a table of something else
        return ids
    found = [names.get(name, name) for name in ids]
    uses = Counter(found)
    return [name if uses[name] == 1 else f"{name} ({own})" for name, own in zip(found, ids, strict=True)]
