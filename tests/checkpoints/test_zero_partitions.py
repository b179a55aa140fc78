"""DeepSpeed's fp16 loss scale, which no CPU run has: carried over in the terms of torch's GradScaler."""

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


def test_the_loss_scale_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    """After any number of steps, with overflows, a new scaler does in each step what the old one does."""
    monkeypatch.setattr("deepspeed.comm.get_rank", lambda: 1)  # it tells rank 0 of each overflow
    for steps in range(12):
        scaler = dynamic()
        for i in range(steps):
            scaler.update_scale(i in (1, 3, 9))
        saved = zero.loss_scale(engine(scaler))
        assert saved is not None and -1 <= saved["_growth_tracker"] < 5  # from 5 on GradScaler never grows
        other = dynamic()
        zero.set_loss_scale(engine(other), saved)
        for i in range(15):
            assert other.cur_scale == scaler.cur_scale
            scaler.update_scale(i == 7)
            other.update_scale(i == 7)


def test_a_fixed_loss_scale_is_the_configs() -> None:
    assert zero.loss_scale(engine(LossScaler(128))) is None
