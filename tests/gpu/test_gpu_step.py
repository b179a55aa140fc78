"""A training step on a GPU: equal to the CPU's within bounds, without waiting for the device, and the loss scaler.

The bounds are norm-relative, except for losses and embeddings, where they are absolute.
"""

import json
import math
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import LOSSES, loss_difference, newest, read_metrics, settings
from gpu_runs import CUDA, DEVICE, DTYPES, PRECISIONS, RUN_BOUNDS, STEPS, needs_cuda, on_a_gpu, train

from mmgraph.arguments import parse_config
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
    """PyTorch raises at a synchronizing call. And the host finishes steps while the device is still busy."""
    run = run_of(*flags)
    rows: list[Any] = []
    run.run_log.row = rows.append  # type: ignore[method-assign]
    stream = iter(run.stream)

    def take(steps: int) -> float:
        start = time.perf_counter()
        for _ in range(steps):
            run.step_log.submit(run.train_step(next(stream)))
        return time.perf_counter() - start

    take(4)  # lazy initialization waits
    if CUDA:
        torch.cuda.set_sync_debug_mode("error")
    try:
        take(4)
    finally:
        if CUDA:
            torch.cuda.set_sync_debug_mode("default")
    run.step_log.flush()
    if CUDA:
        torch.cuda.synchronize()
        torch.cuda._sleep(4_000_000_000)  # clock cycles: about two seconds
        # The step log waits for the step before the current one, so only one step is queued behind the pause.
        assert take(1) < 1, "the host waited for the device"
        torch.cuda.synchronize()
        run.step_log.flush()
    assert [row["step"] for row in rows] == list(range(1, 9 + CUDA))
    assert all(math.isfinite(row["loss"]) for row in rows)


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
def test_the_loss_scale_of_fp16_skips_a_step_and_is_resumed(
    graph: Path, tmp_path: Path, trained: Callable[[str], Path]
) -> None:
    """A loss scale that is too large skips steps, falls, and goes on from the resume state."""
    output = tmp_path / "run"
    config = "single_gpu.yaml --mixed_precision fp16"
    train(config, output, graph, "--max_steps=4")
    path = newest(output) / "state.json"
    state = json.loads(path.read_text())
    state["loss_scale"]["scale"] = 2.0**40
    path.write_text(json.dumps(state))
    train(config, output, graph, "--max_steps=30")
    rows = read_metrics(output)
    skipped = [row["step"] for row in rows if row.get("skipped")]
    assert skipped and skipped == list(range(5, 5 + len(skipped))) and skipped[-1] < 30
    scale = json.loads((newest(output) / "state.json").read_text())["loss_scale"]["scale"]
    assert scale == 2.0 ** (40 - len(skipped))
    train(config, output, graph, "--max_steps=34")
    rows = read_metrics(output)
    assert [row["step"] for row in rows] == list(range(1, 35))
    assert not any(row.get("skipped") for row in rows[30:]) and all(math.isfinite(row[LOSSES[0]]) for row in rows[30:])
    assert json.loads((newest(output) / "state.json").read_text())["loss_scale"]["scale"] == scale
