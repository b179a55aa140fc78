"""Batches of edges for the trainer, and the loader that builds them. For live towers, batches contain tower inputs."""

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
from mmgraph.data.image_cache import ImageCache, file_name, missing_disk_space, slot_bytes, slots_by_frequency
from mmgraph.data.image_source import ImageSource
from mmgraph.data.input_rules import InputRules
from mmgraph.data.node_inputs import NodeInputs
from mmgraph.data.node_table import NodeTable
from mmgraph.data.preprocessing import Preprocessing
from mmgraph.data.sampler import GlobalBatchSampler
from mmgraph.distributed.signals import STOP_SIGNALS
from mmgraph.utils.log import log


class EdgeRows(Dataset[tuple[int, int, int]]):
    """Dataset of edges: ``dataset[i]`` is (i, node row of the source, node row of the destination).

    Args:
        rows: (E, 2) node rows of source and destination.
    """

    def __init__(self, rows: EdgeTable):
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, edge: int) -> tuple[int, int, int]:
        return self.__getitems__([edge])[0]

    def __getitems__(self, edges: Sequence[int]) -> list[tuple[int, int, int]]:
        """Return the edges of a batch. DataLoaders call this once for each batch."""
        ends = self.rows[np.array(edges, dtype=np.int64)]
        return list(zip(edges, ends[:, 0].tolist(), ends[:, 1].tolist(), strict=True))


class EdgeBatch(NamedTuple):
    """A rank's part of a global batch: b edges, and the U unique nodes at their ends."""

    edges: torch.Tensor  # (b,) int64, numbers of the edges
    rows: torch.Tensor  # (2b,) int64, node rows: the b sources, then the b destinations
    inverse: torch.Tensor  # (2b,) int64, index into unique for each row
    unique: np.ndarray  # (U,) int64, unique node rows; stays on the host
    relations: torch.Tensor | None = None  # (b,) int64, indices into Graph.relation_names; None: no relations
    # Inputs of the unique nodes for live towers; None: no live towers. input_ids and attention_mask are (U, L) int64,
    # where L is the number of tokens of the longest text. pictures are (U, 3, S, S) uint8, because the transfer of
    # float32 would be four times as large.
    inputs: dict[str, torch.Tensor] | None = None
    image_status: np.ndarray | None = None  # (U,) indices into IMAGE_STATUS; stays on the host
    decoded: int = 0  # number of images that were decoded because they were in no cache
    cache_failure: str = ""  # why the shared image cache stores no more images; empty if it did not fail
    prefetched: Any = None  # data that the token source has read in advance


class EdgeCollator:
    """Collates b edges into an :class:`EdgeBatch` without tower inputs.

    Args:
        relations: (E,) relations of all edges; None: the edges have no relations.
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
    """An :class:`EdgeCollator` whose batches also contain the inputs of live towers (towers that run on every batch).

    Args:
        nodes: the node table.
        images: source of the images.
        inputs: converts the nodes to tower inputs.
        relations: as in :class:`EdgeCollator`.
    """

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
        input_ids, attention_mask = self.inputs.tokenize([self.inputs.rules.text(node) for node in nodes])
        before = self.inputs.decoded
        pictures, status = self.inputs.read_images(map(self.images.locate, nodes), batch.unique, self.images)
        return batch._replace(
            inputs={"input_ids": input_ids, "attention_mask": attention_mask, "pictures": pictures},
            image_status=np.array(status),
            decoded=self.inputs.decoded - before,
            cache_failure=self.inputs.picture_file.failure if self.inputs.picture_file is not None else "",
        )


def open_image_cache(config: Config, graph: Graph, preprocessing: Preprocessing, folder: Path) -> ImageCache | None:
    """Open the image cache that all processes of this host share, with space for ``config.image_cache_gb`` GB.

    Args:
        config: the run's config.
        graph: the run's graph. If there is no space for all images, the nodes with the most edges get a slot.
        preprocessing: determines the size of the images.
        folder: folder of the cache file.

    Returns:
        The cache. None if the folder cannot be written or the disk is too full; the reason is logged.
    """
    shape = (3, preprocessing.crop, preprocessing.crop)
    nodes, pictures = len(graph.nodes), int(config.image_cache_gb * 1e9 / slot_bytes(shape))
    if pictures >= nodes:
        slots_by: list[Any] = ["rows"]  # each node has a slot, so the edge table does not matter
    else:
        slots_by = ["frequency", graph.edges_fingerprint, pictures]
    name = file_name(
        nodes=graph.nodes_fingerprint,
        slots=slots_by,
        preprocessing=[preprocessing.short_side, preprocessing.crop],
        **InputRules.of(config).image_key(),
    )
    path = folder / name
    pictures = min(pictures, nodes)
    size = pictures * slot_bytes(shape)
    try:
        lacking = missing_disk_space(path, size)
        if lacking:
            log(
                f"no image cache: {path.parent} lacks {lacking / 1e9:.2f} GB of disk space for a cache of "
                f"{size / 1e9:.2f} GB; set a smaller --image_cache_gb, or set MMGRAPH_CACHE to another folder"
            )
            return None
        file = ImageCache(path, slots_by_frequency(graph.rows, nodes, pictures), shape)
    except OSError as error:
        log(f"no image cache: {path}: {error.strerror}; set MMGRAPH_CACHE to a writable folder")
        return None
    log(f"image cache: {path} has space for the images of {pictures:,} of {nodes:,} nodes, {size / 1e9:.2f} GB")
    return file


def build_loader(
    graph: Graph, inputs: NodeInputs | None, sampler: GlobalBatchSampler, workers: int, timeout: float = 0
) -> DataLoader[Any]:
    """Build the loader of global batches in the sampler's order. Accelerate slices each batch over the ranks.

    Args:
        graph: the run's graph.
        inputs: converts nodes to inputs of live towers; runs in the workers. None: batches contain no tower inputs.
        sampler: sampler of the global batches.
        workers: number of worker processes. Without ``inputs``, no workers are used.
        timeout: maximum time that a worker may take for a batch, in seconds; 0: no limit.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # else tokenizers warns after every fork
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
    """Initialize a DataLoader worker."""
    # A forked worker shares memory with its parent until one of them writes to it. Without freeze(), the garbage
    # collector would write to all Python objects, so the worker would copy them (0.1 GB).
    gc.freeze()
    # A stop signal reaches the rank and its workers. The workers ignore it, because the rank needs them to finish the
    # current step.
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
