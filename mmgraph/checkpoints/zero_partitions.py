"""Joins ZeRO's partitions into one state that any other launch can read, and splits such a state again.

DeepSpeed is imported inside the functions: the import takes seconds and prints messages, and most runs do not need it.
"""

from typing import Any

import torch
from torch import nn

from mmgraph.checkpoints.files import TrainedState, parameters_by_name


def consolidate(engine: Any) -> TrainedState:
    """Join the partitions of all ranks in float32 on the CPU. Call on all ranks; each rank gets the complete state."""
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    states = [state for state in engine.basic_optimizer.state.values() if "exp_avg" in state]
    weights, first, second = {}, {}, {}
    for name, parameter in parameters_by_name(engine.module):
        weights[name] = safe_get_full_fp32_param(parameter).to("cpu", copy=True)
        if states:
            first[name], second[name] = (
                safe_get_full_optimizer_state(parameter, key).to("cpu", copy=True) for key in ("exp_avg", "exp_avg_sq")
            )
    return TrainedState(weights, first, second, int(states[0]["step"]) if states else 0)


def restore(engine: Any, trained: TrainedState) -> None:
    """Load a complete state into this rank's float32 partitions.

    The low-precision weights stay as they are, because the module was prepared with the state's weights.
    """
    for name, parameter in parameters_by_name(engine.module):
        _set(parameter, trained.weights[name])
    if not trained.exp_avg:
        return
    _create_moments(engine, trained.adam_step)
    for name, parameter in parameters_by_name(engine.module):
        _set(parameter, trained.exp_avg[name], "exp_avg")
        _set(parameter, trained.exp_avg_sq[name], "exp_avg_sq")


def _create_moments(engine: Any, adam_step: int) -> None:
    """Create the optimizer state that AdamW creates in its first step. DeepSpeed has no public API for this."""
    zero, base = engine.optimizer, engine.basic_optimizer
    stage3 = engine.zero_optimization_stage() == 3
    for partition in zero.fp32_partitioned_groups_flat if stage3 else zero.single_partition_of_fp32_groups:
        fused = base.param_groups[0].get("fused")  # fused AdamW reads the step on the device
        base.state[partition] = {
            "step": torch.tensor(float(adam_step), device=partition.device if fused else "cpu"),
            "exp_avg": torch.zeros_like(partition),
            "exp_avg_sq": torch.zeros_like(partition),
        }
    if not stage3:
        zero._lazy_init_hp_params_optimizer_state()


def _set(parameter: nn.Parameter, value: torch.Tensor, moment: str | None = None) -> None:
    """Set this rank's part of a parameter from the complete tensor ``value``: the weight, or the named ``moment``."""
    from deepspeed import comm
    from deepspeed.utils import (
        safe_set_full_fp32_param,
        safe_set_full_optimizer_state,
        safe_set_local_fp32_param,
        safe_set_local_optimizer_state,
    )

    if hasattr(parameter, "ds_tensor"):  # stage 3: the full setters need a size divisible by the number of ranks
        size = parameter.ds_tensor.numel()
        padded = nn.functional.pad(value.flatten(), (0, size * comm.get_world_size() - value.numel()))
        value = padded.narrow(0, size * comm.get_rank(), size)
        if moment is None:
            safe_set_local_fp32_param(parameter, value)
        else:
            safe_set_local_optimizer_state(parameter, value, moment)
    elif moment is None:
        safe_set_full_fp32_param(parameter, value)
    else:
        safe_set_full_optimizer_state(parameter, value, moment)


def loss_scale(engine: Any) -> dict[str, float] | None:
    """Return the state of fp16's dynamic loss scale, or None if there is none.

    The keys are those of GradScaler, and also ``cur_hysteresis``, which only DeepSpeed has.
    """
    if not engine.fp16_enabled() or not engine.optimizer.loss_scaler.dynamic:
        return None
    scaler = engine.optimizer.loss_scaler
    # Number of steps since the last overflow. In contrast to GradScaler's, it is not reset when the scale grows.
    steps = scaler.cur_iter - scaler.last_overflow_iter - 1
    return {
        "scale": scaler.cur_scale,
        # Minus 1, because DeepSpeed's scale grows one step later than GradScaler's.
        "_growth_tracker": (steps - 1) % scaler.scale_window if steps else -1,
        "cur_hysteresis": scaler.cur_hysteresis,
    }


def set_loss_scale(engine: Any, saved: dict[str, float]) -> None:
    """Restore a loss scale that was saved under DeepSpeed or under GradScaler."""
    scaler = engine.optimizer.loss_scaler
    scaler.cur_scale = saved["scale"]
    scaler.last_overflow_iter = scaler.cur_iter - 2 - int(saved["_growth_tracker"])
    scaler.cur_hysteresis = int(saved.get("cur_hysteresis", scaler.cur_hysteresis))
