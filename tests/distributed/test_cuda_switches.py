"""PyTorch's switches for CUDA that a launch sets. They can be read without a GPU."""

from collections.abc import Iterator

import pytest
import torch
from targets import CONFIGURE_CUDA, get


@pytest.fixture
def _switches() -> Iterator[None]:
    sdp, tf32 = torch.backends.cuda.cudnn_sdp_enabled(), torch.backends.cudnn.allow_tf32
    yield
    torch.backends.cuda.enable_cudnn_sdp(sdp)
    torch.backends.cudnn.allow_tf32 = tf32


@pytest.mark.usefixtures("_switches")
def test_attention_needs_no_plan_per_shape_and_float32_is_not_rounded() -> None:
    torch.backends.cuda.enable_cudnn_sdp(True)
    torch.backends.cudnn.allow_tf32 = True
    get(CONFIGURE_CUDA)()
    assert not torch.backends.cuda.cudnn_sdp_enabled() and not torch.backends.cudnn.allow_tf32
    assert torch.backends.cuda.flash_sdp_enabled() and torch.backends.cuda.mem_efficient_sdp_enabled()
    assert not torch.backends.cuda.matmul.allow_tf32
