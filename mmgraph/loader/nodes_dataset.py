"""A node table as a dataset: rows become dicts when they are asked for."""

from typing import Any

import pandas as pd
from torch.utils.data import Dataset


class NodesDataset(Dataset[dict[str, Any]]):
    """Nodes in the order of the table.

    ``ds[i]`` is a dict of row i's columns without ``node_id``. The table's columns are kept as they are (with pandas 3,
    text is Arrow-backed); no dict of the whole table is ever made.

    Args:
        nodes_df: has ``node_id`` and any other columns.
    """

    def __init__(self, nodes_df: pd.DataFrame):
        self._columns = {str(name): nodes_df[name].array for name in nodes_df.columns if name != "node_id"}
        self._length = len(nodes_df)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not -self._length <= row < self._length:
            raise IndexError(f"row {row} of a table of {self._length} nodes")
        return {name: values[row] for name, values in self._columns.items()}
