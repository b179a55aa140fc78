"""Damaged, malicious and unrelated files in the place of resume states and checkpoints."""

import errno
import hashlib
import io
import itertools
import json
import math
import os
import pickle
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import targets
import torch
from conftest import error_of, line_with
from runs import brief, check_same, each, run
from safetensors.torch import load_file, save_file

from mmgraph import load_pretrained_encoder
from mmgraph.arguments import build_config
from mmgraph.checkpoints.files import read_checkpoint
from mmgraph.checkpoints.resume_state import newest_state, read_record, state_folders
from mmgraph.checkpoints.run_start import read_start
from mmgraph.distributed.launch import peak_memory_gb
from mmgraph.errors import UserError
from mmgraph.evaluation.command import find_features
from mmgraph.towers.clip import read_tower_state

FILES = ("trainable.safetensors", "optimizer.safetensors", "state.json")
Cases = Callable[[int], None]


@pytest.fixture(scope="module")
def done(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the output folder of a complete run, which holds its last two states."""
    output = tmp_path_factory.mktemp("done") / "run"
    assert run(brief(graph, output)).code == 0
    return output


def flip(data: bytes, offset: int, bit: int) -> bytes:
    return data[:offset] + bytes([data[offset] ^ 1 << bit]) + data[offset + 1 :]


@pytest.mark.fault("a file of a resume state truncated, or one of its bits flipped: detected")
@pytest.mark.parametrize("places", [50, pytest.param(2000, marks=pytest.mark.slow)])
def test_damaged_states_are_logged_and_skipped(done: Path, tmp_path: Path, cases: Cases, places: int) -> None:
    output = tmp_path / "run"
    shutil.copytree(done, output)
    newest, older = state_folders(output / "state")
    generator, tried = torch.Generator().manual_seed(0), 0
    for name in FILES:
        path = newest / name
        intact = path.read_bytes()
        drawn = torch.randint(len(intact), (places,), generator=generator).tolist()
        ends = [0, 1, 7, 8, len(intact) - 1]
        damaged = [intact[:offset] for offset in [*ends, *drawn]]
        damaged += [flip(intact, offset, offset % 8) for offset in [*ends[:-2], *drawn, len(intact) - 1]]
        damaged += [intact + b"\n", intact + b"\0"]
        for content in damaged:
            path.write_bytes(content)
            lines: list[Any] = []
            assert newest_state(output / "state", lines.append) == older
            assert str(path) in lines[0], lines
            with pytest.raises(UserError, match=name):
                read_record(newest)
            tried += 1
        path.unlink()
        assert newest_state(output / "state", lines.append) == older
        path.write_bytes(intact)
    assert newest_state(output / "state", print) == newest
    cases(tried)


@pytest.mark.fault("each bit of a state.json flipped: detected")
@pytest.mark.slow
def test_each_bit_of_a_state_json(done: Path, tmp_path: Path, cases: Cases) -> None:
    state = tmp_path / "step-00000012"
    shutil.copytree(state_folders(done / "state")[0], state)
    path, tried = state / "state.json", 0
    intact = path.read_bytes()
    for offset in range(len(intact)):
        for bit in range(8):
            path.write_bytes(flip(intact, offset, bit))
            with pytest.raises(UserError, match=r"state\.json"):
                read_record(state)
            tried += 1
    cases(tried)


@pytest.mark.fault("a run resumed with a damaged newest state: continues from the state before it")
def test_resume_from_the_state_before_a_damaged_one(graph: Path, done: Path, tmp_path: Path, cases: Cases) -> None:
    def check(name: str) -> None:
        output = tmp_path / name
        shutil.copytree(done, output)
        newest, older = state_folders(output / "state")
        path = newest / name
        path.write_bytes(flip(path.read_bytes(), 1000, 3))
        refused = run(brief(graph, output, f"--resume={newest}"))
        assert refused.code == 2 and error_of(refused.said, path)
        ended = run(brief(graph, output))
        assert ended.code == 0 and line_with(ended.said, path)
        assert line_with(ended.said, f"step {int(older.name[5:])}", older)
        check_same(output, done)

    cases(each(FILES, check))


@pytest.mark.fault("--keep_last with damaged states: they are not counted, and the last valid state is kept")
def test_retention_counts_only_valid_states(graph: Path, done: Path, tmp_path: Path) -> None:
    output = tmp_path / "run"
    first = run(brief(graph, output), ("after_step", {"step": 8, "action": "SIGKILL"}))
    assert first.code == -9 and [path.name[-2:] for path in state_folders(output / "state")] == ["06", "04"]
    (output / "state" / "step-00000004" / "state.json").write_text("{}")
    shutil.copytree(output / "state" / "step-00000004", output / "state" / "step-00000005")
    second = run(brief(graph, output), ("after_step", {"step": 9, "action": "SIGKILL"}))
    assert second.code == -9 and [path.name[-2:] for path in state_folders(output / "state")] == ["08", "06"]
    assert run(brief(graph, output)).code == 0
    check_same(output, done)


UNREADABLE = ["ESTALE", "EACCES", "EMFILE", "ENOMEM", "EIO"]


@pytest.mark.fault("a state that cannot be read at the moment: not treated as damaged (a bad sector is)")
def test_states_that_cannot_be_read_now(
    done: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cases: Cases
) -> None:
    states = tmp_path / "state"
    shutil.copytree(done / "state", states)
    newest, older = state_folders(states)
    open_file = io.open
    for name, path in itertools.product(UNREADABLE, (FILES[0], FILES[2])):
        number = getattr(errno, name)

        def failing_open(opened: Any, *arguments: Any, number: int = number, path: str = path, **named: Any) -> Any:
            if opened in (newest / path, older / path):
                raise OSError(number, os.strerror(number), str(opened))
            return open_file(opened, *arguments, **named)

        with monkeypatch.context() as patch:
            patch.setattr(io, "open", failing_open)
            if name == "EIO":
                assert newest_state(states, print) is None
            else:
                with pytest.raises(UserError, match=f"{path}.*{os.strerror(number)}"):
                    newest_state(states, print)
            resolve_name(targets.PRUNE_STATES)(states, newest, 2)
            assert state_folders(states) == ([newest] if name == "EIO" else [newest, older])
        shutil.rmtree(states)
        shutil.copytree(done / "state", states)
    cases(2 * len(UNREADABLE))


@pytest.mark.fault("unrelated files beside the states, and leftover temporary files: ignored or removed")
def test_unrelated_and_temporary_files(graph: Path, done: Path, tmp_path: Path, cases: Cases) -> None:
    output = tmp_path / "run"
    assert run(brief(graph, output), ("after_step", {"step": 8, "action": "SIGKILL"})).code == -9
    states = output / "state"
    newest = state_folders(states)[0]
    shutil.copytree(newest, states / "step-10.bak")
    shutil.copytree(newest, states / "step-00000010.bak")
    shutil.copytree(newest, states / ".tmp-4711")
    (states / ".tmp-4712").write_text("a file")
    for name in ("step-99", "step-00000099", "step-", "notes"):
        (states / name).mkdir()
    (states / "step-00000098").write_text("a file")
    (states / "step-00000012").write_text("a file in the place of a state")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "precious").touch()
    (states / "step-00000097").symlink_to(tmp_path / "elsewhere")
    (output / "checkpoints" / ".multimodal_encoder_epoch_2.pt..tmp").write_bytes(b"half")
    ended = run(brief(graph, output))
    assert ended.code == 0 and line_with(ended.said, "step 6", newest)
    kept = {"step-10.bak", "step-00000010.bak", "step-99", "step-", "notes", "step-00000098"}
    assert {path.name for path in states.iterdir()} == kept | {"step-00000012", "step-00000011"} - {"step-00000011"} | {
        "step-00000009"
    }
    assert (tmp_path / "elsewhere" / "precious").exists()
    for name in kept:
        path = states / name
        path.unlink() if path.is_file() else shutil.rmtree(path)
    check_same(output, done)
    cases(len(kept) + 6)


class MakesFolder:
    """A pickle of it creates the folder ``path`` when it is loaded."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def bomb(path: Path, source: Path, entry: str) -> None:
    """Write a copy of a checkpoint with compressed entries. One of them has 1.2 GB of zeros."""
    with zipfile.ZipFile(source) as old, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as new:
        for name in old.namelist():
            new.writestr(name, b"\0" * 1_200_000_000 if name.endswith(entry) else old.read(name))


def hostile_files(folder: Path, epoch_file: Path) -> dict[str, tuple[Path, str]]:
    """Return hostile checkpoints by name: the path, and a text that the error must contain besides the path."""
    intact = torch.load(epoch_file, weights_only=True)
    files = {}

    def add(name: str, reason: str, change: Callable[[dict[str, Any]], object] | None = None) -> Path:
        files[name] = path, reason = folder / f"{name}.pt", reason
        if change is not None:
            content = {**intact, "model_state_dict": dict(intact["model_state_dict"])}
            change(content)
            torch.save(content, path)
        return path

    model, wide = "model_state_dict", "fusion.text_proj.weight"
    pickle_ran = folder / "ran"  # exists if code of a pickle was run
    add("pickle", "weights_only", lambda content: content.update(epoch=MakesFolder(pickle_ran)))
    add("old pickle", "").write_bytes(pickle.dumps(MakesFolder(pickle_ran)))
    for entry in ("data/0", "data.pkl"):
        bomb(add(f"bomb {Path(entry).name}", "1,20"), epoch_file, entry)
    add("missing", "graph_proj.bias", lambda content: content[model].pop("graph_proj.bias"))
    add("extra", "malware.weight", lambda content: content[model].update({"malware.weight": torch.zeros(2)}))
    add(
        "shape",
        "text_proj.weight has shape (3, 3)",
        lambda content: content[model].update({"text_proj.weight": torch.zeros(3, 3)}),
    )
    add("huge", wide, lambda content: content[model].update({wide: torch.zeros(1).expand(10**7, 10**5)}))
    add(
        "sparse",
        wide,
        lambda content: content[model].update({wide: torch.sparse_coo_tensor(size=(10**7, 10**7))}),
    )
    add(
        "meta",
        wide,
        lambda content: content[model].update({wide: torch.empty(10**7, 10**7, device="meta")}),
    )
    add("wide", wide, lambda content: content[model].update({wide: torch.zeros(8_000_000, 1)}))
    add("scalar", "8", lambda content: content[model].update({wide: torch.zeros(())}))
    add(
        "nested",
        wide,
        lambda content: content[model].update({wide: torch.nested.nested_tensor([torch.zeros(2)])}),
    )
    add(
        "integers",
        "torch.int32",
        lambda content: content[model].update({wide: torch.zeros(16, 128, dtype=torch.int32)}),
    )
    add("complex", "torch.complex64", lambda content: content[model].update({wide: torch.zeros(16, 128) * 1j}))
    shared = torch.zeros(12_000_000, dtype=torch.float16)  # 24 MB, which would be 48 MB in float32 for each name
    trained = [name for name in intact[model] if not name.startswith(("text_model", "vision_model"))]
    add(
        "shared",
        "text_proj.weight has shape (12000000,)",
        lambda content: content[model].update(dict.fromkeys(trained, shared)),
    )
    add("text", model, lambda content: content.update({model: "weights"}))
    add("numbers", model, lambda content: content.update({model: {1: torch.zeros(1)}}))
    for name, epoch in (("list", [1]), ("negative", -5), ("infinite", math.inf), ("two", torch.ones(2)), ("half", 0.5)):
        add(f"epoch {name}", "epoch", lambda content, epoch=epoch: content.update(epoch=epoch))
    add("loss", "loss", lambda content: content.update(loss=10**400))
    for name, optimizer in (("none", None), ("list", [1]), ("no groups", {"state": {}}), ("text", {"state": "abc"})):
        add(
            f"optimizer {name}",
            "optimizer_state_dict",
            lambda content, optimizer=optimizer: content.update(optimizer_state_dict=optimizer),
        )
    torch.save(intact, add("before 1.6", "zip"), _use_new_zipfile_serialization=False)
    add("list", model, lambda content: None).write_bytes(_saved([1, 2]))
    add("empty", "").write_bytes(b"")
    add("noise", "").write_bytes(bytes(range(256)) * 40)
    add("cut", "").write_bytes(epoch_file.read_bytes()[:-2000])
    return files


def _saved(content: object) -> bytes:
    file = io.BytesIO()
    torch.save(content, file)
    return file.getvalue()


USED = (load_pretrained_encoder, build_config, UserError, find_features, read_start, read_tower_state, peak_memory_gb)
MEMORY = (
    targets.imports(*USED)
    + """
import sys
from pathlib import Path
import torch

graph, good, *hostile = sys.argv[1:]
towers = f"{graph}/towers"
frozen = read_tower_state(towers)

def read(path):
    settings = {"nodes": "n", "edges": "e", "model_name": towers, "fused_dim": 16, "proj_dim": 8, "init_from": path}
    config = build_config(settings)
    find_features([Path(path)])
    for reader in (lambda: load_pretrained_encoder(path, "cpu", model_name=towers),
                   lambda: read_start(config, None, {}, frozen)):
        try:
            reader()
            assert path == good, path
        except UserError:
            assert path != good

read(good)
before = peak_memory_gb(torch.device("cpu"))
for path in hostile:
    read(path)
print(peak_memory_gb(torch.device("cpu")) - before)
"""
)


@pytest.mark.fault("malicious checkpoint files (code in a pickle, zip bombs, wrong shapes and keys): refused")
@pytest.mark.parametrize("every", [8, pytest.param(1, marks=pytest.mark.slow)])
def test_hostile_checkpoints(graph: Path, done: Path, tmp_path: Path, cases: Cases, every: int) -> None:
    files = hostile_files(tmp_path, done / "checkpoints" / "multimodal_encoder_epoch_3.pt")
    for path, reason in files.values():
        with pytest.raises(UserError, match=r"\S") as raised:
            load_pretrained_encoder(path, "cpu", model_name=str(graph / "towers"))
        assert str(path) in str(raised.value) and reason in str(raised.value).replace(str(path), ""), raised.value

    def check(name: str) -> None:
        path, _ = files[name]
        ended = run(brief(graph, tmp_path / name.replace(" ", ""), f"--init_from={path}"))
        assert ended.code == 2 and error_of(ended.said, path)
        assert not list((tmp_path / name.replace(" ", "")).rglob("*.json*"))

    tried = each(sorted(files)[::every], check)
    assert not (tmp_path / "ran").exists()
    paths = [done / "checkpoints" / "multimodal_encoder_epoch_3.pt", *(path for path, _ in files.values())]
    command = [sys.executable, "-c", MEMORY, graph, *paths[::every]]
    measured = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(measured.stdout) < 0.3, measured.stdout  # GB; some files claim 1.2 GB or more
    wide = run(
        brief(
            graph, tmp_path / "other", f"--init_from={done}/checkpoints/multimodal_encoder_final.pt", "--fused_dim=32"
        )
    )
    final = done / "checkpoints/multimodal_encoder_final.pt"
    assert wide.code == 2 and "fusion." in error_of(wide.said, final).split(str(final))[1]
    assert read_checkpoint(done / "checkpoints" / "multimodal_encoder_final.pt").epoch is None
    cases(len(files) + tried + 1)


def sign(state: Path) -> None:
    """Update the hashes of a changed state. The hash of state.json is that of its content without this hash."""
    record = json.loads((state / "state.json").read_text())
    record["sha256"] = {name: hashlib.sha256((state / name).read_bytes()).hexdigest() for name in FILES[:2]}
    record["sha256"]["state.json"] = hashlib.sha256(json.dumps(record, indent=1).encode()).hexdigest()
    (state / "state.json").write_text(json.dumps(record, indent=1))


STATES: dict[str, tuple[str, Callable[[dict[str, torch.Tensor]], object]]] = {  # the file, the change
    "shape": ("trainable", lambda tensors: tensors.update({"graph_proj.bias": torch.zeros(3)})),
    "missing": ("trainable", lambda tensors: tensors.pop("graph_proj.bias")),
    "extra": ("trainable", lambda tensors: tensors.update(other=torch.zeros(3))),
    "dtype": ("trainable", lambda tensors: tensors.update({"graph_proj.bias": torch.zeros(8, dtype=torch.int32)})),
    "moment": ("optimizer", lambda tensors: tensors.update({"exp_avg.graph_proj.bias": torch.zeros(3)})),
    "no moment": ("optimizer", lambda tensors: tensors.pop("exp_avg_sq.graph_proj.bias")),
    "extra moment": ("optimizer", lambda tensors: tensors.update({"exp_avg.other": torch.zeros(3)})),
}


KEYS = {  # the tensor that the error must name
    **dict.fromkeys(("shape", "missing", "dtype", "moment", "no moment"), "graph_proj.bias"),
    **dict.fromkeys(("extra", "extra moment"), "other"),
}
RECORDS = [  # field of state.json, invalid value
    ("step", "12"), ("step", None), ("step", -1), ("step", 1.5), ("step", True), ("epoch", 0), ("samples_in_epoch", -7),
    ("adam_step", "x"), ("metrics_bytes", -5), ("epoch_sums", {"loss": "a"}), ("epoch_sums", []), ("loss_scale", 3),
    ("components", []), ("identity", 5), ("format", "1"),
]  # fmt: skip


@pytest.mark.fault("states with valid hashes and wrong contents: refused")
def test_wrong_contents_with_valid_hashes(graph: Path, done: Path, tmp_path: Path, cases: Cases) -> None:
    def check(case: str) -> None:
        name, change = STATES[case]
        output = tmp_path / case.replace(" ", "")
        shutil.copytree(done, output)
        newest = state_folders(output / "state")[0]
        path = newest / f"{name}.safetensors"
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        sign(newest)
        ended = run(brief(graph, output, "--max_steps=13"))
        line = error_of(ended.said, newest)
        assert ended.code == 2 and KEYS[case] in line, line

    cases(each(STATES, check))
    for field, value in RECORDS:
        output = tmp_path / "record"
        shutil.copytree(done, output)
        newest, older = state_folders(output / "state")
        record = json.loads((newest / "state.json").read_text())
        (newest / "state.json").write_text(json.dumps({**record, field: value}))
        sign(newest)
        with pytest.raises(UserError, match=re.escape(f"{newest / 'state.json'}")):
            read_record(newest)
        assert newest_state(output / "state", print) == older
        shutil.rmtree(output)
    output = tmp_path / "far"
    shutil.copytree(done, output)
    newest = state_folders(output / "state")[0]
    record = json.loads((newest / "state.json").read_text())
    (newest / "state.json").write_text(json.dumps({**record, "samples_in_epoch": 10**6}))
    sign(newest)
    ended = run(brief(graph, output, "--max_steps=13"))
    assert ended.code == 2 and error_of(ended.said, newest, "1,000,000", 192)
    cases(len(RECORDS) + 1)
    deep = tmp_path / "step-00000012"
    deep.mkdir()
    (deep / "state.json").write_text("[" * 100_000)
    with pytest.raises(UserError, match=re.escape(f"{deep / 'state.json'}")):
        read_record(deep)
