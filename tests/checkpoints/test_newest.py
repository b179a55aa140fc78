"""The newest checkpoint of a run and the newest run, by what was trained; and the run's folder behind links."""

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import targets
import torch
from conftest import settings
from safetensors.torch import save_file

from mmgraph.checkpoints.newest import last_checkpoint, newest_run
from mmgraph.cli import train_main
from mmgraph.errors import UserError
from mmgraph.inference.pretrained import find_checkpoint, run_folder

FINAL = "multimodal_encoder_final.pt"


def epoch_name(epoch: int) -> str:
    return f"multimodal_encoder_epoch_{epoch}.pt"


def write_run(
    folder: Path,
    epochs: tuple[int, ...] = (),
    final: float | None = None,
    states: dict[int, Any] | None = None,
    starts: tuple[str, ...] = (),
) -> Path:
    """Write the files of a run that tell its newest checkpoint.

    Args:
        epochs: numbers of the epoch files. The weights of each are its number.
        final: the weights of the final file; None: no such file.
        states: record of the final file in the state of each step. The text of a damaged ``state.json`` may be given
            instead.
        starts: times in ``environment.json``.
    """
    (folder / "checkpoints").mkdir(parents=True)
    for epoch in epochs:
        content = {"epoch": epoch, "model_state_dict": {"graph_proj.weight": torch.full((2, 3), float(epoch))}}
        torch.save(content, folder / "checkpoints" / epoch_name(epoch))
    if final is not None:
        torch.save({"graph_proj.weight": torch.full((2, 3), final)}, folder / "checkpoints" / FINAL)
    for step, record in (states or {}).items():
        path = folder / f"state/step-{step:08d}/state.json"
        path.parent.mkdir(parents=True)
        components = {"wandb": None} if record is None else {"wandb": None, "final": record}
        path.write_text(record if isinstance(record, str) else json.dumps({"step": step, "components": components}))
    if starts:
        (folder / "environment.json").write_text(json.dumps([{"time": at} for at in starts]))
    return folder


def record(epoch: int, samples: int = 0, at: str = "2026-01-01T00:00:00Z") -> dict[str, Any]:
    """Return the record of a final file, as ``state.json`` has it. ``epoch`` is the epoch in progress, from 1."""
    return {"step": 100, "epoch": epoch, "samples_in_epoch": samples, "time": at}


def orders_of_times(folder: Path) -> Iterator[str]:
    """Yield after each change of the times of all files: as written, in both orders of names, random, and equal."""
    files = sorted(path for path in folder.rglob("*"))
    yield "as written"
    for name, order in (
        ("by name", files),
        ("reversed", files[::-1]),
        ("random", random.Random(0).sample(files, len(files))),
    ):
        for number, path in enumerate(order):
            os.utime(path, (10**9 + number, 10**9 + number))
        yield name
    for path in files:
        os.utime(path, (0, 0))
    yield "equal"


ENDED = "{"  # the text of a state.json whose end is missing


E1, E3 = epoch_name(1), epoch_name(3)
CASES: dict[str, tuple[tuple[int, ...], float | None, dict[int, Any], str]] = {  # epochs, final, states, newest file
    "no final file": ((1, 2, 10, 9), None, {}, epoch_name(10)),
    "no epoch file": ((), 1.0, {}, FINAL),
    # With a record.
    "final file after epoch 3": ((1, 2, 3), 3.0, {30: record(4)}, FINAL),
    "continued after epoch 2": ((1, 2, 3), 2.0, {30: record(3)}, E3),
    "final file inside epoch 3": ((1, 2), 2.5, {25: record(3, 24)}, FINAL),
    "continued inside epoch 3": ((1, 2, 3), 2.5, {33: record(3, 24)}, E3),
    "continued inside epoch 1": ((1,), 0.5, {5: record(1, 24)}, E1),
    "record of the newest state": ((1, 2, 3), 3.0, {20: record(3), 30: record(4)}, FINAL),
    "record of an older state": ((1, 2, 3), 9.0, {20: record(3), 30: None}, E3),
    "newest state damaged": ((1, 2, 3), 9.0, {20: record(3), 30: ENDED}, E3),
    # Without a record, the weights are compared.
    "weights of epoch 3": ((1, 2, 3), 3.0, {}, FINAL),
    "weights of epoch 2": ((1, 2, 3), 2.0, {}, E3),
    "other weights": ((1, 2, 3), 2.5, {}, FINAL),
    "state without a record": ((1, 2, 3), 2.0, {30: None}, E3),
    "only state damaged": ((1, 2, 3), 2.0, {30: ENDED}, E3),
    "record without fields": ((1, 2, 3), 2.0, {30: {"epoch": 4}}, E3),
    "record with a wrong epoch": ((1, 2, 3), 2.0, {30: {**record(4), "epoch": "x"}}, E3),
    "record without an epoch": ((1, 2, 3), 2.0, {30: {**record(4), "epoch": None}}, E3),
    "record of another type": ((1, 2, 3), 2.0, {30: ["epoch", 4]}, E3),
}


@pytest.mark.parametrize("case", CASES)
def test_last_checkpoint_does_not_depend_on_file_times(case: str, tmp_path: Path) -> None:
    *files, expected = CASES[case]
    folder = write_run(tmp_path / "run", *files)
    for name in ("multimodal_encoder_best.pt", "multimodal_encoder_epoch_99.pt.tmp", "multimodal_encoder_epoch_x.pt"):
        (folder / "checkpoints" / name).write_bytes(b"no checkpoint")
    for order in orders_of_times(folder):
        assert last_checkpoint(folder) == folder / "checkpoints" / expected, order
    copy = shutil.copytree(folder, tmp_path / "copy", copy_function=shutil.copyfile)
    assert last_checkpoint(copy) == copy / "checkpoints" / expected


@pytest.mark.parametrize(
    ("state", "expected"), [(2.5, FINAL), (2.7, epoch_name(2)), (2.0, epoch_name(2)), (None, epoch_name(2))]
)
def test_newest_state_tells_whether_an_older_run_has_continued(
    state: float | None, expected: str, tmp_path: Path
) -> None:
    """Without a record, a final file from inside an epoch is the newest file if the newest state has its weights.

    A state without readable weights (None) does not show this.
    """
    folder = write_run(tmp_path / "run", (1, 2), 2.5, {20: None, 25: None})
    weights = {20: 2.5} if state is None else {20: 2.0, 25: state}
    for step, weight in weights.items():
        tensor = torch.full((2, 3), weight)
        save_file({"graph_proj.weight": tensor}, folder / f"state/step-{step:08d}/trainable.safetensors")
    for order in orders_of_times(folder):
        assert last_checkpoint(folder).name == expected, order


def test_damaged_checkpoints_raise_no_error(tmp_path: Path) -> None:
    """The file is used, and then reported as damaged."""
    folder = write_run(tmp_path / "run", (1, 2, 3), 2.0)
    (folder / "checkpoints" / epoch_name(3)).write_bytes(b"damaged")
    assert last_checkpoint(folder).name == epoch_name(3)
    (folder / "checkpoints" / FINAL).write_bytes(b"damaged")
    assert last_checkpoint(folder).name == FINAL


def test_error_without_a_checkpoint(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", states={3: record(2)})
    for path in (folder, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=rf"^{path}: [^\n]*checkpoint[^\n]*$"):
            last_checkpoint(path)


@pytest.fixture(scope="module")
def runs(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Copies of a run at different times: finished, continued (a stop signal ended it), and finished again.

    An epoch has 4 steps.
    """
    output, copies = tmp_path_factory.mktemp("runs") / "run", {}
    flags = settings(graph, output, "--batch_size=50", "--epochs=9", "--keep_last=1")

    def train(name: str, steps: int, stop_at: int | None = None) -> None:
        record_step = resolve_name(targets.RECORD_STEP)

        def stopping(log: Any, result: Any) -> None:
            record_step(log, result)
            if targets.steps_done(log) == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
                while not targets.stop_requested(log):  # a thread receives the signal, maybe after the next step
                    time.sleep(0.001)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(targets.RECORD_STEP, stopping)
            assert train_main([*flags, f"--max_steps={steps}"]) == (143 if stop_at else 0)
        copies[name] = shutil.copytree(output, output.with_name(name), copy_function=shutil.copyfile)

    train("inside epoch 2", 6)
    train("stopped in epoch 4", 15, stop_at=12)
    train("end of epoch 4", 16)
    return copies


@pytest.mark.parametrize(
    ("name", "expected"),
    [("inside epoch 2", FINAL), ("stopped in epoch 4", epoch_name(3)), ("end of epoch 4", FINAL)],
)
def test_last_checkpoint_of_a_run(name: str, expected: str, runs: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(runs[name], tmp_path / "run")
    for order in orders_of_times(folder):
        assert last_checkpoint(folder).name == find_checkpoint(folder).name == expected, order


def test_record_of_the_final_file(runs: dict[str, Path]) -> None:
    """The record has the position of the final file, also in the states that the continued run writes."""
    found = {}
    for name, folder in runs.items():
        [state] = (folder / "state").iterdir()
        content = json.loads((state / "state.json").read_text())
        final = content["components"]["final"]
        found[name] = [content["step"], *(final[key] for key in ("step", "epoch", "samples_in_epoch"))]
        assert time.strptime(final["time"], "%Y-%m-%dT%H:%M:%SZ")
    # The stop takes effect up to two steps after the signal.
    assert found["inside epoch 2"] == [6, 6, 2, 100]
    assert found["stopped in epoch 4"][0] in (13, 14) and found["stopped in epoch 4"][1:] == [6, 2, 100]
    assert found["end of epoch 4"] == [16, 16, 5, 0]


def test_newest_run_is_that_whose_record_is_newest(tmp_path: Path) -> None:
    for name, at in (("a", "2026-03-01T00:00:00Z"), ("b", "2026-03-02T07:00:00Z"), ("c", "2026-03-02T06:59:59Z")):
        write_run(tmp_path / name, (1,), 1.0, {4: record(2, at=at)}, starts=("2026-04-01T00:00:00Z",))
    write_run(tmp_path / "unfinished", (1,), None, {4: record(2, at="2027-01-01T00:00:00Z")})
    (tmp_path / "a file").touch()
    for order in orders_of_times(tmp_path):
        assert newest_run(tmp_path) == tmp_path / "b", order
    shutil.copytree(tmp_path, tmp_path.with_name("copies"), copy_function=shutil.copyfile)
    assert newest_run(tmp_path.with_name("copies")).name == "b"


def test_newest_run_without_records_is_that_which_started_last(tmp_path: Path) -> None:
    """The last start of a run counts. A run without any time is the oldest."""
    write_run(tmp_path / "a", (1,), 1.0, starts=("2026-01-01T00:00:00Z", "2026-03-03T00:00:00Z"))
    write_run(tmp_path / "b", (1,), 1.0, starts=("2026-03-02T00:00:00Z",))
    write_run(tmp_path / "c", (1,), 1.0, {4: record(2, at="2026-03-01T00:00:00Z")})
    write_run(tmp_path / "d", (1,), 1.0)
    for order in orders_of_times(tmp_path):
        assert newest_run(tmp_path) == tmp_path / "a", order
    shutil.rmtree(tmp_path / "a")
    for order in orders_of_times(tmp_path):
        assert newest_run(tmp_path) == tmp_path / "b", order
    shutil.rmtree(tmp_path / "b")
    for order in orders_of_times(tmp_path):
        assert newest_run(tmp_path) == tmp_path / "c", order
    shutil.rmtree(tmp_path / "c")
    assert newest_run(tmp_path) == tmp_path / "d"


def test_error_without_a_finished_run(tmp_path: Path) -> None:
    write_run(tmp_path / "a", (1,))
    for folder in (tmp_path, tmp_path / "nowhere"):
        with pytest.raises(UserError, match=rf"^[^\n]*{folder}/ [^\n]*finished\b[^\n]*$"):
            newest_run(folder)


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder with a settings file."""
    folder = write_run(tmp_path / "runs/a", (1,), 1.0)
    (folder / "config.yaml").write_text("nodes: a.csv\nrun_name: off\n")
    return folder


def linked(link: Path, target: str | Path) -> Path:
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to(target)
    return link


def test_folder_of_a_checkpoint_in_a_run(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = run / "checkpoints" / FINAL
    assert run_folder(checkpoint) == run_folder(str(checkpoint)) == run
    (run / "other").mkdir()
    for path in (
        run / "checkpoints/../checkpoints" / FINAL,
        run / "other/../checkpoints" / FINAL,
        run.parent / "../runs/a/checkpoints" / FINAL,
    ):
        assert run_folder(path) == run
    for folder, path in (
        (run / "checkpoints", FINAL),
        (run / "checkpoints", f"./{FINAL}"),
        (run, f"checkpoints/{FINAL}"),
        (run.parent, f"a/checkpoints/{FINAL}"),
        (run / "other", f"../checkpoints/{FINAL}"),
    ):
        monkeypatch.chdir(folder)
        found = run_folder(path)
        assert found is not None and found.resolve() == run and run_folder(Path(path)) == found


def test_folder_of_a_link_to_a_checkpoint(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link outside a run leads to the run of its target. A link inside a run belongs to this run."""
    checkpoint = run / "checkpoints" / FINAL
    assert run_folder(linked(tmp_path / "best.pt", checkpoint)) == run
    assert run_folder(linked(tmp_path / "deep/down/best.pt", checkpoint)) == run
    assert run_folder(linked(tmp_path / "relative.pt", f"runs/a/checkpoints/{FINAL}")) == run
    assert run_folder(linked(tmp_path / "twice.pt", "relative.pt")) == run
    monkeypatch.chdir(tmp_path)
    assert run_folder("best.pt").resolve() == run
    assert run_folder(linked(tmp_path / "newest", "runs/a") / "checkpoints" / FINAL).resolve() == run
    other = write_run(tmp_path / "runs/b", (1,))
    (other / "config.yaml").write_text("nodes: b.csv\n")
    assert run_folder(linked(other / "checkpoints/start.pt", checkpoint)) == other


def test_folder_of_a_checkpoint_in_the_cache_of_a_hub(run: Path, tmp_path: Path) -> None:
    """The files of a snapshot are links to blobs, whose folder is not a run's."""
    hub = tmp_path / "models--a--b"
    (hub / "blobs").mkdir(parents=True)
    shutil.copy(run / "checkpoints" / FINAL, hub / "blobs/abc")
    shutil.copy(run / "config.yaml", hub / "blobs/def")
    checkpoint = linked(hub / "snapshots/x/checkpoints/f.pt", "../../../blobs/abc")
    linked(hub / "snapshots/x/config.yaml", "../../blobs/def")
    assert run_folder(checkpoint) == hub / "snapshots/x"
    # A snapshot of another model has a config.yaml without settings of a run.
    (hub / "blobs/def").write_text("architecture: clip\nwidth: 3\n")
    assert run_folder(checkpoint) is None


@pytest.mark.parametrize("text", ["a: [", "- nodes", "", "epochs: 3\nepochs: 4\n", "\x00", "architecture: clip\n"])
def test_a_folder_without_settings_is_not_a_run(text: str, run: Path) -> None:
    (run / "config.yaml").write_text(text)
    assert run_folder(run / "checkpoints" / FINAL) is None
    (run / "config.yaml").write_bytes(b"nodes: \xff\n")
    assert run_folder(run / "checkpoints" / FINAL) is None
    (run / "config.yaml").unlink()
    assert run_folder(run / "checkpoints" / FINAL) is None
