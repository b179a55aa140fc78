"""Exact search for the nodes nearest to a node, a text or an image, by cosine similarity."""

import re
from collections.abc import Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from accelerate import Accelerator
from sklearn.neighbors import NearestNeighbors

from mmgraph.config import Config
from mmgraph.data.edge_table import EdgeTable, RemainingEdges
from mmgraph.data.node_table import NodeTable
from mmgraph.data.split import HeldOut
from mmgraph.distributed.collectives import on_main_process, raise_on_all_ranks
from mmgraph.errors import UserError
from mmgraph.inference.embeddings import embed_all_nodes, normalize_rows
from mmgraph.inference.pretrained import Inference, open_checkpoint, run_folder
from mmgraph.inference.run_edges import load_run_edges
from mmgraph.towers.clip import has_random_weights
from mmgraph.utils.log import log
from mmgraph.utils.text_table import text_table

EDGE_CHUNK = 1 << 20  # number of edges read at a time
MAX_NAMES = 20_000  # maximum number of names that a misspelled name is compared with
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
SHOWN = 5  # nodes listed in an error message


class Match(NamedTuple):
    """A node and its similarity to the query."""

    row: int
    similarity: float  # cosine


class Query(NamedTuple):
    """A search query.

    For a node of the graph, ``node`` is its id or name. For a new node, ``text``, ``image`` (a file) or both are set.
    ``str(query)`` then describes the new node in messages.
    """

    node: str | None = None
    text: str | None = None
    image: str | None = None

    def __str__(self) -> str:
        return " and ".join(
            part for part in (self.text and f"text '{self.text}'", self.image and f"image {self.image}") if part
        )


def query_of(node: str | None, text: str | None, image: str | None) -> Query:
    """Build a query from the values of the flags ``--node``, ``--text`` and ``--image``.

    Raises:
        UserError: no flag is set, ``node`` is combined with ``text`` or ``image``, or a value is empty or not UTF-8.
    """
    if node is not None and (text is not None or image is not None):
        raise UserError(
            "--node is for a node of the graph, --text and --image are for a new node; set --node alone, or --text, "
            "--image or both"
        )
    if node is None and text is None and image is None:
        raise UserError(
            "no query; for a node of the graph, set --node NAME; for a new node, --text TEXT, --image FILE or both"
        )
    for flag, value in (("node", node), ("text", text), ("image", image)):
        if value is not None and not value.strip():
            raise UserError(f"--{flag} is empty; give a value, or leave the flag out")
        if value is not None and value != value.encode(errors="replace").decode():
            raise UserError(f"--{flag} {value!r}: not valid UTF-8")
    return Query(node, text, image)


def nearest_neighbors(
    vectors: np.ndarray, queries: np.ndarray, count: int, own: Sequence[int | None]
) -> list[list[Match]]:
    """Return the ``count`` nearest of N nodes for each of Q queries, nearest first.

    Equally near nodes are in the order of the node table. If more nodes tie than fit into the last positions, it is
    undefined which of them are returned.

    Args:
        vectors: (N, d) float32, of unit length.
        queries: (Q, d) float32, of unit length.
        own: the row of each query's own node, which is not returned. None if the query is not a node of the graph.
    """
    candidates = min(len(vectors), count + 1)
    # The default metric is Euclidean distance. For unit vectors it gives the same order as cosine similarity.
    search = NearestNeighbors(n_neighbors=candidates, algorithm="brute").fit(vectors)
    nearest = search.kneighbors(queries, return_distance=False)  # (Q, candidates)
    matches = []
    for query, rows, row_of_query in zip(queries, nearest, own, strict=True):
        # einsum is used, because a matrix product may sum equal rows in different orders and so break ties.
        similarities = np.einsum("nd,d->n", vectors[rows].astype(np.float64), query.astype(np.float64)).clip(-1, 1)
        order = np.lexsort((rows, -similarities))
        ranked = [Match(int(rows[i]), float(similarities[i])) for i in order if rows[i] != row_of_query]
        matches.append(ranked[:count])
    return matches


def find_node(nodes: NodeTable, name: str) -> int:
    """Return the row of the node with this ``node_id``, or else of the node with this ``short_name``.

    Raises:
        UserError: no node has the id or name, or several nodes have the name.
    """
    with nodes.column("node_id") as ids, nodes.column("short_name") as names:
        return _find(nodes, _text(ids), _text(names), name)


def _find(nodes: NodeTable, ids: pa.ChunkedArray, names: pa.ChunkedArray, name: str) -> int:
    row = pc.index(ids, pa.scalar(name, ids.type)).as_py()
    if row >= 0:
        return int(row)
    rows = _where(pc.equal(names, pa.scalar(name, names.type)))
    if len(rows) == 1:
        return int(rows[0])
    if len(rows):
        shown = ", ".join(str(ids[int(row)]) for row in rows[:SHOWN])
        raise UserError(
            f"--node '{name}': {len(rows):,} nodes have this short_name; give one node_id: {shown}"
            + (", ..." if len(rows) > SHOWN else "")
        )
    like = [f"'{name_of(nodes, row)}' ({ids[row]})" for row in _alike(ids, names, name)]
    hint = f"; did you mean {' or '.join(like)}?" if like else ""
    raise UserError(f"--node '{name}': no node has this node_id or short_name{hint}")


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column as text, because ids in an Arrow table may be integers."""
    return column if pa.types.is_string(column.type) else column.cast(pa.large_string())


def _alike(ids: pa.ChunkedArray, names: pa.ChunkedArray, name: str) -> list[int]:
    """Return up to three rows that resemble ``name``.

    These are rows whose name differs only in case. If there are none, rows whose id or name contains ``name``. If there
    are none either, rows whose name has a similar spelling.
    """
    same = _where(pc.equal(pc.utf8_lower(names), name.lower()))[:3]
    if len(same):
        return [int(row) for row in same]
    containing = [_where(pc.match_substring(column, name, ignore_case=True))[:3] for column in (ids, names)]
    rows = np.unique(np.concatenate(containing))[:3]
    if not len(rows):
        known = names.slice(0, MAX_NAMES).to_pylist()
        close = get_close_matches(name, [text for text in known if text], 3)
        rows = np.array([known.index(text) for text in close], int)
    return [int(row) for row in rows]


def _where(mask: pa.ChunkedArray) -> np.ndarray:
    return np.flatnonzero(pc.fill_null(mask, False).to_numpy())


class Links:
    """The training edges and held-out edges of some nodes.

    Args:
        rows: rows of the nodes.
        trained: the training edges.
        held_out: the held-out edges; None if there are none.
    """

    def __init__(self, rows: Sequence[int], trained: EdgeTable | RemainingEdges | np.ndarray, held_out: HeldOut | None):
        chosen = np.unique(np.array(rows, np.int64))
        self.pairs = {"held out": set[tuple[int, int]](), "trained": set[tuple[int, int]]()}
        for start in range(0, len(trained), EDGE_CHUNK):
            self._add("trained", trained[np.arange(start, min(start + EDGE_CHUNK, len(trained)))], chosen)
        if held_out is not None:
            self._add("held out", held_out.rows, chosen)

    def _add(self, label: str, edges: np.ndarray, chosen: np.ndarray) -> None:
        for source, destination in edges[np.isin(edges, chosen).any(axis=1)].tolist():
            self.pairs[label] |= {(source, destination), (destination, source)}

    def between(self, left: int, right: int) -> str:
        """Return ``trained`` or ``held out`` for the edge between two nodes; without an edge, an empty string."""
        return next((label for label in ("trained", "held out") if (left, right) in self.pairs[label]), "")


def name_of(nodes: NodeTable, row: int) -> str:
    """Return a node's ``short_name``, or its id if it has no name."""
    return name_in(nodes[row], id_of(nodes, row))


def id_of(nodes: NodeTable, row: int) -> str:
    """Return a node's id as text."""
    return str(nodes.ids([row])[0])


def name_in(node: Mapping[str, Any], node_id: str) -> str:
    """Return what :func:`name_of` returns, from a row of the node table that has already been read."""
    name = node.get("short_name")
    shown = plain(name) if isinstance(name, str) else ""
    return shown or plain(node_id)


def plain(text: str) -> str:
    """Return a text on one line, without terminal control characters."""
    return " ".join(CONTROL.sub(" ", text).split())


def load_links(rows: Sequence[int], inference: Inference, config: Config, folder: Path | None) -> Links | None:
    """Load the edges of some nodes. If that fails, log why and return None.

    Args:
        folder: folder of the checkpoint's run; None if the checkpoint is in no run's folder.
    """
    try:
        edges = load_run_edges(folder, config, inference.nodes, inference.nodes_fingerprint)
        if edges.trained is None:
            raise UserError("it is not known which of the table's edges the run was trained on")
    except UserError as error:
        log(f"edges are not shown: {error}")
        return None
    return Links(rows, edges.trained, edges.held_out)


def resolve_query(query: Query, inference: Inference, embedding: str) -> int | np.ndarray:
    """Return the row of a query's node, or the unit vector (d,) of a new node.

    Args:
        embedding: name of the embedding.

    Raises:
        UserError: see :func:`find_node` and :meth:`Inference.embed_new`. Also if the embedding of the new node is not
            finite.
    """
    if query.node is not None:
        return find_node(inference.nodes, query.node)
    return normalize_rows(inference.embed_new(query.text, query.image)[embedding][None])[0]


def embeddings_folder(checkpoint: Path) -> Path:
    """Return the cache folder for a checkpoint's embeddings.

    It is in the run's folder. If the checkpoint is not in a run's folder, it is beside the checkpoint.
    """
    return (run_folder(checkpoint) or checkpoint.parent) / "embeddings"


def neighbors(
    checkpoint: Path, config: Config, accelerator: Accelerator, query: Query, embedding: str, count: int
) -> None:
    """Print the nodes nearest to a query. Call on all ranks.

    Args:
        checkpoint: an epoch or final file that mmgraph or the original trainer has written.
        embedding: name of the embedding.
        count: number of nodes to print.

    Raises:
        UserError: see :func:`mmgraph.inference.pretrained.open_checkpoint`, :func:`resolve_query` and
            :func:`mmgraph.inference.embeddings.embed_all_nodes`.
    """
    inference = open_checkpoint(checkpoint, config, accelerator)
    # The query is resolved first, so that a wrong query fails before all nodes are embedded.
    target = raise_on_all_ranks(accelerator, lambda: resolve_query(query, inference, embedding))
    embedded = embed_all_nodes(inference, config, accelerator, embedding, embeddings_folder(checkpoint))

    def show() -> None:
        row, vector = (target, embedded.vectors[target]) if isinstance(target, int) else (None, target)
        [matches] = nearest_neighbors(embedded.vectors, vector[None], count, [row])
        links = None if row is None else load_links([row], inference, config, run_folder(checkpoint))
        if row is None and not (query.text and query.image):
            log(f"the query has {'no image, so a black image' if query.text else 'no text, so one space'} is used")
        if row is None and has_random_weights(config.model_name):
            log("the towers have random weights, so the nodes nearest to a new text or image are not meaningful")
        log(_title(query, row, inference.nodes, checkpoint, embedding))
        for line in _table(matches, inference.nodes, row, links):
            log(line)

    on_main_process(accelerator, show)


def _title(query: Query, row: int | None, nodes: NodeTable, checkpoint: Path, embedding: str) -> str:
    description = str(query) if row is None else f"'{name_of(nodes, row)}' ({id_of(nodes, row)})"
    return f"nearest to {description} among {len(nodes):,} nodes, by cosine similarity of {embedding} ({checkpoint})"


def _table(matches: Sequence[Match], nodes: NodeTable, row: int | None, links: Links | None) -> list[str]:
    header = ("#", "similarity", *(("edge",) if links else ()), "node_id", "name")
    cells = [header]
    for position, match in enumerate(matches, 1):
        edge = (links.between(int(row), match.row) or "-",) if links and row is not None else ()
        node_id = plain(id_of(nodes, match.row))
        cells.append((str(position), f"{match.similarity:.4f}", *edge, node_id, name_of(nodes, match.row)))
    # Numbers are right-aligned, text is left-aligned. The name may have wide characters, so it is last and not padded.
    return text_table(cells, ">>" + "<" * (len(header) - 3) + "-")
