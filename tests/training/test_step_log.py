"""The step log reads the values of a step after the next step is queued, and never waits for the newest step."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import targets
import torch
from conftest import read_metrics, settings

from mmgraph.cli import train_main
from mmgraph.utils.device_copies import HostCopy


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """The calls of a run, in order: steps queued, copies to the host started, copies read."""
    events: list[tuple[str, int]] = []
    started: list[HostCopy] = []
    take_step, start, read = (
        targets.get(name) for name in (targets.TAKE_STEP, targets.HOST_COPY_START, targets.HOST_COPY_READ)
    )

    def stepped(step: Any, batch: Any) -> Any:
        result = take_step(step, batch)
        events.append(("step", targets.steps_done(step)))
        return result

    def copied(copy: HostCopy, values: torch.Tensor) -> None:
        start(copy, values)
        started.append(copy)
        events.append(("copy", len(started)))

    def was_read(copy: HostCopy) -> list[float]:
        events.append(("read", started.index(copy) + 1))
        return read(copy)

    monkeypatch.setattr(targets.TAKE_STEP, stepped)
    monkeypatch.setattr(targets.HOST_COPY_START, copied)
    monkeypatch.setattr(targets.HOST_COPY_READ, was_read)
    yield events
    started.clear()


def test_a_step_is_read_after_the_next_step_is_queued(
    graph: Path, tmp_path: Path, calls: list[tuple[str, int]]
) -> None:
    """In a run of four steps, each copy starts before the next step is queued, and is read after that."""
    flags = settings(graph, tmp_path / "run", "--max_steps=4", "--save_every=0")
    assert train_main(flags) == 0
    expected = [("step", 1), ("copy", 1)]
    for step in (2, 3, 4):
        expected += [("step", step), ("copy", step), ("read", step - 1)]
    assert calls == [*expected, ("read", 4)]  # the save reads the last copy
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_copy_from_cuda_is_pinned_and_waits_only_for_its_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test needs no GPU: it checks the calls to a fake torch, in order."""
    called: list[Any] = []

    class Event:
        def record(self) -> None:
            called.append("record")

        def synchronize(self) -> None:
            called.append("synchronize")

    class OnHost:
        def copy_(self, values: Any, non_blocking: bool = False) -> None:
            called.append(("copy", values is on_device, non_blocking))

        def tolist(self) -> list[float]:
            called.append("tolist")
            return [1.0, 2.0]

    def empty(shape: Any, dtype: torch.dtype, pin_memory: bool) -> OnHost:
        called.append(("empty", tuple(shape), dtype, pin_memory))
        return OnHost()

    on_device = SimpleNamespace(device=torch.device("cuda"), shape=(2,), dtype=torch.float32)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    copy = HostCopy(on_device)  # type: ignore[arg-type]
    started = [("empty", (2,), torch.float32, True), ("copy", True, True), "record"]
    assert called == started  # no call waits for the device
    assert copy.tolist() == [1.0, 2.0]
    assert called == [*started, "synchronize", "tolist"]


def test_a_copy_on_the_cpu_returns_the_values() -> None:
    assert HostCopy(torch.tensor([0.5, 2.0])).tolist() == [0.5, 2.0]
