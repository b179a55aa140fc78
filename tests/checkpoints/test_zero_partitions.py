"""DeepSpeed's fp16 loss scale, saved and restored with the keys of torch's GradScaler.

A run on the CPU has no fp16 loss scale, so the tests call the functions directly.
"""

from types import SimpleNamespace

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler

from mmgraph.checkpoints import zero_partitions as zero


def engine(scaler: object) -> SimpleNamespace:
    return SimpleNamespace(fp16_enabled=lambda: True, optimizer=SimpleNamespace(loss_scaler=scaler))


def dynamic() -> DynamicLossScaler:
    return DynamicLossScaler(
        init_scale=1024, scale_window=5, min_scale=1, delayed_shift=2, consecutive_hysteresis=False,
        raise_error_at_min_scale=False, dtype=torch.float16,
    )  # fmt: skip


def test_loss_scale_after_resume(monkeypatch: pytest.MonkeyPatch) -> None:
    """A restored scaler has the scale of the saved one in each later step, after 0 to 11 steps with overflows."""
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 1)  # on rank 0 DeepSpeed would print each overflow
    for steps in range(12):
        scaler = dynamic()
        for i in range(steps):
            scaler.update_scale(i in (1, 3, 9))
        saved = zero.loss_scale(engine(scaler))
        assert saved is not None and -1 <= saved["_growth_tracker"] < 5  # at 5 or more GradScaler never grows
        other = dynamic()
        zero.set_loss_scale(engine(other), saved)
        for i in range(15):
            assert other.cur_scale == scaler.cur_scale
            scaler.update_scale(i == 7)
            other.update_scale(i == 7)


def test_a_fixed_loss_scale_is_not_saved() -> None:
    assert zero.loss_scale(engine(LossScaler(128))) is None
