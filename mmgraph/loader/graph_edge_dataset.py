"""Edges as training pairs."""

from typing import Any

import pandas as pd
from torch.utils.data import Dataset

from mmgraph.data.tables import known_edges
from mmgraph.loader.nodes_dataset import NodesDataset


class GraphEdgeDataset(Dataset[tuple[dict[str, Any], dict[str, Any]]]):
    """Edges whose two ends are in the node table, in the order of the edge table.

    ``ds[i]`` is ``(anchor, positive)``: the dicts (as :class:`NodesDataset`) of edge i's source and destination.
    ``rows`` is an (E, 2) int64 array of their rows in the node table. Edges with an unknown end are dropped and
    counted in the log.

    Args:
        nodes_df: has ``node_id``; unique.
        edges_df: has ``src_id`` and ``dst_id``, of the type of ``node_id``: ids are compared exactly.
    """

    def __init__(self, nodes_df: pd.DataFrame, edges_df: pd.DataFrame):
        self.nodes = NodesDataset(nodes_df)
        self.rows = known_edges(nodes_df, edges_df)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, edge: int) -> tuple[dict[str, Any], dict[str, Any]]:
        anchor, positive = self.rows[edge]
        return self.nodes[int(anchor)], self.nodes[int(positive)]
