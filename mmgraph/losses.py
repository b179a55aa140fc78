"""The contrastive losses, over the global batch."""

from typing import NamedTuple

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
    anchors, positives = z_graph.float().chunk(2)  # (b, proj_dim) each
    graph = _shared_info_nce(anchors, positives, temperature, halves=1)
    mm = _shared_info_nce(z_text.float(), z_vis.float(), temperature, halves=2)
    return Losses(mm + graph_loss_weight * graph, mm, graph)


def _shared_info_nce(left: torch.Tensor, right: torch.Tensor, temperature: float, halves: int) -> torch.Tensor:
    """InfoNCE of this rank's rows against all ranks'; row i of ``left`` and of ``right`` belong together."""
    world_size = dist.get_world_size() if dist.is_initialized() else 1
    if world_size == 1:
        return info_nce_loss(left @ right.T / temperature)
    rank, rows = dist.get_rank(), len(left) // halves
    starts = [half * rows * world_size + rank * rows for half in range(halves)]
    labels = torch.cat([torch.arange(start, start + rows, device=left.device) for start in starts])
    row_logits = left @ _gather(right, halves).T / temperature  # (2b or b, 2B or B)
    column_logits = right @ _gather(left, halves).T / temperature
    return (F.cross_entropy(row_logits, labels) + F.cross_entropy(column_logits, labels)) / 2


def _gather(rows: torch.Tensor, halves: int) -> torch.Tensor:
    """All ranks' rows with gradients: all anchors first, then all positives, as one process would have them."""
    from torch.distributed.nn.functional import all_gather  # importing it starts distributed machinery

    gathered = torch.stack(all_gather(rows.contiguous()))  # (world, halves * b, dim)
    by_half = gathered.unflatten(1, (halves, -1)).transpose(0, 1)  # (halves, world, b, dim)
    return by_half.flatten(0, 2)  # (halves * B, dim)
