"""Prepares the node sections of a report: the map of embeddings, the gallery of nearest nodes, and image status."""

import warnings
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from mmgraph.data.image_source import UNRESOLVED_FILES, ImageSource
from mmgraph.data.images import IMAGE_STATUS, is_incomplete
from mmgraph.data.input_rules import InputRules
from mmgraph.data.node_table import NodeTable
from mmgraph.inference.embeddings import NodeVectors
from mmgraph.inference.neighbor_search import Links, Match, name_in, nearest_neighbors, plain
from mmgraph.report.pictures import thumbnails

MAP_NODES = 2_000  # maximum number of nodes on all maps of a page together
GALLERY_NODES, NEAREST = 12, 8  # nodes in the gallery, and nearest nodes that are shown for each of them
MAP_SIDE, GALLERY_SIDE = 48, 96  # maximum width and height of a node's image, in pixels
EXAMPLES = 3  # nodes listed for each image status, except for complete images
MAX_TEXT_LENGTH = 160  # maximum number of characters of a name, a text or a path on the page
PERPLEXITY = 30.0  # of t-SNE; a small sample needs a lower value
MIN_TSNE_NODES = 8


class Node(NamedTuple):
    """A node on the page."""

    row: int | None  # None if the node is a query that is not in the graph
    node_id: str
    name: str
    text: str
    picture: Image.Image | None


class Neighbor(NamedTuple):
    """A node near a node of the gallery."""

    node: Node
    similarity: float  # cosine
    edge: str  # "trained" or "held out"; empty if there is no edge


class Entry(NamedTuple):
    """A node of the gallery, and the nodes of the graph that are nearest to it."""

    node: Node
    nearest: list[Neighbor]


class StatusCount(NamedTuple):
    """The number of nodes with an image status, and some of these nodes."""

    name: str
    nodes: int
    examples: list[str]  # ids and image references; empty for complete images


class Nodes(NamedTuple):
    """The node sections of a run's report."""

    total: int  # nodes in the graph
    checkpoint: str  # name of the checkpoint that computed the embeddings
    map: list[Node]  # the nodes on the map, in the order of the node table
    positions: np.ndarray  # (len(map), 2): x and y of each node on the map, from 0 to 1
    gallery: list[Entry]
    requested: int  # number of entries that queries requested; they are at the start of the gallery
    edges_known: bool
    mean_similarity: float  # mean cosine similarity of all pairs of different nodes on the map
    image_status: list[StatusCount]
    seed: int


class GalleryQuery(NamedTuple):
    """A gallery entry to build: a node of the graph, or a new node with a name, an image and a vector."""

    row: int | None  # None for a new node
    name: str = ""
    image: str | None = None
    vector: np.ndarray | None = None  # (d,) float32, of unit length


class NodesOfRun(NamedTuple):
    """The nodes of a run and their embeddings."""

    nodes: NodeTable
    images: ImageSource
    embedded: NodeVectors
    rules: InputRules
    seed: int
    checkpoint: str  # name of the checkpoint that computed the embeddings


def show_nodes(
    run_nodes: NodesOfRun,
    queries: Sequence[GalleryQuery],
    load_links: Callable[[Sequence[int]], Links | None],
    max_nodes: int = MAP_NODES,
) -> Nodes:
    """Draw a random sample of nodes for the map, and find the nearest nodes of each node in the gallery.

    Args:
        run_nodes: the nodes of a run.
        queries: nodes to show at the start of the gallery.
        load_links: returns the edges of the nodes with the given rows, or None if the edges are not known.
        max_nodes: maximum number of nodes on the map.
    """
    total = len(run_nodes.nodes)
    drawn = np.random.default_rng(run_nodes.seed).permutation(total)
    sample = np.sort(drawn[:max_nodes])
    others = [
        GalleryQuery(row) for row in _for_gallery(run_nodes, drawn) if row not in [query.row for query in queries]
    ]
    chosen = [*queries, *others[: max(0, GALLERY_NODES - len(queries))]]
    links = load_links([entry.row for entry in chosen if entry.row is not None])
    return Nodes(
        total,
        run_nodes.checkpoint,
        _nodes(run_nodes, sample.tolist(), MAP_SIDE),
        arrange(run_nodes.embedded.vectors[sample], run_nodes.seed),
        _gallery(run_nodes, chosen, links),
        len(queries),
        links is not None,
        _mean_similarity(run_nodes.embedded.vectors[sample]),
        _status_counts(run_nodes),
        run_nodes.seed,
    )


def _mean_similarity(vectors: np.ndarray) -> float:
    """Return the mean cosine similarity of two different rows of (M, d) unit vectors; 1 for a single row."""
    count, total = len(vectors), vectors.sum(axis=0, dtype=np.float64)
    return float(total @ total - count) / (count * (count - 1)) if count > 1 else 1.0


def _for_gallery(run_nodes: NodesOfRun, drawn: np.ndarray) -> list[int]:
    """Return the first drawn rows with a complete image, or the first drawn rows if no node has a complete image."""
    pictured = drawn[~is_incomplete(run_nodes.embedded.image_status[drawn])]
    return [int(row) for row in (pictured if len(pictured) else drawn)[:GALLERY_NODES]]


def arrange(vectors: np.ndarray, seed: int) -> np.ndarray:
    """Project (M, d) unit vectors to positions in a square, so that similar vectors are close together.

    The method is t-SNE (van der Maaten and Hinton, 2008) on the cosine distances, with initial positions by PCA. For
    fewer than :data:`MIN_TSNE_NODES` vectors, the method is PCA alone.

    Returns:
        (M, 2): x and y of each vector, from 0 to 1.
    """
    if len(vectors) < 2 or not np.ptp(vectors, axis=0).any():
        return np.full((len(vectors), 2), 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # equal vectors are valid input, but cause warnings
        if len(vectors) < MIN_TSNE_NODES:
            positions = PCA(min(2, *vectors.shape), random_state=seed).fit_transform(vectors)
        else:
            perplexity = min(PERPLEXITY, (len(vectors) - 1) / 3)
            method = TSNE(2, perplexity=perplexity, metric="cosine", init="pca", random_state=seed)
            positions = method.fit_transform(vectors)
    square = np.zeros((len(positions), 2))
    square[:, : positions.shape[1]] = np.nan_to_num(positions)
    low, extent = square.min(axis=0), np.ptp(square, axis=0)
    return np.where(extent > 0, (square - low) / np.where(extent > 0, extent, 1), 0.5)


def _nodes(run_nodes: NodesOfRun, rows: Sequence[int], side: int) -> list[Node]:
    ids = [str(node_id) for node_id in run_nodes.nodes.ids(rows)]
    values = [run_nodes.nodes[row] for row in rows]
    references = [run_nodes.images.locate(value) for value in values]
    pictures = thumbnails(run_nodes.images, references, side, run_nodes.rules)
    return [
        Node(row, _short(node_id), _short(name_in(value, node_id)), _short(run_nodes.rules.text(value)), picture)
        for row, node_id, value, picture in zip(rows, ids, values, pictures, strict=True)
    ]


def _short(text: str) -> str:
    text = plain(text)
    return text if len(text) <= MAX_TEXT_LENGTH else f"{text[: MAX_TEXT_LENGTH - 1]}…"


def _gallery(run_nodes: NodesOfRun, chosen: Sequence[GalleryQuery], links: Links | None) -> list[Entry]:
    vectors = run_nodes.embedded.vectors
    queries = np.stack([vectors[entry.row] if entry.vector is None else entry.vector for entry in chosen])
    nearest = nearest_neighbors(vectors, queries, NEAREST, [entry.row for entry in chosen])
    rows = {match.row for matches in nearest for match in matches} | {q.row for q in chosen if q.row is not None}
    ordered = sorted(rows)
    shown = dict(zip(ordered, _nodes(run_nodes, ordered, GALLERY_SIDE), strict=True))
    entries = []
    for query, matches in zip(chosen, nearest, strict=True):
        node = _new_node(run_nodes, query) if query.row is None else shown[query.row]
        entries.append(Entry(node, [_neighbor(query, match, shown[match.row], links) for match in matches]))
    return entries


def _new_node(run_nodes: NodesOfRun, query: GalleryQuery) -> Node:
    [picture] = thumbnails(UNRESOLVED_FILES, [query.image], GALLERY_SIDE, run_nodes.rules)
    return Node(None, "not in the graph", _short(query.name), "", picture)


def _neighbor(query: GalleryQuery, match: Match, node: Node, links: Links | None) -> Neighbor:
    edge = "" if links is None or query.row is None else links.between(query.row, match.row)
    return Neighbor(node, match.similarity, edge)


def _status_counts(run_nodes: NodesOfRun) -> list[StatusCount]:
    image_status, counts = run_nodes.embedded.image_status, []
    for number, name in enumerate(IMAGE_STATUS):
        rows = np.flatnonzero(image_status == number)
        if len(rows):
            examples = [_example(run_nodes, int(row)) for row in rows[:EXAMPLES]] if number else []
            counts.append(StatusCount(name or "complete", len(rows), examples))
    return counts


def _example(run_nodes: NodesOfRun, row: int) -> str:
    image = run_nodes.images.describe(run_nodes.nodes[row])
    [node_id] = run_nodes.nodes.ids([row])
    return _short(f"{node_id}: {image}" if image else str(node_id))
