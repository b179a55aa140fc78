"""Dataset of edges as pairs of nodes."""

from typing import Any

import pandas as pd
from torch.utils.data import Dataset

from mmgraph.data.tables import known_edges
from mmgraph.loader.nodes_dataset import NodesDataset


class GraphEdgeDataset(Dataset[tuple[dict[str, Any], dict[str, Any]]]):
    """The edges between nodes of the node table, in the order of the edge table.

    ``ds[i]`` is ``(anchor, positive)``: the node dicts of edge i's source and destination, as in :class:`NodesDataset`.
    ``rows`` is an (E, 2) int64 array: the rows of source and destination in the node table. Edges with an end that is
    not in the node table are dropped, and their number is logged.

    Args:
        nodes_df: node table with the column ``node_id``, whose values are unique.
        edges_df: edge table with the columns ``src_id`` and ``dst_id``. Ids are compared exactly, so their type must be
            that of ``node_id``.
    """

    def __init__(self, nodes_df: pd.DataFrame, edges_df: pd.DataFrame):
        self.nodes = NodesDataset(nodes_df)
        self.rows = known_edges(nodes_df, edges_df)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, edge: int) -> tuple[dict[str, Any], dict[str, Any]]:
        anchor, positive = self.rows[edge]
        return self.nodes[int(anchor)], self.nodes[int(positive)]
