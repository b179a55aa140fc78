"""Arithmetic and time of the towers, by estimate."""

import math
import time

import torch

MATMUL_SHARE = 0.6  # of a matrix product's speed; towers and fusion of ViT-B/32 reached 0.65 to 0.7 on a CPU


def transformer_flops(layers: int, width: int, intermediate: int, length: int) -> float:
    """Of a transformer's forward pass over one text or image of ``length`` tokens.

    Args:
        intermediate: width between a layer's two feed-forward products.
    """
    layer = length * (4 * width**2 + 2 * width * intermediate) + 2 * length**2 * width
    return 2.0 * layers * layer


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Multiplications and additions a second of a large matrix product, measured for about 0.2 s."""
    size = 4096 if device.type == "cuda" else 768
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    best = math.inf
    begun = time.perf_counter()
    while time.perf_counter() - begun < 0.2:
        start = time.perf_counter()
        product = left @ right
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - start)
    del product
    return 2 * size**3 / best
