"""``bench loss``: InfoNCE in parts against the plain one, time and memory."""

import statistics
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

from mmgraph.bench.report import report
from mmgraph.config import Config
from mmgraph.distributed.launch import peak_memory_gb
from mmgraph.losses import contrastive as losses

MAX_PLAIN_EDGES = 8192  # edges; the plain loss of as many takes 5 GB


def bench_loss(config: Config, sizes: list[int], repeats: int, path: Path | None) -> None:
    """Measure and report batches of ``sizes`` edges; forward and backward, of both losses."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [compare_losses(size, config.proj_dim, device, repeats if size <= MAX_PLAIN_EDGES else 1) for size in sizes]
    report(f"loss: width {config.proj_dim}, {device.type}, forward and backward, medians of {repeats}", rows, {}, path)


def compare_losses(edges: int, width: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """One row: seconds and GB more than the embeddings, in parts and plain, and the greatest difference."""
    torch.manual_seed(0)
    # z_graph, z_text, z_vis
    z = [F.normalize(torch.randn(2 * edges, width, device=device), dim=1).requires_grad_() for _ in range(3)]
    found: dict[str, list[tuple[float, float]]] = {"plain": [], "parts": []}
    results = {}
    for _ in range(repeats + (edges <= MAX_PLAIN_EDGES)):  # the first of several does not count
        for kind in found if edges <= MAX_PLAIN_EDGES else ("parts",):
            found[kind].append(_measure(z, kind == "parts"))
            results[kind] = torch.cat([tensor.grad.flatten().cpu() for tensor in z if tensor.grad is not None])
    row: dict[str, Any] = {"edges": edges}
    for kind, measured in found.items():
        kept = measured[1:] or measured
        row[f"{kind} s"], row[f"{kind} GB"] = (
            (statistics.median(values) for values in zip(*kept, strict=True)) if kept else ("-", "-")
        )
    if edges > MAX_PLAIN_EDGES:
        return row | {"time ratio": "-", "difference": "-"}
    ratio = statistics.median(b[0] / a[0] for a, b in zip(found["plain"][1:], found["parts"][1:], strict=True))
    difference = (results["plain"] - results["parts"]).norm() / results["plain"].norm()
    return row | {"time ratio": ratio, "difference": float(difference)}


def _measure(z: list[torch.Tensor], in_parts: bool) -> tuple[float, float]:
    """Seconds, and GB that were needed on top of what there was before."""
    device, usual = z[0].device, losses.LOGIT_CHUNK
    for tensor in z:
        tensor.grad = None
    losses.LOGIT_CHUNK = usual if in_parts else 1 << 62
    _forget_peak(device)
    before = peak_memory_gb(device)
    begun = time.perf_counter()
    try:
        losses.contrastive_losses(z[0], z[1], z[2], 0.07, 1.0).total.backward()
    finally:
        losses.LOGIT_CHUNK = usual
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - begun, peak_memory_gb(device) - before


def _forget_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # VmHWM is then what is resident now
