"""The trainer's own batches: tower inputs of a batch's distinct nodes, and which edge each belongs to."""

import gc
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mmgraph.config import Config
from mmgraph.data.edge_table import EdgeTable, RemainingEdges
from mmgraph.data.graph import Graph
from mmgraph.data.image_cache import PictureFile, file_name, missing_room, slot_bytes, slots_by_frequency
from mmgraph.data.image_source import ImageSource
from mmgraph.data.node_inputs import NodeInputs, node_text
from mmgraph.data.node_table import NodeTable
from mmgraph.data.preprocessing import Preprocessing
from mmgraph.data.sampler import GlobalBatchSampler
from mmgraph.distributed.signals import STOP_SIGNALS
from mmgraph.utils.log import log


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


class EdgeBatch(NamedTuple):
    """A rank's part of a global batch: b edges, and the U unique nodes at their ends."""

    edges: torch.Tensor  # (b,) int64, numbers of the edges
    rows: torch.Tensor  # (2b,) int64, rows of the node table: the b sources, then the b destinations
    inverse: torch.Tensor  # (2b,) int64, the place of each row among the unique ones
    unique: np.ndarray  # (U,) int64, the unique rows; stays on the host
    relations: torch.Tensor | None = None  # (b,) int64, places in Graph.relation_names, where the edges have relations
    # For live towers, of the unique nodes: input_ids and attention_mask (U, L) int64, L of the longest text; pictures
    # (U, 3, S, S) uint8, a quarter of what float32 would be to send.
    inputs: dict[str, torch.Tensor] | None = None
    image_status: np.ndarray | None = None  # (U,) indices into IMAGE_STATUS; stays on the host
    decoded: int = 0  # pictures that were decoded, not found in a cache
    cache_failure: str = ""  # why the shared image cache keeps no more pictures
    prefetched: Any = None  # what a token source has read ahead


class EdgeCollator:
    """Collates b edges into an :class:`EdgeBatch` without tower inputs.

    Args:
        relations: (E,) of all edges, where they have some.
    """

    def __init__(self, relations: EdgeTable | RemainingEdges | None = None):
        self.relations = relations

    def __call__(self, items: Sequence[tuple[int, int, int]]) -> EdgeBatch:
        edges, sources, destinations = (np.array(column, dtype=np.int64) for column in zip(*items, strict=True))
        rows = np.concatenate([sources, destinations])  # (2b,)
        unique, inverse = np.unique(rows, return_inverse=True)  # (U,), (2b,)
        relations = None if self.relations is None else torch.from_numpy(self.relations[edges])
        return EdgeBatch(torch.from_numpy(edges), torch.from_numpy(rows), torch.from_numpy(inverse), unique, relations)


class BatchCollator(EdgeCollator):
    """An :class:`EdgeCollator` whose batches also have what live towers take."""

    def __init__(
        self,
        nodes: NodeTable,
        images: ImageSource,
        inputs: NodeInputs,
        relations: EdgeTable | RemainingEdges | None = None,
    ):
        super().__init__(relations)
        self.nodes, self.images, self.inputs = nodes, images, inputs

    def __call__(self, items: Sequence[tuple[int, int, int]]) -> EdgeBatch:
        batch = super().__call__(items)
        nodes = [self.nodes[int(row)] for row in batch.unique]
        input_ids, attention_mask = self.inputs.texts([node_text(node) for node in nodes])
        before = self.inputs.decoded
        pictures, status = self.inputs.pictures(map(self.images.locate, nodes), batch.unique, self.images)
        return batch._replace(
            inputs={"input_ids": input_ids, "attention_mask": attention_mask, "pictures": pictures},
            image_status=np.array(status),
            decoded=self.inputs.decoded - before,
            cache_failure=self.inputs.picture_file.failure if self.inputs.picture_file is not None else "",
        )


def shared_pictures(config: Config, graph: Graph, preprocessing: Preprocessing, folder: Path) -> PictureFile | None:
    """The image cache of all processes on this host, in ``folder``, with room for ``config.image_cache_gb``.

    None, with a line in the log, where it cannot be: the folder takes no files, or the disk has no room for it.
    """
    shape = (3, preprocessing.crop, preprocessing.crop)
    nodes, pictures = len(graph.nodes), int(config.image_cache_gb * 1e9 / slot_bytes(shape))
    if pictures >= nodes:
        slots_by: list[Any] = ["rows"]  # of any edge table
    else:
        slots_by = ["frequency", graph.edges_fingerprint, pictures]
    name = file_name(
        nodes=graph.nodes_fingerprint,
        slots=slots_by,
        preprocessing=[preprocessing.short_side, preprocessing.crop],
        truncated_images=config.truncated_images,
    )
    path = folder / name
    pictures = min(pictures, nodes)
    size = pictures * slot_bytes(shape)
    try:
        lacking = missing_room(path, size)
        if lacking:
            log(
                f"no image cache: {path.parent} lacks {lacking / 1e9:.2f} GB for one of {size / 1e9:.2f} GB; give a "
                "smaller --image_cache_gb, or set MMGRAPH_CACHE to another folder"
            )
            return None
        file = PictureFile(path, slots_by_frequency(graph.rows, nodes, pictures), shape)
    except OSError as error:
        log(f"no image cache: {path}: {error.strerror}; set MMGRAPH_CACHE to a folder that takes files")
        return None
    log(f"image cache: {path} has room for {pictures:,} of {nodes:,} nodes' pictures, {size / 1e9:.2f} GB")
    return file


def build_loader(
    graph: Graph, inputs: NodeInputs | None, sampler: GlobalBatchSampler, workers: int, timeout: float = 0
) -> DataLoader[Any]:
    """The loader that Accelerate shards: global batches in the sampler's order.

    Args:
        inputs: with these, ``workers`` processes make what live towers take; without, batches are edges alone.
        timeout: seconds that a worker may take for a batch; 0 is without limit.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # tokenizers warns after every fork otherwise
    workers = workers if inputs is not None else 0
    collator = EdgeCollator(graph.relations)
    if inputs is not None:
        collator = BatchCollator(graph.nodes, graph.images, inputs, graph.relations)
    return DataLoader(
        EdgeRows(graph.rows),
        batch_sampler=sampler,
        collate_fn=collator,
        num_workers=workers,
        persistent_workers=workers > 0,
        timeout=timeout if workers else 0,
        pin_memory=torch.cuda.is_available(),
        worker_init_fn=start_worker,
    )


def start_worker(_: int) -> None:
    """What a DataLoader's worker begins with."""
    gc.freeze()  # else its garbage collector writes to what the fork shares: a copy of all of Python's objects, 0.1 GB
    # A stop reaches the whole process group: the rank finishes its step, and needs its workers for that.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
