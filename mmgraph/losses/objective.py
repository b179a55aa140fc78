"""The objective of a run: its losses by name, and their weighted sum.

A new loss is a function, a weight among the flags, and an entry in :data:`LABELS` and :class:`Objective`: rows, log
lines, charts and trackers follow.
"""

from typing import NamedTuple

import torch

from mmgraph.config import Config
from mmgraph.data.batches import EdgeBatch
from mmgraph.data.images import is_black
from mmgraph.losses.contrastive import BatchNodes, contrastive_losses
from mmgraph.losses.negative_mask import FalseNegatives

TOTAL = "loss"  # the name of the weighted sum
LABELS = {"loss_mm": "text-image", "loss_graph": "graph"}  # the losses by their names in metrics.jsonl, for people


class Embeddings(NamedTuple):
    """Of a rank's b edges: the b anchors, then the b positives; (2b, proj_dim) each, rows of unit length."""

    graph: torch.Tensor
    text: torch.Tensor
    image: torch.Tensor


class Losses(NamedTuple):
    """This rank's share of the losses over the global batch; scalars, float32."""

    losses: dict[str, torch.Tensor]  # :data:`TOTAL` first, then those of :data:`LABELS`
    counters: dict[str, torch.Tensor]  # further figures of the step, by their names in metrics.jsonl


class Objective:
    """Computes the losses of a batch.

    Args:
        config: has the temperature, the weights, and what counts as a missing image.
        false_negatives: what leaves the denominators; None is the original's loss.
    """

    def __init__(self, config: Config, false_negatives: FalseNegatives | None):
        self.config, self.false_negatives = config, false_negatives

    def __call__(self, embeddings: Embeddings, batch: EdgeBatch) -> Losses:
        """The losses of a rank's embeddings, compared with those of all ranks. Called by all ranks."""
        total, text_image, graph, left_out = contrastive_losses(
            *embeddings,
            self.config.temperature,
            self.config.graph_loss_weight,
            self.false_negatives,
            self._nodes(batch),
        )
        losses = {TOTAL: total, "loss_mm": text_image, "loss_graph": graph}
        counters = dict(zip(("false_negatives_mm", "false_negatives_graph"), left_out, strict=False))
        return Losses(losses, counters)

    def _nodes(self, batch: EdgeBatch) -> BatchNodes | None:
        if self.false_negatives is None or batch.image_status is None:
            return None
        black = torch.from_numpy(is_black(batch.image_status, self.config.truncated_images))  # (U,)
        return BatchNodes(batch.rows, black.to(batch.rows.device)[batch.inverse])
