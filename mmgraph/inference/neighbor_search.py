"""The nodes nearest to a node, or to a text or an image that is not in the graph: exact, by cosine similarity."""

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
from mmgraph.data.edge_table import EdgeTable
from mmgraph.data.graph import load_edges
from mmgraph.data.node_table import NodeTable
from mmgraph.data.split import HeldOut
from mmgraph.distributed.collectives import on_main_process, raise_on_all_ranks
from mmgraph.errors import UserError
from mmgraph.inference.embeddings import embed_all_nodes, normalize_rows
from mmgraph.inference.pretrained import Inference, open_checkpoint, run_settings
from mmgraph.towers.clip import has_random_weights
from mmgraph.utils.log import log
from mmgraph.utils.text_table import text_table

EDGE_CHUNK = 1 << 20
MAX_NAMES = 20_000  # that are compared for a misspelt one
CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f]")
SHOWN = 5  # nodes that an error names


class Match(NamedTuple):
    """A node, and how near it is."""

    row: int
    similarity: float  # cosine


class Query(NamedTuple):
    """What is asked for: a node of the graph by id or name; or a text, an image file, or both, of a new one.

    As text, of a new one.
    """

    node: str | None = None
    text: str | None = None
    image: str | None = None

    def __str__(self) -> str:
        return " and ".join(
            part for part in (self.text and f"text '{self.text}'", self.image and f"image {self.image}") if part
        )


def query_of(node: str | None, text: str | None, image: str | None) -> Query:
    """A query of flags. Raises :class:`UserError` where they ask for nothing, or for two things."""
    if node is not None and (text is not None or image is not None):
        raise UserError("--node is a node of the graph, --text and --image are a new one's: give one of the two")
    if node is None and text is None and image is None:
        raise UserError("nearest to what? give --node NAME; or --text TEXT, --image FILE, or both, of a new node")
    for flag, value in (("node", node), ("text", text), ("image", image)):
        if value is not None and not value.strip():
            raise UserError(f"--{flag} is empty")
        if value is not None and value != value.encode(errors="replace").decode():
            raise UserError(f"--{flag} {value!r}: is not UTF-8")
    return Query(node, text, image)


def nearest_neighbors(
    vectors: np.ndarray, queries: np.ndarray, count: int, own: Sequence[int | None]
) -> list[list[Match]]:
    """The ``count`` nearest of N nodes to each of Q queries, best first, and equal ones in the order of the table.

    Which of those that are equal to the last are left out is not said.

    Args:
        vectors: (N, d) float32, of unit length.
        queries: (Q, d) float32, of unit length.
        own: the row of each query, which is no answer; None of one that is no node.
    """
    asked = min(len(vectors), count + 1)
    search = NearestNeighbors(n_neighbors=asked, algorithm="brute").fit(vectors)  # of unit vectors: the order of cosine
    found = search.kneighbors(queries, return_distance=False)  # (Q, asked)
    matches = []
    for query, rows, row_of_query in zip(queries, found, own, strict=True):
        # A product of matrices would sum equal rows in different orders.
        similarities = np.einsum("nd,d->n", vectors[rows].astype(np.float64), query.astype(np.float64)).clip(-1, 1)
        order = np.lexsort((rows, -similarities))
        ranked = [Match(int(rows[i]), float(similarities[i])) for i in order if rows[i] != row_of_query]
        matches.append(ranked[:count])
    return matches


def find_node(nodes: NodeTable, name: str) -> int:
    """The row of the node with this ``node_id``, else of the one with this ``short_name``.

    Raises:
        UserError: there is none, or several nodes have the name.
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
            f"--node '{name}': {len(rows):,} nodes have this short_name; give the node_id of one: {shown}"
            + (", ..." if len(rows) > SHOWN else "")
        )
    like = [f"'{name_of(nodes, row)}' ({ids[row]})" for row in _alike(ids, names, name)]
    hint = f"; did you mean {' or '.join(like)}?" if like else ""
    raise UserError(f"--node '{name}': no node has this node_id or short_name{hint}")


def _text(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """A column as text: an Arrow table may have ids of any type."""
    return column if pa.types.is_string(column.type) else column.cast(pa.large_string())


def _alike(ids: pa.ChunkedArray, names: pa.ChunkedArray, name: str) -> list[int]:
    """Up to three rows whose ids or names hold the name, or whose names are spelt alike."""
    same = _where(pc.equal(pc.utf8_lower(names), name.lower()))[:3]
    if len(same):
        return [int(row) for row in same]
    held = [_where(pc.match_substring(column, name, ignore_case=True))[:3] for column in (ids, names)]
    rows = np.unique(np.concatenate(held))[:3]
    if not len(rows):
        known = names.slice(0, MAX_NAMES).to_pylist()
        close = get_close_matches(name, [text for text in known if text], 3)
        rows = np.array([known.index(text) for text in close], int)
    return [int(row) for row in rows]


def _where(mask: pa.ChunkedArray) -> np.ndarray:
    return np.flatnonzero(pc.fill_null(mask, False).to_numpy())


class Links:
    """Which nodes some nodes have edges with.

    Args:
        rows: the nodes.
        trained: the edges that were trained on.
        held_out: the edges that were not.
    """

    def __init__(self, rows: Sequence[int], trained: EdgeTable | np.ndarray, held_out: HeldOut | None):
        chosen = np.unique(np.array(rows, np.int64))
        self.pairs = {"held out": set[tuple[int, int]](), "trained": set[tuple[int, int]]()}
        for start in range(0, len(trained), EDGE_CHUNK):
            self._add("trained", trained[np.arange(start, min(start + EDGE_CHUNK, len(trained)))], chosen)
        if held_out is not None:
            self._add("held out", held_out.rows, chosen)

    def _add(self, kind: str, edges: np.ndarray, chosen: np.ndarray) -> None:
        for source, destination in edges[np.isin(edges, chosen).any(axis=1)].tolist():
            self.pairs[kind] |= {(source, destination), (destination, source)}

    def between(self, one: int, other: int) -> str:
        """``trained`` or ``held out``, as the edge between two nodes is; empty where there is none."""
        return next((kind for kind in ("trained", "held out") if (one, other) in self.pairs[kind]), "")


def name_of(nodes: NodeTable, row: int) -> str:
    """A node's ``short_name``, else its id."""
    return name_in(nodes[row], id_of(nodes, row))


def id_of(nodes: NodeTable, row: int) -> str:
    """A node's id as text."""
    return str(nodes.ids([row])[0])


def name_in(node: Mapping[str, Any], node_id: str) -> str:
    """:func:`name_of` of a row that was read."""
    name = node.get("short_name")
    shown = plain(name) if isinstance(name, str) else ""
    return shown or plain(node_id)


def plain(text: str) -> str:
    """A text on one line, without what would steer a terminal."""
    return " ".join(CONTROL.sub(" ", text).split())


def load_links(rows: Sequence[int], inference: Inference, config: Config) -> Links | None:
    """The edges of some nodes; None where the edge table is not there any more."""
    try:
        edges = load_edges(config, inference.nodes, inference.nodes_fingerprint)
    except UserError as error:
        log(f"edges are not shown: {error}")
        return None
    return Links(rows, edges.rows, edges.held_out)


def resolve_query(query: Query, inference: Inference, kind: str) -> int | np.ndarray:
    """The row of a query's node, or the unit vector (d,) of a new one.

    Raises:
        UserError: as :func:`find_node` and :meth:`Inference.embed_new`.
    """
    if query.node is not None:
        return find_node(inference.nodes, query.node)
    return normalize_rows(inference.embed_new(query.text, query.image)[kind][None])[0]


def embeddings_folder(checkpoint: Path) -> Path:
    """The folder that a checkpoint's embeddings are kept in: of its run, else beside the file."""
    folder = checkpoint.parent.parent if run_settings(checkpoint) else checkpoint.parent
    return folder / "embeddings"


def neighbors(checkpoint: Path, config: Config, accelerator: Accelerator, query: Query, kind: str, count: int) -> None:
    """Print the nodes nearest to a query. Called by all ranks.

    Args:
        checkpoint: an epoch or final file, of mmgraph or the original.
        kind: of embeddings.
        count: how many.

    Raises:
        UserError: no such node, no such image; as :func:`mmgraph.inference.pretrained.open_checkpoint`.
    """
    inference = open_checkpoint(checkpoint, config, accelerator)
    wanted = raise_on_all_ranks(accelerator, lambda: resolve_query(query, inference, kind))  # before all are embedded
    found = embed_all_nodes(inference, config, accelerator, kind, embeddings_folder(checkpoint))

    def show() -> None:
        row, vector = (wanted, found.vectors[wanted]) if isinstance(wanted, int) else (None, wanted)
        [matches] = nearest_neighbors(found.vectors, vector[None], count, [row])
        links = None if row is None else load_links([row], inference, config)
        if row is None and not (query.text and query.image):
            log(f"without {'an image: a black picture' if query.text else 'a text: one space'} stands in for it")
        if row is None and has_random_weights(config.model_name):
            log("the towers are untrained stand-ins with random weights: they know nothing of a new text or image")
        log(_title(query, row, inference.nodes, checkpoint, kind))
        for line in _table(matches, inference.nodes, row, links):
            log(line)

    on_main_process(accelerator, show)


def _title(query: Query, row: int | None, nodes: NodeTable, checkpoint: Path, kind: str) -> str:
    asked = str(query) if row is None else f"'{name_of(nodes, row)}' ({id_of(nodes, row)})"
    return f"nearest to {asked} among {len(nodes):,} nodes, by cosine similarity of {kind} ({checkpoint})"


def _table(matches: Sequence[Match], nodes: NodeTable, row: int | None, links: Links | None) -> list[str]:
    header = ("#", "similarity", *(("edge",) if links else ()), "node_id", "name")
    cells = [header]
    for place, match in enumerate(matches, 1):
        edge = (links.between(int(row), match.row) or "-",) if links and row is not None else ()
        node_id = plain(id_of(nodes, match.row))
        cells.append((str(place), f"{match.similarity:.4f}", *edge, node_id, name_of(nodes, match.row)))
    # Numbers to the right, words to the left. The name is last and is not padded: its script may have wide characters.
    return text_table(cells, ">>" + "<" * (len(header) - 3) + "-")
