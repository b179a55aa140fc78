"""The contrastive losses over the global batch."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F

from mmgraph.losses.gather import gather_with_gradients
from mmgraph.losses.negative_mask import FalseNegatives, NegativeMask

LOGIT_CHUNK = 1 << 24  # maximum size of a matrix of logits (64 MB in float32); larger ones are computed in chunks


class Losses(NamedTuple):
    """The losses of a batch; scalars, float32."""

    total: torch.Tensor  # mm + graph_loss_weight * graph
    mm: torch.Tensor  # text-image loss: compares each text with the image of its node
    graph: torch.Tensor  # graph loss: compares each anchor with its positive
    # Masked false negatives per query: (mm, graph), or () if no rule masks them.
    masked_counts: tuple[torch.Tensor, ...] = ()
    # Graph loss of embeddings that are all equal: the mean of ln(candidates in the denominator). None: ln(batch size).
    graph_chance: torch.Tensor | None = None


class BatchNodes(NamedTuple):
    """The nodes of this rank's embeddings: its b anchors, then its b positives."""

    rows: torch.Tensor  # (2b,) int64, rows of the node table
    missing_image: torch.Tensor  # (2b,) bool, True for a node without an image


def info_nce_loss(logits: torch.Tensor) -> torch.Tensor:
    """Compute the symmetric InfoNCE loss (van den Oord et al., 2018; CLIP, Radford et al., 2021).

    Args:
        logits: (N, N) similarities divided by the temperature; the positives are on the diagonal.

    Returns:
        Scalar: the mean of two cross-entropies, one over the rows and one over the columns.
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
    """Compute this rank's losses against the global batch.

    Each rank computes its rows and columns of the global logit matrix. The mean of the ranks' losses equals the loss of
    a single process with the complete batch. DDP averages the gradients over ranks, so the result equals the
    gradients of a single process.

    Args:
        z_graph, z_text, z_vis: (2b, proj_dim) each, rows of unit length: this rank's b anchors, then its b positives.
            Every rank has the same b.
        temperature: divisor of the cosine similarities.
        graph_loss_weight: weight of the graph loss in the total.
        false_negatives: rules that select logits to exclude from the denominators (false negative elimination, Huynh et
            al., 2022). None excludes nothing, as in the original trainer.
        nodes: the nodes of the embeddings; required if ``false_negatives`` is set.

    Raises:
        ValueError: ``false_negatives`` is set, but ``nodes`` is None.
    """
    local = [z.float().unflatten(0, (2, -1)) for z in (z_graph, z_text, z_vis)]  # (2, b, proj_dim) each
    gathered, offset, edges = local, 0, local[0].shape[1]  # b
    if dist.is_initialized() and dist.get_world_size() > 1:
        gathered = list(gather_with_gradients(torch.stack(local), dim=2))  # (2, B, proj_dim): all anchors and positives
        offset = edges * dist.get_rank()
    labels = torch.arange(offset, offset + edges, device=local[0].device)  # (b,) this rank's edges in the global batch
    node_labels = torch.cat([labels, labels + gathered[0].shape[1]])  # (2b,) the positives follow all B anchors
    masks = _Masks() if false_negatives is None else _build_masks(false_negatives, nodes, labels, node_labels)
    graph_loss = _info_nce(tuple(local[0]), tuple(gathered[0]), labels, temperature, masks.graph)
    text, vis, all_text, all_vis = (z.flatten(0, 1) for z in (*local[1:], *gathered[1:]))  # (2b or 2B, proj_dim)
    mm_loss = _info_nce((text, vis), (all_text, all_vis), node_labels, temperature, masks.mm, masks.mm_weights)
    total = mm_loss + graph_loss_weight * graph_loss
    return Losses(total, mm_loss, graph_loss, masks.counts(), masks.graph_chance())


class _Masks(NamedTuple):
    """Two masks per loss: one for this rank's rows of logits, one for its columns. The default masks nothing."""

    graph: tuple[NegativeMask, NegativeMask] | None = None
    mm: tuple[NegativeMask, NegativeMask] | None = None
    mm_weights: torch.Tensor | None = None  # (2b,) weight of each node in the mean cross-entropy

    def counts(self) -> tuple[torch.Tensor, ...]:
        """Return the masked false negatives per query: in the text-image loss, then in the graph loss.

        Call this after the losses are computed, because that computation counts the masked entries.
        """
        return tuple(
            torch.stack([mask.count / mask.queries for mask in masks]).mean()
            for masks in (self.mm, self.graph)
            if masks is not None and masks[0].own_images
        )

    def graph_chance(self) -> torch.Tensor | None:
        """Return the graph loss of equal embeddings; None if the graph loss masks nothing. Call as :meth:`counts`."""
        if self.graph is None:
            return None
        return torch.stack([mask.log_candidates / mask.queries for mask in self.graph]).mean()


def _build_masks(
    false_negatives: FalseNegatives, nodes: BatchNodes | None, labels: torch.Tensor, node_labels: torch.Tensor
) -> _Masks:
    if nodes is None:
        raise ValueError("false_negatives is set without nodes: pass the nodes of the embeddings")
    local = torch.stack([nodes.rows, nodes.missing_image.long()]).unflatten(1, (2, -1))  # (2, 2, b)
    gathered = gather_with_gradients(local, dim=2)  # (2, 2, B)
    rows, all_rows = local[0], gathered[0]  # (2, b), (2, B)
    absent = weights = None
    if false_negatives.missing_images:
        absent = gathered[1].flatten().bool()  # (2B,)
        present = ~nodes.missing_image
        # With these weights, the mean of the ranks' losses is the mean over all nodes that have an image.
        weights = present * (len(absent) / (~absent).sum().clamp(min=1))
    graph = false_negatives.graph_masks(rows, all_rows, labels)
    mm = false_negatives.text_image_mask(rows.flatten(), all_rows.flatten(), node_labels, absent)
    return _Masks(graph, (mm, mm), weights)


def _info_nce(
    local: tuple[torch.Tensor, ...],
    gathered: tuple[torch.Tensor, ...],
    labels: torch.Tensor,
    temperature: float,
    masks: tuple[NegativeMask, NegativeMask] | None = None,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute the loss of :func:`info_nce_loss` from this rank's rows and columns of the logit matrix.

    If these rows have more than ``LOGIT_CHUNK`` logits, rows and columns are computed in chunks, never in full.

    Args:
        local: left and right embeddings of this rank, (n, d) each.
        gathered: left and right embeddings of all ranks, (N, d) each.
        labels: (n,) indices of the local embeddings in the gathered ones.
        masks: logits to exclude from the denominators, in one mask for the rows and one for the columns. Default: none.
        weights: (n,) weights of the n queries' cross-entropies in their mean. Default: 1.
    """
    if len(local[0]) * len(gathered[0]) > LOGIT_CHUNK:
        single_process = len(local[0]) == len(gathered[0])
        all_embeddings = (None, None) if single_process else gathered
        return _ChunkedInfoNCE.apply(*local, *all_embeddings, labels, temperature, masks, weights)
    (left, right), (all_left, all_right) = local, gathered
    row_mask = column_mask = None
    if masks is not None:
        row_mask = masks[0].chunk(0, len(left))
        column_mask = row_mask if masks[1] is masks[0] else masks[1].chunk(0, len(right))
    rows = _cross_entropy(left @ all_right.T / temperature, labels, row_mask, weights)
    columns = _cross_entropy(right @ all_left.T / temperature, labels, column_mask, weights)
    return (rows + columns) / 2


def _cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, mask: torch.Tensor | None, weights: torch.Tensor | None
) -> torch.Tensor:
    if mask is not None:
        logits = logits.masked_fill(mask, -torch.inf)
    if weights is None:
        return F.cross_entropy(logits, labels)
    return (weights * F.cross_entropy(logits, labels, reduction="none")).mean()


class _ChunkedInfoNCE(torch.autograd.Function):
    """Computes :func:`_info_nce` in O((n + N) d) memory.

    A chunk contains complete rows of logits. The forward pass therefore computes the chunk's softmax, and the gradients
    from it, while the chunk is in memory. The backward pass only scales these gradients. Liger's fused linear
    cross-entropy (Hsu et al., 2024) does the same.

    In a single process, ``left`` and ``right`` are the complete batch, and ``all_left`` and ``all_right`` are None.
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
        left_grad, right_grad = torch.zeros_like(left), torch.zeros_like(right)
        all_left_grad, all_right_grad = left_grad, right_grad
        if all_left is None or all_right is None:
            all_left, all_right = left, right
        else:
            all_left_grad, all_right_grad = torch.zeros_like(all_left), torch.zeros_like(all_right)
        row_mask, column_mask = masks or (None, None)
        shared = labels, temperature, weights
        loss = _chunked_cross_entropy(left, left_grad, all_right, all_right_grad, *shared, row_mask)
        loss += _chunked_cross_entropy(right, right_grad, all_left, all_left_grad, *shared, column_mask)
        single_process = all_left is left
        ctx.save_for_backward(
            left_grad, right_grad, *((None, None) if single_process else (all_left_grad, all_right_grad))
        )
        ctx.scale = 1 / (2 * len(left) * temperature)
        return loss / (2 * len(left))

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        scale = gradient * ctx.scale
        return *(None if grad is None else grad * scale for grad in ctx.saved_tensors), None, None, None, None


def _chunked_cross_entropy(
    queries: torch.Tensor,
    query_grad: torch.Tensor,
    keys: torch.Tensor,
    key_grad: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
    weights: torch.Tensor | None,
    mask: NegativeMask | None,
) -> torch.Tensor:
    """Return the summed cross-entropy, a scalar, of the (n, N) logits ``queries @ keys.T / temperature``.

    Add the gradients to ``query_grad`` (n, d) and ``key_grad`` (N, d). They lack the factor 1 / temperature, which the
    caller applies.
    """
    loss = queries.new_zeros(())
    size = max(1, LOGIT_CHUNK // len(keys))
    for start in range(0, len(queries), size):
        chunk, targets = queries[start : start + size], labels[start : start + size]  # (s, d), (s,)
        logits = chunk / temperature @ keys.T  # (s, N)
        if mask is not None:
            logits.masked_fill_(mask.chunk(start, start + len(chunk)), -torch.inf)
        normalizer = logits.logsumexp(dim=1, keepdim=True)  # (s, 1)
        losses = normalizer - logits.gather(1, targets[:, None])  # (s, 1)
        weight = None if weights is None else weights[start : start + len(chunk), None]  # (s, 1)
        loss += losses.sum() if weight is None else (losses * weight).sum()
        # In place: the softmax. The next line subtracts the one-hot labels, which gives the gradient of the logits.
        logit_grad = logits.sub_(normalizer).exp_()
        logit_grad[torch.arange(len(chunk), device=queries.device), targets] -= 1
        if weight is not None:
            logit_grad *= weight
        query_grad[start : start + size].addmm_(logit_grad, keys)
        key_grad.addmm_(logit_grad.T, chunk)
    return loss
