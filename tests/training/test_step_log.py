"""The step log reads a step's figures one step late, and never waits for the step that was just queued."""

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import targets
import torch
from conftest import read_metrics, settings

from mmgraph.cli import train_main
from mmgraph.training.host_copy import HostCopy


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[tuple[str, int]]]:
    """What a run does, in order: steps that are taken, copies that are started, and copies that are read."""
    found: list[tuple[str, int]] = []
    started: list[HostCopy] = []
    take_step, begin, read = (
        targets.get(name) for name in (targets.TAKE_STEP, targets.HOST_COPY_START, targets.HOST_COPY_READ)
    )

    def stepped(step: Any, batch: Any) -> Any:
        result = take_step(step, batch)
        found.append(("step", targets.steps_done(step)))
        return result

    def copied(copy: HostCopy, values: torch.Tensor) -> None:
        begin(copy, values)
        started.append(copy)
        found.append(("copy", len(started)))

    def was_read(copy: HostCopy) -> list[float]:
        found.append(("read", started.index(copy) + 1))
        return read(copy)

    monkeypatch.setattr(targets.TAKE_STEP, stepped)
    monkeypatch.setattr(targets.HOST_COPY_START, copied)
    monkeypatch.setattr(targets.HOST_COPY_READ, was_read)
    yield found
    started.clear()


def test_a_step_is_read_when_the_next_one_is_queued(graph: Path, tmp_path: Path, calls: list[tuple[str, int]]) -> None:
    """The order of a run of four steps: each copy starts before the next step is queued, and is read after it."""
    flags = settings(graph, tmp_path / "run", "--max_steps=4", "--save_every=0")
    assert train_main(flags) == 0
    expected = [("step", 1), ("copy", 1)]
    for step in (2, 3, 4):
        expected += [("step", step), ("copy", step), ("read", step - 1)]
    assert calls == [*expected, ("read", 4)]  # the last one by the save
    assert [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]


def test_a_copy_from_cuda_is_pinned_asynchronous_and_waits_for_its_own_event(monkeypatch: pytest.MonkeyPatch) -> None:
    """No GPU here: what is asked of torch, in its order."""
    asked: list[Any] = []

    class Event:
        def record(self) -> None:
            asked.append("record")

        def synchronize(self) -> None:
            asked.append("synchronize")

    class OnHost:
        def copy_(self, values: Any, non_blocking: bool = False) -> None:
            asked.append(("copy", values is on_device, non_blocking))

        def tolist(self) -> list[float]:
            asked.append("tolist")
            return [1.0, 2.0]

    def empty(shape: Any, dtype: torch.dtype, pin_memory: bool) -> OnHost:
        asked.append(("empty", tuple(shape), dtype, pin_memory))
        return OnHost()

    on_device = SimpleNamespace(device=torch.device("cuda"), shape=(2,), dtype=torch.float32)
    monkeypatch.setattr(torch, "empty", empty)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    copy = HostCopy(on_device)  # type: ignore[arg-type]
    started = [("empty", (2,), torch.float32, True), ("copy", True, True), "record"]
    assert asked == started  # nothing waits
    assert copy.tolist() == [1.0, 2.0]
    assert asked == [*started, "synchronize", "tolist"]


def test_a_copy_on_the_cpu_is_the_values_themselves() -> None:
    assert HostCopy(torch.tensor([0.5, 2.0])).tolist() == [0.5, 2.0]
