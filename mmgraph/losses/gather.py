"""Gathers embeddings from all ranks, with gradients."""

from typing import Any

import torch
import torch.distributed as dist


def gather_with_gradients(local: torch.Tensor, dim: int) -> torch.Tensor:
    """Return the tensors of all ranks, concatenated along ``dim`` in rank order. Call on all ranks.

    The gradient of ``local`` is the sum of its gradients from the losses of all ranks. Without distributed training, or
    with one process, return ``local`` itself.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return local
    return torch.cat(list(_Gather.apply(local).unbind()), dim)


class _Gather(torch.autograd.Function):
    """Stacks the tensors of all ranks: (...) on each rank -> (world_size, ...) on every rank."""

    @staticmethod
    def forward(ctx: Any, local: torch.Tensor) -> torch.Tensor:
        gathered = [torch.empty_like(local) for _ in range(dist.get_world_size())]
        dist.all_gather(gathered, local.contiguous())
        return torch.stack(gathered)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[dist.get_rank()]
