"""FLOPs of a transformer and measured speed of a device, for estimates of cost."""

import math
import time

import torch

# Estimated speed of a model, relative to a large matrix product.
# Towers and fusion of ViT-B/32 reached 0.65 to 0.7 on a CPU.
MATMUL_SHARE = 0.6


def transformer_flops(layers: int, width: int, intermediate: int, length: int) -> float:
    """Return the FLOPs of a transformer's forward pass over one text or image.

    Multiplications and additions are counted separately.

    Args:
        layers: number of layers.
        width: width of the tokens.
        intermediate: width between the two feed-forward matrix products of a layer.
        length: number of tokens of the text or image.
    """
    layer = length * (4 * width**2 + 2 * width * intermediate) + 2 * length**2 * width
    return 2.0 * layers * layer


def matmul_flops_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """Measure the speed of a large matrix product for about 0.2 s.

    Returns:
        Multiplications and additions per second, in the fastest of the measured products.
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
