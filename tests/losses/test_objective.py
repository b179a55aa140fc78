"""The objective of a run: its losses by name and their weighted sum, against plain loops in float64."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from mmgraph.config import Config
from mmgraph.data.batches import EdgeBatch
from mmgraph.data.images import IMAGE_STATUS
from mmgraph.losses.negative_mask import FalseNegatives
from mmgraph.losses.objective import LABELS, TOTAL, Embeddings, Objective

EDGES = 5


def batch_of(status: list[int]) -> EdgeBatch:
    rows = torch.arange(2 * EDGES)
    return EdgeBatch(torch.arange(EDGES), rows, rows, rows.numpy(), image_status=np.array(status))


def embeddings_of(seed: int) -> Embeddings:
    generator = torch.Generator().manual_seed(seed)
    return Embeddings(*(F.normalize(torch.randn(2 * EDGES, 4, generator=generator), dim=1) for _ in range(3)))


def brute_force(left: torch.Tensor, right: torch.Tensor, temperature: float, kept: list[int] | None = None) -> float:
    """Return the symmetric InfoNCE loss of the kept rows, one entry at a time. None keeps all rows."""
    a, b = left.double().tolist(), right.double().tolist()
    kept = list(range(len(a))) if kept is None else kept

    def cross_entropy(queries: list[list[float]], candidates: list[list[float]]) -> float:
        terms = []
        for i in kept:
            logits = [sum(x * y for x, y in zip(queries[i], candidates[j], strict=True)) / temperature for j in kept]
            terms.append(math.log(sum(map(math.exp, logits))) - logits[kept.index(i)])
        return sum(terms) / len(terms)

    return (cross_entropy(a, b) + cross_entropy(b, a)) / 2


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0])
def test_losses_by_name_and_their_weighted_sum(weight: float) -> None:
    z = embeddings_of(0)
    config = Config(temperature=0.2, graph_loss_weight=weight)
    losses, counters = Objective(config, None)(z, batch_of([0] * 10))
    assert list(losses) == [TOTAL, *LABELS] == ["loss", "loss_mm", "loss_graph"] and counters == {}
    text_image = brute_force(z.text, z.image, 0.2)
    graph = brute_force(z.graph[:EDGES], z.graph[EDGES:], 0.2)
    expected = [text_image + weight * graph, text_image, graph]
    assert [float(loss) for loss in losses.values()] == pytest.approx(expected, rel=1e-5)
    assert all(loss.shape == () and loss.dtype == torch.float32 for loss in losses.values())


def test_nodes_without_an_image_are_masked_in_the_text_image_loss() -> None:
    """With ``partial``, a truncated image counts as an image. With ``black``, it counts as missing."""
    z, status = embeddings_of(1), [0] * 10
    status[2], status[7] = IMAGE_STATUS.index("file not found"), IMAGE_STATUS.index("truncated")
    masks = FalseNegatives(torch.zeros(10, dtype=torch.int64), mask_same=False, neighbors=None, missing_images=True)
    for truncated, masked in (("partial", {2}), ("black", {2, 7})):
        config = Config(temperature=0.5, missing_image="mask", truncated_images=truncated)  # type: ignore[arg-type]
        losses, _ = Objective(config, masks)(z, batch_of(status))
        kept = [i for i in range(10) if i not in masked]
        assert float(losses["loss_mm"]) == pytest.approx(brute_force(z.text, z.image, 0.5, kept), rel=1e-5)
