"""torch.compile of the fusion on a GPU: its speed against eager mode, and its losses."""

import shutil
import sysconfig
import time
from pathlib import Path

import pytest
import torch
from gpu_runs import DEVICE, needs_cuda, on_a_gpu

from mmgraph.losses.contrastive import contrastive_losses
from mmgraph.models.multimodal_graph_encoder import TrainedModule
from mmgraph.towers.tokens import Tokens

HEADERS = Path(sysconfig.get_path("include"), "Python.h")
needs_compiler = pytest.mark.skipif(
    not HEADERS.exists() or not any(map(shutil.which, ("cc", "gcc", "clang"))),
    reason=f"Triton needs a C compiler and {HEADERS}",
)
pytestmark = [*on_a_gpu, needs_cuda, needs_compiler]
NODES, EDGES, ROUNDS = 128, 64, 30


def batch(seed: int, length: int) -> tuple[Tokens, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    tokens = Tokens(
        torch.randn(NODES, length, 512, generator=generator).half(),
        torch.ones(NODES, length, dtype=torch.int64),
        torch.randn(NODES, 49, 768, generator=generator).half(),
    ).map(lambda tensor: tensor.to(DEVICE))
    return tokens, torch.randint(NODES, (2 * EDGES,), generator=generator).to(DEVICE)


class Training:
    """Trains a module on batches of several text lengths, as a run does."""

    def __init__(self, mode: str | None):
        torch.manual_seed(0)
        self.module = TrainedModule(512, 768, 512, 256).to(DEVICE)
        self.optimizer = torch.optim.AdamW(self.module.parameters(), lr=5e-5, fused=True)
        if mode is not None:
            self.module.fusion.compile(mode=mode)
        self.batches = [batch(seed, length) for seed, length in enumerate((77, 64, 77, 70))]

    def step(self, number: int) -> torch.Tensor:
        tokens, inverse = self.batches[number % len(self.batches)]
        with torch.autocast("cuda", torch.bfloat16):
            z = self.module(tokens)
        loss = contrastive_losses(*(part[inverse] for part in z), 0.07, 1.0).total
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()
        return loss.detach()

    def seconds(self) -> float:
        torch.cuda.synchronize()
        start = time.perf_counter()
        for number in range(ROUNDS):
            self.step(number)
        torch.cuda.synchronize()
        return (time.perf_counter() - start) / ROUNDS


@pytest.mark.parametrize("mode", ["default", "reduce-overhead"])
def test_compiled_fusion(mode: str) -> None:
    """Prints the speed. ``--compile`` is worth building if it saves more than a tenth of a step."""
    eager, compiled = Training(None), Training(mode)
    start = time.perf_counter()
    losses = [torch.stack([training.step(number) for number in range(8)]).cpu() for training in (eager, compiled)]
    torch.cuda.synchronize()
    warm_up = time.perf_counter() - start
    rounds = [(eager.seconds(), compiled.seconds()) for _ in range(5)]
    ratio = sorted(a / b for a, b in rounds)[2]
    print(
        f"torch.compile({mode}): eager {1000 * rounds[2][0]:.2f} ms, compiled {1000 * rounds[2][1]:.2f} ms, "
        f"{ratio:.2f} times as fast; {warm_up:.0f} s to compile; "
        f"losses within {float((losses[0] - losses[1]).abs().max()):.1e}"
    )
    assert (losses[0] - losses[1]).abs().max() < 2e-2
