"""The graph of a run: its checked tables, edges as rows, and the source of its images."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from mmgraph.config import DEFAULT_TABLES, Config
from mmgraph.data.edge_table import EdgeTable, RemainingEdges
from mmgraph.data.image_paths import ImagePaths
from mmgraph.data.image_source import ImageFiles, ImageSource
from mmgraph.data.node_table import NodeTable
from mmgraph.data.readers import fingerprint
from mmgraph.data.split import HeldOut, read_held_out, relation_names, split_edges
from mmgraph.data.table_cache import open_edges, open_nodes
from mmgraph.errors import UserError


class TrainingEdges(NamedTuple):
    """The edges that a run trains on, and those that it does not."""

    rows: EdgeTable  # (E, 2) rows of nodes: source, destination
    relations: EdgeTable | RemainingEdges | None  # (E,) places in names
    names: list[str]  # of relations
    fingerprint: str  # of the edge table
    held_out: HeldOut | None


class Graph(NamedTuple):
    nodes: NodeTable  # N rows
    rows: EdgeTable  # E edges to train on, as rows of nodes: source, destination
    images: ImageSource
    nodes_fingerprint: str
    edges_fingerprint: str
    held_out: HeldOut | None  # edges to evaluate on
    relations: EdgeTable | RemainingEdges | None = None  # (E,) of the edges to train on, places in relation_names
    relation_names: Sequence[str] = ()


def load_graph(config: Config) -> Graph:
    """Open the tables of a run, which are converted and checked where that was not done yet; look for its images.

    Raises:
        UserError: as :func:`mmgraph.data.table_cache.open_nodes`, :func:`mmgraph.data.table_cache.open_edges`,
            :func:`mmgraph.data.split.split_edges`, :meth:`mmgraph.data.image_source.ImageSource.check`.
    """
    if (config.nodes, config.edges) == DEFAULT_TABLES and not all(Path(path).is_file() for path in DEFAULT_TABLES):
        raise UserError(
            f"there is no {DEFAULT_TABLES[0]} and {DEFAULT_TABLES[1]} here: give --nodes and --edges, or --demo for a "
            "graph to try"
        )
    nodes_fingerprint = fingerprint(config.nodes)
    nodes = open_nodes(config.nodes, nodes_fingerprint)
    edges = load_edges(config, nodes, nodes_fingerprint)
    images = find_images(nodes, config, config.seed)
    return Graph(
        nodes,
        edges.rows,
        images,
        nodes_fingerprint,
        edges.fingerprint,
        edges.held_out,
        edges.relations,
        edges.names,
    )


def load_edges(config: Config, nodes: NodeTable, nodes_fingerprint: str) -> TrainingEdges:
    """The edges to train on, and those to evaluate on; errors as :func:`load_graph`."""
    digest = fingerprint(config.edges)
    edges = open_edges(config.edges, digest, nodes, nodes_fingerprint)
    edges = edges._replace(names=relation_names(config.edges, edges.names))
    if config.eval_fraction:
        digests = digest, nodes_fingerprint
        rows, relations, held_out = split_edges(
            config.edges, edges, digests, len(nodes), config.eval_fraction, config.seed
        )
        return TrainingEdges(rows, relations, edges.names, digest, held_out)
    other = None if config.eval_edges is None else read_held_out(config.eval_edges, nodes, nodes_fingerprint)
    return TrainingEdges(edges.rows, edges.relations, edges.names, digest, other)


def find_images(nodes: NodeTable, config: Config, seed: int) -> ImageSource:
    """Where the nodes' images are read from; some are looked for (see :meth:`ImageSource.check`)."""
    images = ImageFiles(ImagePaths(config.nodes, config.image_root, config.confine_images))
    images.check(nodes, seed)
    pa.default_memory_pool().release_unused()
    return images
