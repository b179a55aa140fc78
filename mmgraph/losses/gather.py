"""Embeddings gathered over all ranks, with gradients."""

from typing import Any

import torch
import torch.distributed as dist


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
