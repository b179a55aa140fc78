"""The trainer's own batches: tower inputs of a batch's distinct nodes, and which edge each belongs to."""

import os
import signal
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mmgraph.edge_table import EdgeTable
from mmgraph.loader.node_inputs import NodeInputs, node_text
from mmgraph.node_table import NodeTable
from mmgraph.order import GlobalBatchSampler
from mmgraph.stopping import STOP_SIGNALS
from mmgraph.tables import ImagePaths


class EdgeRows(Dataset[tuple[int, int, int]]):
    """Edges by number: ``ds[i]`` is (i, row of the source, row of the destination).

    Args:
        rows: the E edges' rows.
    """

    def __init__(self, rows: EdgeTable):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, edge: int) -> tuple[int, int, int]:
        return self.__getitems__([edge])[0]

    def __getitems__(self, edges: Sequence[int]) -> list[tuple[int, int, int]]:
        """Those of a batch at once, as DataLoaders ask for them."""
        ends = self.rows[np.array(edges, dtype=np.int64)]
        return list(zip(edges, ends[:, 0].tolist(), ends[:, 1].tolist(), strict=True))


class BatchCollator:
    """Collates b edges into a batch that knows its nodes.

    The batch is a dict of ``edges`` (b,) int64; ``rows`` (2b,) int64, the b sources, then the b destinations; the
    inputs of the U distinct rows among them, ``input_ids`` and ``attention_mask`` (U, L) int64 with L of the longest
    text, ``pictures`` (U, 3, S, S) uint8; ``inverse`` (2b,) int64, the place of each row among these; and, as NumPy
    arrays that stay on the host, ``distinct`` (U,) and ``image_causes`` (U,).
    """

    def __init__(self, nodes: NodeTable, paths: ImagePaths, inputs: NodeInputs):
        self.nodes, self.paths, self.inputs = nodes, paths, inputs

    def __call__(self, items: Sequence[tuple[int, int, int]]) -> dict[str, Any]:
        edges, sources, destinations = (np.array(column, dtype=np.int64) for column in zip(*items, strict=True))
        rows = np.concatenate([sources, destinations])  # (2b,)
        distinct, inverse = np.unique(rows, return_inverse=True)  # (U,), (2b,)
        nodes = [self.node(int(row)) for row in distinct]
        input_ids, attention_mask = self.inputs.texts([node_text(node) for node in nodes])
        pictures, causes = self.inputs.pictures([node["image_path"] for node in nodes])
        return {
            "edges": torch.from_numpy(edges),
            "rows": torch.from_numpy(rows),
            "inverse": torch.from_numpy(inverse),
            "input_ids": input_ids,
            "attention_mask": attention_mask,
            "pictures": pictures,  # as bytes: a quarter of what workers and devices are sent
            "distinct": distinct,
            "image_causes": np.array(causes),
        }

    def node(self, row: int) -> dict[str, Any]:
        """A row's dict with its image path resolved."""
        node = self.nodes[row]
        node["image_path"] = self.paths.resolve(node["image_path"])
        return node


def build_loader(
    nodes: NodeTable,
    rows: EdgeTable,
    paths: ImagePaths,
    inputs: NodeInputs,
    sampler: GlobalBatchSampler,
    workers: int,
) -> DataLoader[Any]:
    """The loader that Accelerate shards: global batches in the sampler's order, made by ``workers`` processes."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warns after every fork otherwise
    return DataLoader(
        EdgeRows(rows),
        batch_sampler=sampler,
        collate_fn=BatchCollator(nodes, paths, inputs),
        num_workers=workers,
        persistent_workers=workers > 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=_start_worker,
    )


def _start_worker(_: int) -> None:
    """A stop reaches the whole process group: the rank finishes its step, and needs its workers for that."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
