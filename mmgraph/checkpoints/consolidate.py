"""Copies the trained state to the CPU, and restores it. Handles a plain optimizer, DDP and DeepSpeed ZeRO."""

import torch
from accelerate import Accelerator
from torch import nn

from mmgraph.checkpoints import zero_partitions
from mmgraph.checkpoints.files import TrainedState, parameters_by_name
from mmgraph.distributed.deepspeed import is_engine


def uncompiled(module: nn.Module) -> nn.Module:
    """Return the module inside the wrapper of ``torch.compile``, or ``module`` itself."""
    return getattr(module, "_orig_mod", module)


def unwrapped(module: nn.Module) -> nn.Module:
    """Return the module inside the wrappers of ``torch.compile``, DDP and DeepSpeed, or ``module`` itself.

    Accelerate compiles the module last, so ``torch.compile`` has the outer wrapper. This function replaces
    ``accelerator.unwrap_model``, which imports DeepSpeed wherever DeepSpeed is installed.
    """
    module = uncompiled(module)
    return getattr(module, "module", module)


def consolidate(module: nn.Module, optimizer: torch.optim.Optimizer) -> TrainedState:
    """Copy the trained module and Adam's moments to the CPU. Call on all ranks; each rank gets the complete state."""
    if is_engine(module):
        return zero_partitions.consolidate(module)
    weights, first, second, adam_step = {}, {}, {}, 0
    for name, parameter in parameters_by_name(unwrapped(module)):
        weights[name] = _copy(parameter)
        state = optimizer.state.get(parameter)
        if state:
            first[name], second[name] = _copy(state["exp_avg"]), _copy(state["exp_avg_sq"])
            adam_step = int(state["step"])
    return TrainedState(weights, first, second, adam_step)


def _copy(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().to("cpu", torch.float32, copy=True).contiguous()


def restore(module: nn.Module, optimizer: torch.optim.Optimizer, trained: TrainedState) -> None:
    """Load the moments of a consolidated state into the optimizer. Call on all ranks.

    The prepared module must already have the state's weights. Under ZeRO, this function also loads the float32 weights
    into the optimizer, because the module may store only 16-bit weights.
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
            for i, (name, _) in enumerate(parameters_by_name(unwrapped(module)))
        }
        optimizer.load_state_dict(current)


def loss_scale(accelerator: Accelerator, module: nn.Module) -> dict[str, float] | None:
    """Return the state of fp16's dynamic loss scale; None in other precisions, or if the scale is fixed."""
    if is_engine(module):
        return zero_partitions.loss_scale(module)
    if accelerator.scaler is None or not accelerator.scaler.is_enabled():
        return None
    return {name: accelerator.scaler.state_dict()[name] for name in ("scale", "_growth_tracker")}


def set_loss_scale(accelerator: Accelerator, module: nn.Module, saved: dict[str, float]) -> None:
    """Restore a state from :func:`loss_scale`. Do nothing if this launch has no dynamic loss scale."""
    if loss_scale(accelerator, module) is None:
        return
    if is_engine(module):
        zero_partitions.set_loss_scale(module, saved)
    else:
        accelerator.scaler.load_state_dict({**accelerator.scaler.state_dict(), **saved})
