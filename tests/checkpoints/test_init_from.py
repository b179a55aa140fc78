"""``--init_from`` at a resume: the run goes on only with the file that it started from."""

import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import read_metrics, settings, tree

from mmgraph.arguments import parse_config
from mmgraph.checkpoints.files import TrainedState
from mmgraph.checkpoints.progress import Progress
from mmgraph.checkpoints.resume_state import compute_run_fingerprint, write_state
from mmgraph.checkpoints.run_start import check_run_fingerprint, init_from_fingerprint
from mmgraph.cli import train_main
from mmgraph.errors import UserError


@pytest.fixture(scope="module")
def files(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two checkpoints of the same model with different weights."""
    folder = tmp_path_factory.mktemp("files")
    assert train_main(settings(graph, folder / "run", "--max_steps=2")) == 0
    first = shutil.copy(folder / "run/checkpoints/multimodal_encoder_final.pt", folder / "first.pt")
    state = torch.load(first)
    state["graph_proj.weight"] += 1
    torch.save(state, folder / "second.pt")
    return first, folder / "second.pt"


@pytest.fixture(scope="module")
def started(graph: Path, files: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of 2 steps that started from a copy of the first file, ``start.pt`` beside its folder."""
    folder = tmp_path_factory.mktemp("started")
    start = shutil.copy(files[0], folder / "start.pt")
    assert train_main(settings(graph, folder / "run", f"--init_from={start}", "--max_steps=2")) == 0
    return folder


def one_error(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the error, which must be the only line on stderr."""
    error = capsys.readouterr().err
    assert error.startswith("mmgraph: error: ") and error.count("\n") == 1, error
    return error


CASES = {  # how the second start names the file: the flag, and whether the run goes on
    "same file": ("START", True),
    "same content": ("COPY", True),
    "file deleted": ("START", True),
    "other content": ("SECOND", False),
    "content changed": ("START", False),
    "flag dropped": (None, False),
    "file deleted, other name": ("COPY", False),
}


@pytest.mark.parametrize("case", CASES)
def test_init_from_at_a_resume(
    case: str, started: Path, files: tuple[Path, Path], graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A file that is gone is taken to be unchanged, because a resumed run does not read it."""
    flag, goes_on = CASES[case]
    start, copy = started / "start.pt", tmp_path / "copy.pt"
    shutil.copytree(started / "run", tmp_path / "run")
    shutil.copy(start, copy)
    content = start.read_bytes()
    if "deleted" in case:
        start.unlink()
        copy.unlink()
    elif case == "content changed":
        shutil.copy(files[1], start)
    path = {"START": start, "COPY": copy, "SECOND": files[1], None: None}[flag]
    more = [] if path is None else [f"--init_from={path}"]
    before = tree(tmp_path / "run")
    try:
        code = train_main(settings(graph, tmp_path / "run", *more, "--max_steps=4"))
    finally:
        start.write_bytes(content)
    if goes_on:
        assert code == 0 and [row["step"] for row in read_metrics(tmp_path / "run")] == [1, 2, 3, 4]
    else:
        assert code == 2
        error = one_error(capsys)
        assert re.search(rf"\binit_from {re.escape(str(started))}/start\.pt .*-> .*--run_name", error), error
        assert str(path) in error and tree(tmp_path / "run") == before


def test_a_file_that_was_gone_for_one_start_is_still_known(
    started: Path, files: tuple[Path, Path], graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A start without the file keeps the file's SHA-256 in the state."""
    shutil.copytree(started / "run", tmp_path / "run")
    start = started / "start.pt"
    content = start.read_bytes()
    flags = settings(graph, tmp_path / "run", f"--init_from={start}")
    start.unlink()
    try:
        assert train_main([*flags, "--max_steps=3"]) == 0
        shutil.copy(files[1], start)
        capsys.readouterr()
        assert train_main([*flags, "--max_steps=4"]) == 2
        assert f"init_from {start}" in one_error(capsys)
    finally:
        start.write_bytes(content)
    assert train_main([*flags, "--max_steps=4"]) == 0


def test_a_run_without_init_from_does_not_take_it_at_a_resume(
    graph: Path, files: tuple[Path, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = settings(graph, tmp_path / "run", "--max_steps=2")
    assert train_main(flags) == 0
    assert train_main([*flags, f"--init_from={files[0]}"]) == 2
    assert f"init_from None -> {files[0]} " in one_error(capsys)


def older_state(folder: Path, init_from: str | None, identity: dict[str, Any]) -> Path:
    """Write a state whose run fingerprint has no entry ``init_from``, as older versions wrote it."""
    flags = [] if init_from is None else [f"--init_from={init_from}"]
    trained = TrainedState(*({"w": torch.zeros(1)} for _ in range(3)), adam_step=3)
    return write_state(folder, Progress(step=3), trained, identity, parse_config(flags), 1)


@pytest.mark.parametrize(
    ("before", "now", "same"),
    [
        ("a.pt", "a.pt", True),
        ("a.pt", "b.pt", False),
        ("a.pt", None, False),
        (None, "a.pt", False),
        (None, None, True),
        ("gone.pt", "gone.pt", True),
    ],
)
def test_an_older_state_compares_the_path(
    before: str | None, now: str | None, same: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.pt", "b.pt"):  # equal content, which an older state does not know
        Path(name).write_bytes(b"content")
    config = parse_config([] if now is None else [f"--init_from={now}"])
    identity = compute_run_fingerprint(config, "n", "e")
    assert "init_from" not in identity
    state = older_state(tmp_path / "state", before, identity)
    assert json.loads((state / "state.json").read_text())["config"]["init_from"] == before
    current = {**identity, "init_from": init_from_fingerprint(config)}
    if same:
        check_run_fingerprint(state, current, "another run")
    else:
        with pytest.raises(UserError, match=rf"^another run: init_from {before or None} -> {now or None}\b[^\n]*$"):
            check_run_fingerprint(state, current, "another run")


def test_a_state_without_settings_has_no_init_from(tmp_path: Path) -> None:
    """Its hash is not checked, because the oldest states have none for the record itself."""
    identity = compute_run_fingerprint(parse_config([]), "n", "e")
    state = older_state(tmp_path, "a.pt", identity)
    record = json.loads((state / "state.json").read_text())
    del record["sha256"]["state.json"], record["config"]
    (state / "state.json").write_text(json.dumps(record))
    check_run_fingerprint(state, {**identity, "init_from": None}, "another run")
