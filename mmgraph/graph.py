"""The graph of a run: its checked tables, edges as rows, and image paths."""

from pathlib import Path
from typing import NamedTuple

import numpy as np

from mmgraph.config import DEFAULT_TABLES, Config
from mmgraph.errors import UserError
from mmgraph.loader.nodes_dataset import NodesDataset
from mmgraph.tables import ImagePaths, fingerprint, known_edges, read_edges, read_nodes


class Graph(NamedTuple):
    nodes: NodesDataset  # N rows
    rows: np.ndarray  # (E, 2) int64 rows of nodes: source, destination
    paths: ImagePaths
    nodes_fingerprint: str
    edges_fingerprint: str


def load_graph(config: Config) -> Graph:
    """Read and check the tables of a run, and look for its images.

    Raises:
        UserError: as :func:`mmgraph.tables.read_nodes`, :func:`read_edges`, :meth:`ImagePaths.check`.
    """
    if (config.nodes, config.edges) == DEFAULT_TABLES and not all(Path(path).is_file() for path in DEFAULT_TABLES):
        raise UserError(
            f"there is no {DEFAULT_TABLES[0]} and {DEFAULT_TABLES[1]} here: give --nodes and --edges, or --demo for a "
            "graph to try"
        )
    nodes = read_nodes(config.nodes)
    rows = known_edges(nodes, read_edges(config.edges), config.edges)
    paths = ImagePaths(config.nodes, config.image_root)
    paths.check(nodes["image_path"].tolist(), config.seed)
    return Graph(NodesDataset(nodes), rows, paths, fingerprint(config.nodes), fingerprint(config.edges))
