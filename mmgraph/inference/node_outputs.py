"""Tower outputs of a graph's nodes, in batches: from a tower store or from live towers."""

import os
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from functools import partial
from itertools import accumulate
from typing import Any, NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from mmgraph.data.batches import start_worker
from mmgraph.data.image_source import ImageSource
from mmgraph.data.node_inputs import NodeInputs
from mmgraph.data.node_table import NodeTable
from mmgraph.towers.cached import CachedTowers
from mmgraph.towers.live import run_towers
from mmgraph.towers.token_source import TokenSource
from mmgraph.towers.tokens import Tokens, Towers

BATCH = 64  # nodes per batch; fixed, so that embeddings do not depend on the number of processes


class Outputs(NamedTuple):
    """Tower outputs of U nodes: tokens on the device, image status on the CPU."""

    tokens: Tokens  # including the pooled outputs
    image_status: np.ndarray  # (U,) indices into mmgraph.data.images.IMAGE_STATUS


class NodeOutputs:
    """Yields the tower outputs of nodes, for evaluation and encoding, which need all nodes.

    Args:
        nodes, images: the graph's node table and image source.
        inputs: builds the inputs of live towers.
        source: a tower store that has all nodes, or live towers. Live towers run in float32.
        workers: number of DataLoader workers that read images for live towers.
        timeout: maximum time in seconds that a worker may take for a batch.
    """

    def __init__(
        self,
        nodes: NodeTable,
        images: ImageSource,
        inputs: NodeInputs,
        source: TokenSource,
        workers: int,
        timeout: float,
    ):
        self.nodes, self.images, self.inputs, self.source = nodes, images, inputs, source
        self.workers, self.timeout = workers, timeout

    def of(self, parts: Sequence[range], image_rows: np.ndarray | None = None) -> Iterator[Outputs]:
        """Yield the outputs of some ranges of nodes, up to :data:`BATCH` consecutive nodes at a time.

        Args:
            parts: ranges of rows.
            image_rows: (N,) row whose image each of the graph's N nodes uses. Default: the node's own row.
        """
        batches = _Batches(parts, image_rows)
        if isinstance(self.source, CachedTowers):
            return self._from_store(self.source, batches)
        return self._from_towers(self.source.towers, batches)

    def _from_store(self, stored: CachedTowers, batches: "_Batches") -> Iterator[Outputs]:
        for rows, image_rows in map(batches.__getitem__, range(len(batches))):
            yield Outputs(stored.pooled_tokens(rows, image_rows), stored.image_status[image_rows])

    @torch.no_grad()
    def _from_towers(self, towers: Towers, batches: "_Batches") -> Iterator[Outputs]:
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # otherwise, tokenizers warns after every fork
        device = next(towers.text_model.parameters()).device
        loader = DataLoader(
            batches,
            batch_size=None,
            collate_fn=partial(_collate, self.nodes, self.images, self.inputs),
            num_workers=self.workers,
            # Without a timeout, a worker that hangs blocks this process forever.
            timeout=self.timeout if self.workers else 0,
            worker_init_fn=start_worker,
        )
        for batch in loader:
            image_status = batch.pop("image_status")
            yield Outputs(
                run_towers(towers, **{name: tensor.to(device) for name, tensor in batch.items()}), image_status
            )


class _Batches(Dataset[tuple[np.ndarray, np.ndarray]]):
    """Dataset of batches: the rows of a batch's nodes and the rows of its images. Rows are computed when accessed."""

    def __init__(self, parts: Sequence[range], image_rows: np.ndarray | None):
        self.parts, self.image_rows = parts, image_rows
        self.ends = list(accumulate(-(-len(part) // BATCH) for part in parts))

    def __len__(self) -> int:
        return self.ends[-1] if self.ends else 0

    def __getitem__(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        index = bisect_right(self.ends, number)
        part = self.parts[index]
        start = part.start + BATCH * (number - (self.ends[index - 1] if index else 0))
        rows = np.arange(start, min(start + BATCH, part.stop))
        return rows, rows if self.image_rows is None else self.image_rows[rows]


def _collate(
    nodes: NodeTable, images: ImageSource, inputs: NodeInputs, pair: tuple[np.ndarray, np.ndarray]
) -> dict[str, Any]:
    rows, image_rows = pair
    input_ids, attention_mask = inputs.tokenize([inputs.rules.text(nodes[int(row)]) for row in rows])
    references = [images.locate(nodes[int(row)]) for row in image_rows]
    pictures, image_status = inputs.read_images(references, image_rows, images)
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "pixel_values": inputs.preprocessing.normalize(pictures),
        "image_status": np.array(image_status),
    }
