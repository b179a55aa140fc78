"""The graph of a run: its checked tables, its edges as pairs of node rows, and the source of its images."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from mmgraph.config import Config
from mmgraph.data.edge_conversion import Edges
from mmgraph.data.edge_table import EdgeTable, RemainingEdges
from mmgraph.data.image_paths import ImagePaths
from mmgraph.data.image_source import ImageFiles, ImageSource
from mmgraph.data.input_rules import InputRules
from mmgraph.data.node_table import NodeTable
from mmgraph.data.readers import fingerprint
from mmgraph.data.split import HeldOut, read_held_out, relation_names, split_edges
from mmgraph.data.table_cache import open_edges, open_nodes
from mmgraph.data.text_check import check_texts
from mmgraph.errors import UserError
from mmgraph.flags.data import DEFAULT_TABLES


class TrainingEdges(NamedTuple):
    """The edges that a run trains on, and its held-out edges."""

    rows: EdgeTable  # (E, 2) node rows of source and destination
    relations: EdgeTable | RemainingEdges | None  # (E,) indices into names; None: the edges have no relations
    names: list[str]  # names of the relations; empty if the edges have none
    fingerprint: str  # fingerprint of the edge table
    held_out: HeldOut | None  # edges to evaluate on; None: no edges are held out
    table: Edges  # all edges of the edge table


class Graph(NamedTuple):
    """The tables and images of a run."""

    nodes: NodeTable  # N rows
    rows: EdgeTable  # (E, 2) edges to train on: node rows of source and destination
    images: ImageSource
    nodes_fingerprint: str
    edges_fingerprint: str
    held_out: HeldOut | None  # edges to evaluate on; None: no edges are held out
    relations: EdgeTable | RemainingEdges | None  # (E,) indices into relation_names; None: no relations
    relation_names: Sequence[str]
    edge_table: Edges  # all edges of the edge table, with those that are held out


def load_graph(config: Config) -> Graph:
    """Open the tables of a run, and check whether a random sample of its images exists.

    Tables are converted and checked first, unless an earlier start did this.

    Raises:
        UserError: as :func:`mmgraph.data.table_cache.open_nodes`, :func:`mmgraph.data.table_cache.open_edges`,
            :func:`mmgraph.data.text_check.check_texts`, :func:`mmgraph.data.split.split_edges`,
            :meth:`mmgraph.data.image_source.ImageSource.check`.
    """
    if (config.nodes, config.edges) == DEFAULT_TABLES and not all(Path(path).is_file() for path in DEFAULT_TABLES):
        raise UserError(
            f"at least one of the default tables {DEFAULT_TABLES[0]} and {DEFAULT_TABLES[1]} does not exist in this "
            "folder: set --nodes and --edges, or use --demo to train on a demo graph"
        )
    nodes_fingerprint = fingerprint(config.nodes)
    nodes = open_nodes(config.nodes, nodes_fingerprint)
    check_texts(nodes, InputRules.of(config), config.nodes)
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
        edges.table,
    )


def load_edges(config: Config, nodes: NodeTable, nodes_fingerprint: str) -> TrainingEdges:
    """Open the edges to train on and to evaluate on.

    Raises:
        UserError: as :func:`load_graph`.
    """
    digest = fingerprint(config.edges)
    edges = open_edges(config.edges, digest, nodes, nodes_fingerprint)
    names = relation_names(config.edges, edges.names)
    if config.eval_fraction:
        digests = digest, nodes_fingerprint
        rows, relations, held_out = split_edges(
            config.edges, edges, names, digests, len(nodes), config.eval_fraction, config.seed
        )
        return TrainingEdges(rows, relations, names, digest, held_out, edges)
    other = None if config.eval_edges is None else read_held_out(config.eval_edges, nodes, nodes_fingerprint)
    return TrainingEdges(edges.rows, edges.relations, names, digest, other, edges)


def find_images(nodes: NodeTable, config: Config, seed: int) -> ImageSource:
    """Create the source of the nodes' images, and check a sample of the images with :meth:`ImageSource.check`.

    Args:
        nodes: the node table.
        config: the run's config.
        seed: seed of the sample of images to check.
    """
    images = ImageFiles(ImagePaths(config.nodes, config.image_root, config.confine_images))
    images.check(nodes, seed)
    pa.default_memory_pool().release_unused()
    return images
