"""The graph of a run: its checked tables, edges as rows, and the source of its images."""

from pathlib import Path
from typing import NamedTuple

import pyarrow as pa

from mmgraph.config import DEFAULT_TABLES, Config
from mmgraph.data.edge_table import EdgeTable
from mmgraph.data.image_paths import ImagePaths
from mmgraph.data.image_source import ImageFiles, ImageSource
from mmgraph.data.node_table import NodeTable
from mmgraph.data.readers import fingerprint
from mmgraph.data.split import HeldOut, read_held_out, split_edges
from mmgraph.data.table_cache import open_edges, open_nodes
from mmgraph.errors import UserError


class Graph(NamedTuple):
    nodes: NodeTable  # N rows
    rows: EdgeTable  # E edges to train on, as rows of nodes: source, destination
    images: ImageSource
    nodes_fingerprint: str
    edges_fingerprint: str
    held_out: HeldOut | None  # edges to evaluate on


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
    rows, held_out, edges_fingerprint = load_edges(config, nodes, nodes_fingerprint)
    images = find_images(nodes, config, config.seed)
    return Graph(nodes, rows, images, nodes_fingerprint, edges_fingerprint, held_out)


def load_edges(config: Config, nodes: NodeTable, nodes_fingerprint: str) -> tuple[EdgeTable, HeldOut | None, str]:
    """The edges to train on, those to evaluate on, and the edge table's fingerprint; errors as :func:`load_graph`."""
    digest = fingerprint(config.edges)
    edges = open_edges(config.edges, digest, nodes, nodes_fingerprint)
    if config.eval_edges is not None:
        return edges.rows, read_held_out(config.eval_edges, nodes, nodes_fingerprint), digest
    if config.eval_fraction:
        digests = digest, nodes_fingerprint
        rows, held_out = split_edges(config.edges, edges, digests, len(nodes), config.eval_fraction, config.seed)
        return rows, held_out, digest
    return edges.rows, None, digest


def find_images(nodes: NodeTable, config: Config, seed: int) -> ImageSource:
    """Where the nodes' images are read from; some are looked for (see :meth:`ImageSource.check`)."""
    images = ImageFiles(ImagePaths(config.nodes, config.image_root, config.confine_images))
    images.check(nodes, seed)
    pa.default_memory_pool().release_unused()
    return images
