"""What is trained, whole and on the CPU, whether a plain optimizer, DDP or DeepSpeed's ZeRO holds it."""

import torch
from accelerate import Accelerator
from torch import nn

from mmgraph.checkpoints import zero_partitions
from mmgraph.checkpoints.files import TrainedState
from mmgraph.distributed.deepspeed import is_engine


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside DDP's or DeepSpeed's wrapper. (``accelerator.unwrap_model`` imports DeepSpeed if it can.)"""
    return getattr(module, "module", module)


def consolidate(module: nn.Module, optimizer: torch.optim.Optimizer) -> TrainedState:
    """Copy the trained module and Adam's moments to the CPU. Called by all ranks; every rank gets the whole."""
    if is_engine(module):
        return zero_partitions.consolidate(module)
    weights, first, second, adam_step = {}, {}, {}, 0
    for name, parameter in unwrapped(module).named_parameters():
        weights[name] = _copy(parameter)
        state = optimizer.state.get(parameter)
        if state:
            first[name], second[name] = _copy(state["exp_avg"]), _copy(state["exp_avg_sq"])
            adam_step = int(state["step"])
    return TrainedState(weights, first, second, adam_step)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def restore(module: nn.Module, optimizer: torch.optim.Optimizer, trained: TrainedState) -> None:
    """Put a consolidated state's moments into the optimizer of a prepared module that has its weights. On every rank.

    Under ZeRO the float32 weights too: the module may hold them in 16 bits.
    """
    if is_engine(module):
        zero_partitions.restore(module, trained)
    elif trained.exp_avg:
        current = optimizer.state_dict()
        current["state"] = {
            i: {
                "step": torch.tensor(float(trained.adam_step)),
                "exp_avg": trained.exp_avg[name],
                "exp_avg_sq": trained.exp_avg_sq[name],
            }
            for i, (name, _) in enumerate(unwrapped(module).named_parameters())
        }
        optimizer.load_state_dict(current)


def loss_scale(accelerator: Accelerator, module: nn.Module) -> dict[str, float] | None:
    """What fp16 scales the loss with; None in other precisions."""
    if is_engine(module):
        return zero_partitions.loss_scale(module)
    if accelerator.scaler is None or not accelerator.scaler.is_enabled():
        return None
    return {name: accelerator.scaler.state_dict()[name] for name in ("scale", "_growth_tracker")}


def set_loss_scale(accelerator: Accelerator, module: nn.Module, saved: dict[str, float]) -> None:
    """Go on with what :func:`loss_scale` gave, where this launch scales at all."""
    if loss_scale(accelerator, module) is None:
        return
    if is_engine(module):
        zero_partitions.set_loss_scale(module, saved)
    else:
        accelerator.scaler.load_state_dict({**accelerator.scaler.state_dict(), **saved})
