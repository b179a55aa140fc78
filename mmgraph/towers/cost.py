"""Estimates cost: computes the FLOPs of a transformer, and measures the speed of a device."""

import math
import time

import torch

# Estimated speed of a model, as a fraction of the speed of a large matrix product.
# On a CPU, the towers and the fusion of ViT-B/32 reached 0.65 to 0.7.
MATMUL_SHARE = 0.6


def transformer_flops(layers: int, width: int, intermediate: int, length: int) -> float:
    """Return the FLOPs of a transformer's forward pass over one text or image.

    A multiplication and an addition count as two FLOPs.

    Args:
        layers: number of layers.
        width: width of the tokens.
        intermediate: hidden width of the feed-forward block in a layer.
        length: number of tokens of the text or image.
    """
    layer = length * (4 * width**2 + 2 * width * intermediate) + 2 * length**2 * width
    return 2.0 * layers * layer


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the speed of a large matrix product for about 0.2 s.

    Returns:
        FLOPs per second of the fastest measured product.
    """
    size = 4096 if device.type == "cuda" else 768
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = math.inf
    measurement_start = time.perf_counter()
    while time.perf_counter() - measurement_start < 0.2:
        start = time.perf_counter()
        product = left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    del product
    return 2 * size**3 / best
