"""A training step and its record on a fake device: no tensor on the host, and nothing that makes the host wait.

Not visible here, and left to tests/gpu: autocast, fused AdamW, the loss scaler, whether memory is pinned, and calls of
the CUDA runtime.
"""

from collections.abc import Callable, Iterable, Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import targets
import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from fake_device import DEVICE, BlockedError, fake_device
from torch.testing._internal.distributed.fake_pg import FakeStore

from mmgraph.checkpoints.progress import Progress
from mmgraph.config import Config
from mmgraph.data.adjacency import Adjacency
from mmgraph.data.batches import EdgeBatch
from mmgraph.data.images import ImageCounter
from mmgraph.distributed.signals import StopRequest
from mmgraph.losses import contrastive
from mmgraph.losses.negative_mask import FalseNegatives
from mmgraph.losses.objective import Objective
from mmgraph.models.multimodal_graph_encoder import TrainedModule
from mmgraph.towers.resident import ResidentTokens
from mmgraph.towers.tokens import Tokens
from mmgraph.training.step_log import StepLog
from mmgraph.training.train_step import TrainStep

EDGES, NODES = 4, 3  # edges of the batch; nodes of the graph
CONFIG = Config(global_batch_size=EDGES, missing_image="mask")


def resident_tokens() -> ResidentTokens:
    offsets = torch.arange(NODES + 1, device=DEVICE) * 3
    text = torch.randn(3 * NODES, 32, dtype=torch.float16, device=DEVICE)
    return ResidentTokens(text, offsets, torch.randn(NODES, 4, 48, dtype=torch.float16, device=DEVICE))


class Source:
    """A token source that reads tokens from the device's memory."""

    def __init__(self) -> None:
        self.store = resident_tokens()

    def tokens(self, batch: EdgeBatch, micro_batches: int = 1) -> Tokens:
        rows = torch.arange(len(batch.unique), device=DEVICE)
        return self.store.tokens(rows, rows, length=3)


class Descent(torch.optim.Optimizer):
    """Gradient descent. Unlike PyTorch's, it accepts ``found_inf`` on a device that is neither a CPU nor a GPU."""

    def __init__(self, parameters: Iterable[torch.Tensor]):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        assert self.found_inf.device == DEVICE and self.found_inf.shape == ()  # type: ignore[attr-defined]
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.sub_(parameter.grad, alpha=group["lr"])


class Copy:
    """Stands in for HostCopy: the copy that the host reads one step later."""

    def __init__(self, values: torch.Tensor):
        assert values.device == DEVICE
        self.size = len(values)

    def tolist(self) -> list[float]:
        return [0.0] * self.size


def masking() -> FalseNegatives:
    keys = torch.arange(0, NODES * NODES, 2, device=DEVICE)
    numbers = torch.arange(NODES, device=DEVICE)
    return FalseNegatives(numbers, True, Adjacency(keys, NODES), missing_images=True)


def batch() -> EdgeBatch:
    edges, ends = torch.arange(EDGES, device=DEVICE), torch.arange(2 * EDGES, device=DEVICE) % NODES
    return EdgeBatch(edges, ends, ends, np.arange(NODES), image_status=np.zeros(NODES, np.uint8))


def train(false_negatives: bool, micro_batches: int, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Run two steps with their records, and return the rows that were written."""
    rows: list[dict[str, Any]] = []
    with fake_device(monkeypatch) as unblocked:
        monkeypatch.setattr(targets.HOST_COPY_OF_STEP_LOG, Copy)
        with DEVICE:
            module = TrainedModule(32, 48, 16, 8)
        accelerator, progress = Accelerator(cpu=True), Progress()
        optimizer = AcceleratedOptimizer(Descent(module.parameters()))
        objective = Objective(CONFIG, masking() if false_negatives else None)
        step = TrainStep(
            module, optimizer, objective, Source(), accelerator, progress, EDGES, lambda _: 0.1, micro_batches, 1.0
        )  # fmt: skip
        schedule, stream = SimpleNamespace(evaluation_due=False), SimpleNamespace(data_wait=0.0)
        nonfinite = SimpleNamespace(handle=lambda *_: False)
        run_log = SimpleNamespace(failure=None, row=rows.append)
        signals, images = StopRequest(15), ImageCounter(NODES)
        log = StepLog(
            CONFIG, accelerator, progress, schedule, step, stream, images, signals, nonfinite, run_log
        )  # type: ignore[arg-type]  # fmt: skip
        edges = batch()
        with unblocked():
            for _ in range(2):
                log.submit(step(edges))
            log.flush()
        assert all(p.grad is not None and p.grad.device == DEVICE for p in module.parameters())
    return rows


@pytest.fixture
def two_ranks() -> Iterator[None]:
    """A process group of two ranks in which only this one exists. Collectives do nothing."""
    dist.init_process_group("fake", rank=1, world_size=2, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.parametrize(
    ("micro_batches", "chunk"), [(1, 1 << 24), (4, 1 << 24), (1, 8)], ids=["whole", "micro", "parts"]
)
@pytest.mark.parametrize("masked", [False, True], ids=["keep", "mask"])
def test_a_step_and_its_record_stay_on_the_device(
    masked: bool, micro_batches: int, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The losses whole and in parts, masks, more micro batches than nodes, update, and record."""
    monkeypatch.setattr(contrastive, "LOGIT_CHUNK", chunk)
    rows = train(masked, micro_batches, monkeypatch)
    assert [row["step"] for row in rows] == [1, 2]
    assert {"loss", "loss_mm", "loss_graph", "grad_norm"} <= rows[0].keys()
    assert ("false_negatives_mm" in rows[0]) == masked


@pytest.mark.parametrize("chunk", [1 << 24, 8], ids=["whole", "parts"])
def test_the_losses_of_two_ranks_stay_on_the_device(
    chunk: int, two_ranks: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(contrastive, "LOGIT_CHUNK", chunk)
    with fake_device(monkeypatch) as unblocked:
        z = [torch.randn(2 * EDGES, 8, device=DEVICE, requires_grad=True) for _ in range(3)]
        objective, edges = Objective(CONFIG, masking()), batch()
        with unblocked():
            losses, _ = objective(z, edges)  # type: ignore[arg-type]
            losses["loss"].backward()
        assert all(tensor.grad is not None and tensor.grad.shape == tensor.shape for tensor in z)


FAULTS: dict[str, Callable[[torch.Tensor], Any]] = {
    "cpu": lambda t: t.cpu(),
    "to": lambda t: t.to("cpu", non_blocking=True),
    "item": lambda t: t.sum().item(),
    "tolist": lambda t: t.flatten().tolist(),
    "bool": lambda t: bool(t.isfinite().all()),
    "nonzero": lambda t: t.nonzero(),
    "boolean_index": lambda t: t[t > 0],
    "boolean_assignment": lambda t: t.clone().float().__setitem__(t > 0, 1.0),
    "tensor_on_the_host": lambda t: t + torch.ones(t.shape),
    "scalar_tensor_on_the_host": lambda t: t * torch.tensor(2.0),
    "index_on_the_host": lambda t: t.flatten()[torch.tensor([0])],
    "upload": lambda t: torch.zeros(3).to(t.device),
    "unique": lambda t: t.unique(),
}
PLACES = {
    "step": targets.RESIDENT_TOKENS,
    "module": targets.PROJECT,
    "loss": targets.CROSS_ENTROPY,
    "loss in parts": targets.CHUNKED_CROSS_ENTROPY,
    "mask": targets.MASK_CHUNK,
    "neighbors": targets.LINKED,
    "backward": targets.POISON,
    "record": targets.REDUCE,
}


@pytest.mark.parametrize("place", PLACES)
def test_a_fault_is_caught(place: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A copy to the host, a read of a value or a tensor on the host raises, wherever it is put into the step."""
    original, caught = targets.get(PLACES[place]), set()

    def faulty(*arguments: Any, **keywords: Any) -> Any:
        result = original(*arguments, **keywords)
        tensor = (result if isinstance(result, torch.Tensor) else result[0]).detach()
        for fault, function in FAULTS.items():
            try:
                function(tensor)
            except (BlockedError, RuntimeError):
                caught.add(fault)
        return result

    monkeypatch.setattr(PLACES[place], faulty)
    monkeypatch.setattr(contrastive, "LOGIT_CHUNK", 8 if place == "loss in parts" else 1 << 24)
    train(True, 1, monkeypatch)
    assert caught == FAULTS.keys()
