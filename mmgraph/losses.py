"""The contrastive losses, over the global batch."""

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F


class Losses(NamedTuple):
    """Scalars, float32: the whole, and its two parts before weighting."""

    total: torch.Tensor
    mm: torch.Tensor  # text against image of the same node
    graph: torch.Tensor  # anchor against positive


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
    z_graph: torch.Tensor, z_text: torch.Tensor, z_vis: torch.Tensor, temperature: float, graph_loss_weight: float
) -> Losses:
    """This rank's share of the loss over the global batch.

    Each rank compares its own rows and columns with everybody's; the mean of the shares over ranks is the loss of one
    process that had the whole batch, and so is the mean of their gradients that DDP takes.

    Args:
        z_graph, z_text, z_vis: (2b, proj_dim) each, rows of unit length: this rank's b anchors, then its b positives.
            Every rank has the same b.
        temperature: divides the cosine similarities.
        graph_loss_weight: weight of the graph loss.
    """
    own = torch.stack([z_graph, z_text, z_vis]).float().unflatten(1, (2, -1))  # (3, 2, b, proj_dim)
    graph, text, vis = gather_with_gradients(own, dim=2)  # (2, B, proj_dim) each: all anchors, all positives
    own_graph, own_text, own_vis = own
    edges = own.shape[2]  # b
    first = edges * (dist.get_rank() if dist.is_initialized() else 0)
    labels = torch.arange(first, first + edges, device=own.device)  # (b,) where this rank's edges stand among all
    graph_loss = _info_nce(own_graph[0], own_graph[1], graph[0], graph[1], labels, temperature)
    labels = torch.cat([labels, labels + graph.shape[1]])  # (2b,) the same for nodes: the positives come after all B
    own_text, own_vis, text, vis = (z.flatten(0, 1) for z in (own_text, own_vis, text, vis))  # (2b or 2B, proj_dim)
    mm_loss = _info_nce(own_text, own_vis, text, vis, labels, temperature)
    return Losses(mm_loss + graph_loss_weight * graph_loss, mm_loss, graph_loss)


def _info_nce(
    left: torch.Tensor,
    right: torch.Tensor,
    all_left: torch.Tensor,
    all_right: torch.Tensor,
    labels: torch.Tensor,
    temperature: float,
) -> torch.Tensor:
    """:func:`info_nce_loss` of some rows and columns: (n, d) own ones against (N, d), their places in ``labels``."""
    rows = F.cross_entropy(left @ all_right.T / temperature, labels)
    columns = F.cross_entropy(right @ all_left.T / temperature, labels)
    return (rows + columns) / 2


def gather_with_gradients(own: torch.Tensor, dim: int) -> torch.Tensor:
    """All ranks' tensors, joined along ``dim`` in rank order; gradients flow back to the rank each part came from.

    A rank's gradient is the sum over the losses of all ranks. Outside of distributed training ``own`` itself.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return own
    return torch.cat(list(_Gather.apply(own).unbind()), dim)


class _Gather(torch.autograd.Function):
    """(...) on each rank -> (world_size, ...) on all."""

    @staticmethod
    def forward(ctx: Any, own: torch.Tensor) -> torch.Tensor:
        gathered = [torch.empty_like(own) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, own.contiguous())
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()]
