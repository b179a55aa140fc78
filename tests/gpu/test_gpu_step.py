"""A training step on a GPU: equal to the CPU's within bounds, without waiting for the device, and the loss scaler.

The bounds are norm-relative, except for losses and embeddings, where they are absolute.
"""

import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import loss_difference, read_metrics, settings
from gpu_runs import (
    CUDA,
    DEVICE,
    DTYPES,
    PRECISIONS,
    RUN_BOUNDS,
    STEPS,
    loss_scale,
    needs_cuda,
    on_a_gpu,
    set_loss_scale,
    train,
)  # fmt: skip

from mmgraph.arguments import parse_config
from mmgraph.data.batches import EdgeBatch
from mmgraph.data.graph import load_graph
from mmgraph.distributed.launch import build_accelerator
from mmgraph.losses import contrastive
from mmgraph.losses.contrastive import contrastive_losses
from mmgraph.models.multimodal_graph_encoder import TrainedModule
from mmgraph.towers.tokens import Tokens
from mmgraph.training.build import build_run
from mmgraph.training.nonfinite import poison_if_nonfinite, skip_if_nonfinite
from mmgraph.training.trainer import Run

pytestmark = on_a_gpu
# Largest difference between two steps at ViT-B/32's size: of an embedding, of the loss, of the gradient.
BOUNDS = {"no": (1e-5, 1e-4, 1e-4), "bf16": (2e-2, 2e-2, 5e-2), "fp16": (2e-3, 2e-3, 1e-2)}


class Step(NamedTuple):
    """The results of a step on the CPU, in float64."""

    embeddings: torch.Tensor
    loss: torch.Tensor
    gradient: torch.Tensor


def real_size_step(device: torch.device, precision: str, chunk: int = contrastive.LOGIT_CHUNK) -> Step:
    """Take a step of 64 edges and 119 unique nodes at ViT-B/32's size."""
    generator = torch.Generator().manual_seed(0)
    nodes, edges = 119, 64
    lengths = torch.randint(2, 78, (nodes, 1), generator=generator)
    tokens = Tokens(
        torch.randn(nodes, 77, 512, generator=generator).half(),
        (torch.arange(77) < lengths).long(),
        torch.randn(nodes, 49, 768, generator=generator).half(),
    ).map(lambda tensor: tensor.to(device))
    inverse = torch.randint(nodes, (2 * edges,), generator=generator).to(device)
    torch.manual_seed(0)
    module = TrainedModule(512, 768, 512, 256).to(device)
    scale = 2.0**12 if precision == "fp16" else 1.0
    dtype, before = DTYPES[precision], contrastive.LOGIT_CHUNK
    with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
        unique = module(tokens)
    contrastive.LOGIT_CHUNK = chunk
    try:
        loss = contrastive_losses(*(z[inverse] for z in unique), 0.07, 1.0).total  # in float32, as in a run
    finally:
        contrastive.LOGIT_CHUNK = before
    (loss * scale).backward()
    gradient = torch.cat([parameter.grad.double().flatten().cpu() for parameter in module.parameters()]) / scale
    return Step(torch.cat([z.detach().double().cpu() for z in unique]), loss.detach().double().cpu(), gradient)


@pytest.fixture(scope="module")
def on_the_cpu() -> Step:
    return real_size_step(torch.device("cpu"), "no")


@pytest.mark.parametrize("chunk", [contrastive.LOGIT_CHUNK, 1000], ids=["whole", "parts"])
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_step_equals_the_step_on_the_cpu(precision: str, chunk: int, on_the_cpu: Step) -> None:
    step = real_size_step(DEVICE, precision, chunk)
    differences = (
        float((step.embeddings - on_the_cpu.embeddings).abs().max()),
        float((step.loss - on_the_cpu.loss).abs()),
        float((step.gradient - on_the_cpu.gradient).norm() / on_the_cpu.gradient.norm()),
    )
    print(f"{precision}: embeddings {differences[0]:.1e}, loss {differences[1]:.1e}, gradient {differences[2]:.1e}")
    assert all(a < b for a, b in zip(differences, BOUNDS[precision], strict=True)), differences


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_run_equals_the_run_on_the_cpu(precision: str, trained: Callable[[str], Path]) -> None:
    difference = loss_difference(trained(precision), trained("cpu"), STEPS)
    print(f"{precision}: losses of {STEPS} steps within {difference:.1e}")
    assert difference < RUN_BOUNDS[precision]


@pytest.fixture
def run_of(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Run]]:
    """Build a run in this process, in bf16."""

    def build(*flags: str) -> Run:
        config = parse_config(settings(graph, tmp_path / "run", "--max_steps=20", "--save_every=0", *flags))
        accelerator = build_accelerator()
        return build_run(config, accelerator, load_graph(config))

    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    AcceleratorState._reset_state(reset_partial_state=True)
    yield build
    AcceleratorState._reset_state(reset_partial_state=True)


FLAGS = {
    "store on the device": ("--tower_cache_device=auto",),
    "store on disk": ("--tower_cache_device=cpu",),
    "masks": ("--false_negatives=mask_neighbors", "--missing_image=mask"),
    "micro batches": ("--micro_batch_size=3", "--max_grad_norm=1"),
}


@pytest.mark.parametrize("flags", FLAGS.values(), ids=FLAGS.keys())
def test_a_step_never_waits_for_the_device(flags: tuple[str, ...], run_of: Callable[..., Run]) -> None:
    """PyTorch raises at a synchronizing call. And the host goes on while the device is still busy."""
    run = run_of(*flags)
    rows: list[Any] = []
    run.run_log.row = rows.append  # type: ignore[method-assign]
    stream = iter(run.stream)

    def take(batch: EdgeBatch) -> None:
        run.step_log.submit(run.train_step(batch))

    for _ in range(4):  # lazy initialization waits
        take(next(stream))
    if CUDA:
        torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(4):
            take(batch := next(stream))
    finally:
        if CUDA:
            torch.cuda.set_sync_debug_mode("default")
    if CUDA:
        # A batch of known shape, so that no kernel is loaded and no memory is allocated.
        take(batch)
        torch.cuda._sleep(4_000_000_000)  # clock cycles: about two seconds
        start = time.perf_counter()
        take(batch)  # also reads the values of the step before the pause
        seconds = time.perf_counter() - start
        print(f"the host queued a step in {1000 * seconds:.1f} ms")
        assert seconds < 1, "the host waited for the device"
    run.step_log.flush()
    assert [row["step"] for row in rows] == list(range(1, 9 + 2 * CUDA))
    assert all(math.isfinite(row["loss"]) for row in rows)


@needs_cuda
@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_new_shape_does_not_slow_a_step(precision: str) -> None:
    """The numbers of unique nodes and of text tokens change from step to step. At ViT-B/32's size."""
    build_accelerator()  # sets PyTorch's switches
    assert not torch.backends.cuda.cudnn_sdp_enabled()
    module = TrainedModule(512, 768, 512, 256).to(DEVICE)
    dtype, seconds = DTYPES[precision], []
    for nodes, length in [(119, 77), *((100 + i, 77 - i) for i in range(20))]:
        tokens = Tokens(
            torch.randn(nodes, length, 512, device=DEVICE),
            torch.ones(nodes, length, dtype=torch.int64, device=DEVICE),
            torch.randn(nodes, 49, 768, device=DEVICE),
        )
        torch.cuda.synchronize()
        start = time.perf_counter()
        with torch.autocast("cuda", dtype, enabled=dtype != torch.float32):
            z = module(tokens)
        sum(part.sum() for part in z).backward()  # type: ignore[union-attr]
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    print(f"{precision}: first shape {seconds[0]:.3f} s, later new shapes at most {max(seconds[1:]):.3f} s")
    assert max(seconds[1:]) < 0.3


@needs_cuda
@pytest.mark.parametrize("finite", [True, False])
def test_fused_adamw_skips_a_step_that_is_not_finite(finite: bool) -> None:
    weight = torch.nn.Parameter(torch.ones(5, device=DEVICE))
    optimizer = torch.optim.AdamW([weight], lr=0.1, fused=True)
    for step, loss_is_finite in enumerate((True, finite), start=1):
        before = weight.detach().clone()
        optimizer.zero_grad(set_to_none=True)
        loss = (weight * torch.arange(5, device=DEVICE)).sum() * (1.0 if loss_is_finite else math.inf)
        poison_if_nonfinite(loss).backward()
        skip_if_nonfinite(optimizer, torch.nn.utils.clip_grad_norm_([weight], math.inf))
        optimizer.step()
        assert torch.equal(before, weight.detach()) != loss_is_finite, step
    assert optimizer.state[weight]["step"].item() == 1 + finite and weight.isfinite().all()


@needs_cuda
def test_the_loss_scale_of_fp16_skips_a_step_and_is_resumed(graph: Path, tmp_path: Path) -> None:
    """A loss scale that is too large skips steps, falls, and goes on from the resume state."""
    output, exponent = tmp_path / "run", 28
    config = "single_gpu.yaml --mixed_precision fp16"
    train(config, output, graph, "--max_steps=4")
    set_loss_scale(output, 2.0**exponent)
    train(config, output, graph, "--max_steps=30")
    skipped = [row["step"] for row in read_metrics(output)[4:] if row.get("skipped")]
    print(f"skipped steps: {skipped}, loss scale {loss_scale(output):.0f}")
    assert 5 in skipped and skipped[-1] < 26
    assert (scale := loss_scale(output)) == 2.0 ** (exponent - len(skipped))
    train(config, output, graph, "--max_steps=34")
    rows = read_metrics(output)
    assert [row["step"] for row in rows] == list(range(1, 35))
    later = sum(bool(row.get("skipped")) for row in rows[30:])
    assert loss_scale(output) == scale / 2**later and later < 2
    assert all(math.isfinite(row["loss"]) for row in rows[30:])
