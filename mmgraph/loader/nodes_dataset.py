"""Dataset of a node table's rows as dicts."""

from typing import Any

import pandas as pd
from torch.utils.data import Dataset


class NodesDataset(Dataset[dict[str, Any]]):
    """The nodes in the order of the table.

    ``ds[i]`` is a dict of row i's columns without ``node_id``. The dict is built on access, because dicts of all rows
    would need much more memory than the table. The table's columns are stored unchanged (with pandas 3, text is
    Arrow-backed).

    Args:
        nodes_df: node table with the column ``node_id`` and any other columns.
    """

    def __init__(self, nodes_df: pd.DataFrame):
        self._columns = {str(name): nodes_df[name].array for name in nodes_df.columns if name != "node_id"}
        self._length = len(nodes_df)

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, row: int) -> dict[str, Any]:
        if not -self._length <= row < self._length:
            raise IndexError(f"row {row} is out of range: the table has {self._length} nodes")
        return {name: values[row] for name, values in self._columns.items()}
