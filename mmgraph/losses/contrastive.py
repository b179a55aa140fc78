"""The contrastive losses, over the global batch."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mmgraph.losses.gather import gather_with_gradients
from mmgraph.losses.negative_mask import FalseNegatives, NegativeMask

LOGIT_CHUNK = 1 << 24  # 64 MB; a larger square is worked through in parts


class Losses(NamedTuple):
    """Scalars, float32: the whole, and its two parts before weighting."""

    total: torch.Tensor
    mm: torch.Tensor  # text against image of the same node
    graph: torch.Tensor  # anchor against positive
    left_out: tuple[torch.Tensor, ...] = ()  # of mm and graph: false negatives left out, in the mean of the queries


class BatchNodes(NamedTuple):
    """Which nodes this rank's embeddings are of: its b anchors, then its b positives."""

    rows: torch.Tensor  # (2b,) int64, rows of the node table
    missing_image: torch.Tensor  # (2b,) bool


def info_nce_loss(logits: torch.Tensor) -> torch.Tensor:
    """Symmetric InfoNCE (van den Oord et al., 2018; CLIP, Radford et al., 2021).

    Args:
        logits: (N, N) similarities divided by the temperature; the diagonal holds the positives.

    Returns:
        Scalar: the mean of the cross-entropies of rows and of columns.
    """
    labels = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, labels) + F.cross_entropy(logits.T, labels)) / 2


def contrastive_losses(
    z_graph: torch.Tensor,
    z_text: torch.Tensor,
    z_vis: torch.Tensor,
    temperature: float,
    graph_loss_weight: float,
    false_negatives: FalseNegatives | None = None,
    nodes: BatchNodes | None = None,
) -> Losses:
    """This rank's share of the loss over the global batch.

    Each rank compares its own rows and columns with everybody's; the mean of the shares over ranks is the loss of one
    process that had the whole batch, and so is the mean of their gradients that DDP takes.

    Args:
        z_graph, z_text, z_vis: (2b, proj_dim) each, rows of unit length: this rank's b anchors, then its b positives.
            Every rank has the same b.
        temperature: divides the cosine similarities.
        graph_loss_weight: weight of the graph loss.
        false_negatives: leaves known ones out of the denominators (false negative elimination, Huynh et al., 2022);
            None is the original's loss.
        nodes: the embeddings' nodes, for ``false_negatives``.
    """
    own = [z.float().unflatten(0, (2, -1)) for z in (z_graph, z_text, z_vis)]  # (2, b, proj_dim) each
    everyone, first, edges = own, 0, own[0].shape[1]  # b
    if dist.is_initialized() and dist.get_world_size() > 1:
        everyone = list(gather_with_gradients(torch.stack(own), dim=2))  # (2, B, proj_dim): all anchors, all positives
        first = edges * dist.get_rank()
    labels = torch.arange(first, first + edges, device=own[0].device)  # (b,) where this rank's edges stand among all
    node_labels = torch.cat([labels, labels + everyone[0].shape[1]])  # (2b,) the same for nodes: the positives are last
    out = _LeftOut() if false_negatives is None else _left_out(false_negatives, nodes, labels, node_labels)
    graph_loss = _info_nce(tuple(own[0]), tuple(everyone[0]), labels, temperature, out.graph)
    text, vis, all_text, all_vis = (z.flatten(0, 1) for z in (*own[1:], *everyone[1:]))  # (2b or 2B, proj_dim)
    mm_loss = _info_nce((text, vis), (all_text, all_vis), node_labels, temperature, out.mm, out.mm_weights)
    return Losses(mm_loss + graph_loss_weight * graph_loss, mm_loss, graph_loss, out.counts())


class _LeftOut(NamedTuple):
    """What leaves the denominators, of this rank's rows and columns; nothing by default."""

    graph: tuple[NegativeMask, NegativeMask] | None = None
    mm: tuple[NegativeMask, NegativeMask] | None = None
    mm_weights: torch.Tensor | None = None  # (2b,) of each node's cross-entropies in their mean

    def counts(self) -> tuple[torch.Tensor, ...]:
        """Once the squares were read."""
        return tuple(
            torch.stack([square.count / square.queries for square in masks]).mean()
            for masks in (self.mm, self.graph)
            if masks is not None and masks[0].own
        )


def _left_out(
    false_negatives: FalseNegatives, nodes: BatchNodes | None, labels: torch.Tensor, node_labels: torch.Tensor
) -> _LeftOut:
    if nodes is None:
        raise ValueError("false negatives are told by nodes")
    told = torch.stack([nodes.rows, nodes.missing_image.long()]).unflatten(1, (2, -1))  # (2, 2, b)
    every_told = gather_with_gradients(told, dim=2)  # (2, 2, B)
    own, every = told[0], every_told[0]  # (2, b), (2, B)
    absent = weights = None
    if false_negatives.missing_images:
        absent = every_told[1].flatten().bool()  # (2B,)
        present = ~nodes.missing_image
        weights = present * (len(absent) / (~absent).sum().clamp(min=1))  # the mean is over those of all ranks
    graph = false_negatives.graph_masks(own, every, labels)
    mm = false_negatives.text_image_mask(own.flatten(), every.flatten(), node_labels, absent)
    return _LeftOut(graph, (mm, mm), weights)


def _info_nce(
    own: tuple[torch.Tensor, ...],
    everyone: tuple[torch.Tensor, ...],
    labels: torch.Tensor,
    temperature: float,
    masks: tuple[NegativeMask, NegativeMask] | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """:func:`info_nce_loss` of some rows and columns of a square that is never whole where it is large.

    Args:
        own: left and right, (n, d) each, on this rank.
        everyone: the same of all ranks, (N, d) each.
        labels: (n,) where the own ones stand among all.
        masks: entries that leave the denominators, of the rows and of the columns.
        weights: (n,) of the cross-entropies in their mean; default: 1.
    """
    if len(own[0]) * len(everyone[0]) > LOGIT_CHUNK:
        alone = own[0].data_ptr() == everyone[0].data_ptr()
        others = (None, None) if alone else everyone
        return _InfoNCEInParts.apply(*own, *others, labels, temperature, masks, weights)
    (left, right), (all_left, all_right) = own, everyone
    of_rows = of_columns = None
    if masks is not None:
        of_rows = masks[0].part(0, len(left))
        of_columns = of_rows if masks[1] is masks[0] else masks[1].part(0, len(right))
    rows = _cross_entropy(left @ all_right.T / temperature, labels, of_rows, weights)
    columns = _cross_entropy(right @ all_left.T / temperature, labels, of_columns, weights)
    return (rows + columns) / 2


def _cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, left_out: torch.Tensor | None, weights: torch.Tensor | None
) -> torch.Tensor:
    if left_out is not None:
        logits = logits.masked_fill(left_out, -torch.inf)
    if weights is None:
        return F.cross_entropy(logits, labels)
    return (weights * F.cross_entropy(logits, labels, reduction="none")).mean()


class _InfoNCEInParts(torch.autograd.Function):
    """:func:`_info_nce` in O((n + N) d) memory; without ``all_left`` and ``all_right`` they are the own ones.

    A part of the logits has whole rows, so its softmax, and with it the gradient, is known while the part is there:
    nothing is computed again in the backward pass (as in Liger's fused linear cross-entropy, Hsu et al., 2024).
    """

    @staticmethod
    def forward(
        ctx: Any,
        left: torch.Tensor,
        right: torch.Tensor,
        all_left: torch.Tensor | None,
        all_right: torch.Tensor | None,
        labels: torch.Tensor,
        temperature: float,
        masks: tuple[NegativeMask, NegativeMask] | None,
        weights: torch.Tensor | None,
    ) -> torch.Tensor:
        of_left, of_right = torch.zeros_like(left), torch.zeros_like(right)
        of_all_left, of_all_right = of_left, of_right
        if all_left is None or all_right is None:
            all_left, all_right = left, right
        else:
            of_all_left, of_all_right = torch.zeros_like(all_left), torch.zeros_like(all_right)
        of_rows, of_columns = masks or (None, None)
        shared = labels, temperature, weights
        loss = _cross_entropy_in_parts(left, of_left, all_right, of_all_right, *shared, of_rows)
        loss += _cross_entropy_in_parts(right, of_right, all_left, of_all_left, *shared, of_columns)
        alone = all_left is left
        ctx.save_for_backward(of_left, of_right, *((None, None) if alone else (of_all_left, of_all_right)))
        ctx.scale = 1 / (2 * len(left) * temperature)
        return loss / (2 * len(left))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale = gradient * ctx.scale
        return *(None if part is None else part * scale for part in ctx.saved_tensors), None, None, None, None


def _cross_entropy_in_parts(
    own: torch.Tensor,
    own_gradient: torch.Tensor,
    every: torch.Tensor,
    every_gradient: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    weights: torch.Tensor | None,
    square: NegativeMask | None,
) -> torch.Tensor:
    """The sum over rows of the cross-entropy of ``own @ every.T / temperature``, (n, N); a scalar.

    Adds its gradients, times the temperature, to those of ``own`` (n, d) and ``every`` (N, d).
    """
    loss = own.new_zeros(())
    size = max(1, LOGIT_CHUNK // len(every))
    for start in range(0, len(own), size):
        part, places = own[start : start + size], labels[start : start + size]  # (s, d), (s,)
        logits = part / temperature @ every.T  # (s, N)
        if square is not None:
            logits.masked_fill_(square.part(start, start + len(part)), -torch.inf)
        normalizer = logits.logsumexp(dim=1, keepdim=True)  # (s, 1)
        losses = normalizer - logits.gather(1, places[:, None])  # (s, 1)
        weight = None if weights is None else weights[start : start + len(part), None]  # (s, 1)
        loss += losses.sum() if weight is None else (losses * weight).sum()
        difference = logits.sub_(normalizer).exp_()  # the softmax, and then what it is off the labels by
        difference[torch.arange(len(part), device=own.device), places] -= 1
        if weight is not None:
            difference *= weight
        own_gradient[start : start + size].addmm_(difference, every)
        every_gradient.addmm_(difference.T, part)
    return loss
