"""What a report shows of a graph's nodes: a map of their embeddings, some with their nearest, and image health."""

import warnings
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import numpy as np
from PIL import Image
from sklearn.decomposition import PCA
from sklearn.manifold import TSNE

from mmgraph.data.image_source import AS_GIVEN, ImageSource
from mmgraph.data.images import IMAGE_STATUS
from mmgraph.data.node_inputs import node_text
from mmgraph.data.node_table import NodeTable
from mmgraph.inference.embeddings import NodeVectors
from mmgraph.inference.neighbor_search import Links, Match, name_in, nearest_neighbors, plain
from mmgraph.report.pictures import thumbnails

MAP_NODES = 2_000  # of all reports on one page
GALLERY_NODES, NEAREST = 12, 8
MAP_SIDE, GALLERY_SIDE = 48, 96  # pixels
EXAMPLES = 3  # of nodes without their whole picture, by cause
MAX_TEXT_LENGTH = 160  # characters of a name, a text, a path
PERPLEXITY = 30.0
FEWEST = 8  # nodes that t-SNE arranges


class Node(NamedTuple):
    """A node as a page shows it; one that was asked for may not be in the graph."""

    row: int | None
    node_id: str
    name: str
    text: str
    picture: Image.Image | None


class Neighbor(NamedTuple):
    node: Node
    similarity: float
    edge: str  # "trained", "held out", or empty


class Entry(NamedTuple):
    """A node of the gallery, and those nearest to it among all nodes."""

    node: Node
    nearest: list[Neighbor]


class StatusCount(NamedTuple):
    """Why pictures are not whole: of how many nodes, and some of them."""

    name: str
    nodes: int
    examples: list[str]


class Nodes(NamedTuple):
    """What is shown of a graph's nodes."""

    total: int
    checkpoint: str  # whose embeddings they are
    map: list[Node]  # the sample, in the order of the table
    places: np.ndarray  # (len(map), 2) in 0 to 1
    gallery: list[Entry]
    asked: int  # of the gallery, the first
    edges_known: bool
    mean_similarity: float  # of two nodes of the sample
    image_status: list[StatusCount]
    seed: int


class Asked(NamedTuple):
    """A node for the gallery: one of the graph, or a new one with a name, a picture and a vector."""

    row: int | None
    name: str = ""
    image: str | None = None
    vector: np.ndarray | None = None  # (d,)


class NodesOfRun(NamedTuple):
    """What is known of a run's nodes when its report is made."""

    nodes: NodeTable
    images: ImageSource
    found: NodeVectors
    truncated_images: Literal["partial", "black"]
    seed: int
    checkpoint: str


def show_nodes(
    graph: NodesOfRun,
    asked: Sequence[Asked],
    load_links: Callable[[Sequence[int]], Links | None],
    most: int = MAP_NODES,
) -> Nodes:
    """Draw a sample by the seed, arrange it, and find the nearest of some.

    Args:
        asked: stand first in the gallery.
        load_links: gives the edges of rows; None where they are not known.
        most: nodes on the map.
    """
    total = len(graph.nodes)
    drawn = np.random.default_rng(graph.seed).permutation(total)
    sample = np.sort(drawn[:most])
    others = [Asked(row) for row in _for_gallery(graph, drawn) if row not in [one.row for one in asked]]
    chosen = [*asked, *others[: max(0, GALLERY_NODES - len(asked))]]
    links = load_links([one.row for one in chosen if one.row is not None])
    return Nodes(
        total,
        graph.checkpoint,
        _nodes(graph, sample.tolist(), MAP_SIDE),
        arrange(graph.found.vectors[sample], graph.seed),
        _gallery(graph, chosen, links),
        len(asked),
        links is not None,
        _mean_similarity(graph.found.vectors[sample]),
        _status_counts(graph),
        graph.seed,
    )


def _mean_similarity(vectors: np.ndarray) -> float:
    """Of two different ones of (M, d) unit vectors, on average."""
    count, total = len(vectors), vectors.sum(axis=0, dtype=np.float64)
    return float(total @ total - count) / (count * (count - 1)) if count > 1 else 1.0


def _for_gallery(graph: NodesOfRun, drawn: np.ndarray) -> list[int]:
    """The first nodes with a whole picture; any, where none has one."""
    pictured = drawn[graph.found.image_status[drawn] == 0]
    return [int(row) for row in (pictured if len(pictured) else drawn)[:GALLERY_NODES]]


def arrange(vectors: np.ndarray, seed: int) -> np.ndarray:
    """Places of (M, d) unit vectors in a square, (M, 2) in 0 to 1: what is near by cosine lies together.

    By t-SNE (van der Maaten and Hinton, 2008), from a start by PCA; fewer than :data:`FEWEST` nodes by PCA alone.
    """
    if len(vectors) < 2 or not np.ptp(vectors, axis=0).any():
        return np.full((len(vectors), 2), 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of vectors that are equal, which is no fault of the page's
        if len(vectors) < FEWEST:
            places = PCA(min(2, *vectors.shape), random_state=seed).fit_transform(vectors)
        else:
            perplexity = min(PERPLEXITY, (len(vectors) - 1) / 3)
            method = TSNE(2, perplexity=perplexity, metric="cosine", init="pca", random_state=seed)
            places = method.fit_transform(vectors)
    square = np.zeros((len(places), 2))
    square[:, : places.shape[1]] = np.nan_to_num(places)
    low, extent = square.min(axis=0), np.ptp(square, axis=0)
    return np.where(extent > 0, (square - low) / np.where(extent > 0, extent, 1), 0.5)


def _nodes(graph: NodesOfRun, rows: Sequence[int], side: int) -> list[Node]:
    ids = [str(node_id) for node_id in graph.nodes.ids(rows)]
    values = [graph.nodes[row] for row in rows]
    references = [graph.images.locate(value) for value in values]
    pictures = thumbnails(graph.images, references, side, graph.truncated_images)
    return [
        Node(row, _short(node_id), _short(name_in(value, node_id)), _short(node_text(value)), picture)
        for row, node_id, value, picture in zip(rows, ids, values, pictures, strict=True)
    ]


def _short(text: str) -> str:
    text = plain(text)
    return text if len(text) <= MAX_TEXT_LENGTH else f"{text[: MAX_TEXT_LENGTH - 1]}…"


def _gallery(graph: NodesOfRun, chosen: Sequence[Asked], links: Links | None) -> list[Entry]:
    vectors = graph.found.vectors
    queries = np.stack([vectors[one.row] if one.vector is None else one.vector for one in chosen])
    matches = nearest_neighbors(vectors, queries, NEAREST, [one.row for one in chosen])
    rows = {match.row for found in matches for match in found} | {one.row for one in chosen if one.row is not None}
    ordered = sorted(rows)
    shown = dict(zip(ordered, _nodes(graph, ordered, GALLERY_SIDE), strict=True))
    entries = []
    for one, found in zip(chosen, matches, strict=True):
        node = _new_node(graph, one) if one.row is None else shown[one.row]
        entries.append(Entry(node, [_neighbor(one, match, shown[match.row], links) for match in found]))
    return entries


def _new_node(graph: NodesOfRun, one: Asked) -> Node:
    [picture] = thumbnails(AS_GIVEN, [one.image], GALLERY_SIDE, graph.truncated_images)
    return Node(None, "not in the graph", _short(one.name), "", picture)


def _neighbor(one: Asked, match: Match, node: Node, links: Links | None) -> Neighbor:
    edge = "" if links is None or one.row is None else links.between(one.row, match.row)
    return Neighbor(node, match.similarity, edge)


def _status_counts(graph: NodesOfRun) -> list[StatusCount]:
    image_status, found = graph.found.image_status, []
    for number, name in enumerate(IMAGE_STATUS):
        rows = np.flatnonzero(image_status == number)
        if len(rows):
            examples = [_example(graph, int(row)) for row in rows[:EXAMPLES]] if number else []
            found.append(StatusCount(name or "whole", len(rows), examples))
    return found


def _example(graph: NodesOfRun, row: int) -> str:
    image = graph.images.describe(graph.nodes[row])
    [node_id] = graph.nodes.ids([row])
    return _short(f"{node_id}: {image}" if image else str(node_id))
