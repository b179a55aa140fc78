"""``bench loss``: compares InfoNCE in chunks with plain InfoNCE in time and memory."""

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

MAX_PLAIN_EDGES = 8192  # the plain loss takes 5 GB for this many edges; it is not run for more edges


def bench_loss(config: Config, sizes: list[int], repeats: int, path: Path | None) -> None:
    """Measure and report the forward and backward pass of both losses.

    Args:
        config: sets the width of the embeddings.
        sizes: batch sizes in edges.
        repeats: number of rounds; each reported value is the median over the rounds. A size above
            :data:`MAX_PLAIN_EDGES` is measured once.
        path: JSON file to write; None writes no file.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [compare_losses(size, config.proj_dim, device, repeats if size <= MAX_PLAIN_EDGES else 1) for size in sizes]
    report(f"loss: width {config.proj_dim}, {device.type}, forward and backward, medians of {repeats}", rows, {}, path)


def compare_losses(edges: int, width: int, device: torch.device, repeats: int) -> dict[str, Any]:
    """Measure both losses, and return a row for the table.

    For each loss, the row has the time in seconds, and the memory in GB that is needed in addition to the embeddings.
    The time ratio is the time in chunks divided by the plain time. The difference is the norm of the difference between
    the two gradients divided by the norm of the plain gradient.
    """
    torch.manual_seed(0)
    # z_graph, z_text, z_vis
    z = [F.normalize(torch.randn(2 * edges, width, device=device), dim=1).requires_grad_() for _ in range(3)]
    measurements: dict[str, list[tuple[float, float]]] = {"plain": [], "parts": []}
    gradients = {}
    for _ in range(repeats + (edges <= MAX_PLAIN_EDGES)):  # one more round, as warm-up, if both losses are measured
        for variant in measurements if edges <= MAX_PLAIN_EDGES else ("parts",):
            measurements[variant].append(_measure(z, variant == "parts"))
            gradients[variant] = torch.cat([tensor.grad.flatten().cpu() for tensor in z if tensor.grad is not None])
    row: dict[str, Any] = {"edges": edges}
    for variant, rounds in measurements.items():
        counted = rounds[1:] or rounds
        row[f"{variant} s"], row[f"{variant} GB"] = (
            (statistics.median(values) for values in zip(*counted, strict=True)) if counted else ("-", "-")
        )
    if edges > MAX_PLAIN_EDGES:
        return row | {"time ratio": "-", "difference": "-"}
    ratio = statistics.median(
        b[0] / a[0] for a, b in zip(measurements["plain"][1:], measurements["parts"][1:], strict=True)
    )
    difference = (gradients["plain"] - gradients["parts"]).norm() / gradients["plain"].norm()
    return row | {"time ratio": ratio, "difference": float(difference)}


def _measure(z: list[torch.Tensor], in_chunks: bool) -> tuple[float, float]:
    """Return the seconds of a forward and backward pass, and by how many GB the pass raises peak memory."""
    device, usual = z[0].device, losses.LOGIT_CHUNK
    for tensor in z:
        tensor.grad = None
    losses.LOGIT_CHUNK = usual if in_chunks else 1 << 62
    reset_peak_memory(device)
    before = peak_memory_gb(device)
    start = time.perf_counter()
    try:
        losses.contrastive_losses(z[0], z[1], z[2], 0.07, 1.0).total.backward()
    finally:
        losses.LOGIT_CHUNK = usual
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start, peak_memory_gb(device) - before


def reset_peak_memory(device: torch.device) -> None:
    """Make :func:`mmgraph.distributed.launch.peak_memory_gb` start again from the memory that is in use now.

    On CUDA, the host waits for the device first, so that no queued work counts.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
    else:
        Path("/proc/self/clear_refs").write_text("5")  # sets the peak, VmHWM, to the current resident memory
