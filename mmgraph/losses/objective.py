"""The objective of a run: its losses by name, and their weighted sum.

To add a loss, write a function, add a flag for its weight, and extend :data:`LABELS` and :class:`Objective`. The loss
then appears in metrics rows, log lines, charts and trackers.
"""

from typing import NamedTuple

import torch

from mmgraph.config import Config
from mmgraph.data.batches import EdgeBatch
from mmgraph.data.images import is_black
from mmgraph.losses.contrastive import BatchNodes, contrastive_losses
from mmgraph.losses.negative_mask import FalseNegatives
from mmgraph.utils.device_copies import to_device

GRAPH_CHANCE = "chance_graph"  # graph loss of equal embeddings in metrics.jsonl; only if it masks false negatives
TOTAL = "loss"  # name of the weighted sum in metrics.jsonl
LABELS = {"loss_mm": "text-image", "loss_graph": "graph"}  # names of the losses in metrics.jsonl -> display names


class Embeddings(NamedTuple):
    """Embeddings of a rank's b edges, (2b, proj_dim) each: b anchors, then b positives. Each row has unit length."""

    graph: torch.Tensor
    text: torch.Tensor
    image: torch.Tensor


class Losses(NamedTuple):
    """This rank's losses against the global batch; scalars, float32."""

    losses: dict[str, torch.Tensor]  # :data:`TOTAL` first, then the losses of :data:`LABELS`
    counters: dict[str, torch.Tensor]  # other metrics of the step, by their names in metrics.jsonl


class Objective:
    """Computes the losses of a batch.

    Args:
        config: the run's settings. They include the temperature, the graph loss weight, and whether a truncated image
            counts as missing.
        false_negatives: rules that select logits to exclude from the denominators. None excludes nothing, as in the
            original trainer.
    """

    def __init__(self, config: Config, false_negatives: FalseNegatives | None):
        self.config, self.false_negatives = config, false_negatives

    def __call__(self, embeddings: Embeddings, batch: EdgeBatch) -> Losses:
        """Compute the losses of this rank's embeddings against those of all ranks. Call on all ranks."""
        total, text_image, graph, masked_counts, chance = contrastive_losses(
            *embeddings,
            self.config.temperature,
            self.config.graph_loss_weight,
            self.false_negatives,
            self._nodes(batch),
        )
        losses = {TOTAL: total, "loss_mm": text_image, "loss_graph": graph}
        counters = dict(zip(("false_negatives_mm", "false_negatives_graph"), masked_counts, strict=False))
        if chance is not None:
            counters[GRAPH_CHANCE] = chance
        return Losses(losses, counters)

    def _nodes(self, batch: EdgeBatch) -> BatchNodes | None:
        if self.false_negatives is None or batch.image_status is None:
            return None
        black = is_black(batch.image_status, self.config.truncated_images)  # (U,) bool, unique nodes
        return BatchNodes(batch.rows, to_device(black, batch.rows.device).index_select(0, batch.inverse))
