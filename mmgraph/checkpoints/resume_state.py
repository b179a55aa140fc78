"""Resume state: one consolidated folder a state, whole or not there, free of how many processes wrote it."""

import dataclasses
import errno
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from mmgraph.checkpoints.files import TrainedState
from mmgraph.checkpoints.progress import Progress
from mmgraph.config import FIXED_ON_RESUME, Config
from mmgraph.errors import UserError
from mmgraph.utils.environment import versions
from mmgraph.utils.files import sync
from mmgraph.utils.log import log

Result = TypeVar("Result")

FORMAT = 1
WEIGHTS, MOMENTS, RECORD = "trainable.safetensors", "optimizer.safetensors", "state.json"


class StateNotReadableError(UserError):
    """A state that a newer mmgraph wrote, or that cannot be read now: never to be passed over, nor to be removed."""


def compute_run_fingerprint(config: Config, nodes: str, edges: str) -> dict[str, Any]:
    """What may not change when a run goes on: data and all that enters the numbers. (Towers are added when loaded.)"""
    known: dict[str, Any] = {name: getattr(config, name) for name in FIXED_ON_RESUME}
    if config.lr_schedule != "constant":  # the rate of a step depends on the last one
        known |= {"epochs": config.epochs, "max_steps": config.max_steps}
    return known | {"nodes table": nodes, "edges table": edges}


def write_state(
    folder: Path,
    progress: Progress,
    trained: TrainedState,
    run_fingerprint: dict[str, Any],
    config: Config,
    keep_last: int,
) -> Path:
    """Write ``folder/step-<n>``: to a temporary name, synced, renamed; then remove all but the newest ``keep_last``.

    Called on the main process alone.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sync(folder.parent)  # where it may be new
    for leftover in folder.glob(".tmp-*"):
        with suppress(OSError):  # some file of it may be open still, on a network file system
            _remove(leftover)
    target, temporary = folder / f"step-{progress.step:08d}", folder / f".tmp-{os.getpid()}"
    try:
        hashes = _fill(temporary, progress, trained, run_fingerprint, config)
        if target.exists() and _same_tensors(target, hashes):  # evaluated since, or under raised limits
            (temporary / RECORD).replace(target / RECORD)
        else:
            _remove(target)  # an invalid one
            temporary.rename(target)
    finally:
        _remove(temporary)  # on a full disk it is in the way
    sync(target)
    sync(folder)
    try:
        _prune(folder, target, keep_last)
    except OSError as error:  # the new state is there: no reason to end
        log(f"{folder}: states that are no longer needed cannot be removed: {error}")
    return target


def _fill(
    folder: Path, progress: Progress, trained: TrainedState, run_fingerprint: dict[str, Any], config: Config
) -> dict[str, str]:
    """Make a state's files in a new folder, synced. Returns the SHA-256 of each."""
    folder.mkdir()
    moments = {f"exp_avg.{name}": tensor for name, tensor in trained.exp_avg.items()}
    moments |= {f"exp_avg_sq.{name}": tensor for name, tensor in trained.exp_avg_sq.items()}
    for name, tensors in ((WEIGHTS, trained.weights), (MOMENTS, moments)):
        (folder / name).write_bytes(save(tensors))  # safetensors' own save_file lets nobody else read the file
    record: dict[str, Any] = {
        "format": FORMAT,
        **progress.to_record(),
        "identity": run_fingerprint,
        "config": dataclasses.asdict(config),
        "versions": versions(("mmgraph", "torch", "accelerate", "transformers"))
        | {"python": platform.python_version()},
        "sha256": {name: _sha256(folder / name) for name in (WEIGHTS, MOMENTS)},
    }
    record["sha256"][RECORD] = _digest(record)
    (folder / RECORD).write_text(_text(record), encoding="utf-8")
    for name in (WEIGHTS, MOMENTS, RECORD):
        sync(folder / name)
    sync(folder)
    return record["sha256"]


def _same_tensors(path: Path, hashes: dict[str, str]) -> bool:
    try:
        found = read_record(path)["sha256"]
    except UserError:
        return False
    return all(found[name] == hashes[name] for name in (WEIGHTS, MOMENTS))


def _prune(folder: Path, newest: Path, keep_last: int) -> None:
    """Keep ``newest`` and the valid states before it, ``keep_last`` in all. What is numbered above it was not valid:
    the run would have gone on from there."""
    kept = 0
    for path in state_folders(folder):
        try:
            keep = path == newest or (0 < kept < keep_last and bool(read_record(path)))
        except StateNotReadableError:
            continue
        except UserError:
            keep = False
        if keep:
            kept += 1
        else:
            _remove(path)


def _remove(path: Path) -> None:
    """Remove whatever has this name: a folder, or a file or link that somebody put there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def state_folders(folder: Path) -> list[Path]:
    """Folders named like states, the newest first; whether they are valid is for :func:`read_state` to say."""
    named = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir()]
    return sorted(named, key=lambda path: int(path.name[5:]), reverse=True)


def newest_state(folder: Path, tell: Callable[[str], object]) -> Path | None:
    """The newest valid state; ``tell`` gets a line for each newer one that is not."""
    for path in state_folders(folder):
        try:
            read_record(path)
            return path
        except StateNotReadableError:
            raise
        except UserError as error:
            tell(f"ignored: {error}")
    return None


def newer_state(folder: Path, start: Path | None, progress: Progress) -> Path | None:
    """The newest valid state, where it is not the one that a run begins with, as it was read: somebody went on."""
    newest = newest_state(folder, tell=lambda line: None)
    if newest is None or start is None or newest.resolve() != start.resolve():
        return newest
    record = json.loads((newest / RECORD).read_text(encoding="utf-8"))  # was found valid just now
    return newest if record["metrics_bytes"] != progress.metrics_bytes else None


def read_record(path: Path) -> dict[str, Any]:
    """The ``state.json`` of a state whose files are whole.

    Raises:
        UserError: no state, a newer format, or a file that its SHA-256 does not match, or that cannot be read; with the
            file's name.
    """
    try:
        text = _read(path / RECORD, Path.read_bytes).decode()
        record = json.loads(text)
        hashes = record["sha256"]
        if RECORD in hashes and (hashes[RECORD] != _digest(record) or text != _text(record)):  # whatever the format
            raise UserError(f"{path / RECORD}: damaged, it is not what its own SHA-256 says")
        if record["format"] > FORMAT:
            raise StateNotReadableError(
                f"{path}: format {record['format']}, written by a newer mmgraph; this one reads format {FORMAT}"
            )
        if not {WEIGHTS, MOMENTS} <= hashes.keys() <= {WEIGHTS, MOMENTS, RECORD}:
            raise ValueError(f"has SHA-256 of {', '.join(hashes)}")
        if not isinstance(record["identity"], dict):
            raise ValueError(f"identity {record['identity']!r}")
        Progress.from_record(record)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path / RECORD}: damaged ({type(error).__name__}: {error})") from None
    for name in (WEIGHTS, MOMENTS):
        if _read(path / name, _sha256) != hashes.get(name):
            raise UserError(f"{path / name}: damaged, its SHA-256 is not the one in {RECORD}")
    return record


def _read(path: Path, how: Callable[[Path], Result]) -> Result:
    """Read a file of a state.

    Raises:
        StateNotReadableError: it may be read another time, as on a network file system, or with permission.
        UserError: it is not there, or damaged.
    """
    try:
        return how(path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise UserError(f"{path.parent}: not a state, it has no {path.name}") from None
    except OSError as error:
        if error.errno == errno.EIO:
            raise UserError(f"{path}: damaged, the disk cannot read it ({error.strerror})") from None
        raise StateNotReadableError(
            f"{path}: cannot be read now ({error.strerror or error}); start again, or remove {path.parent.name} to "
            "go on from the state before it"
        ) from None


def _text(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=1)


def _digest(record: Mapping[str, Any]) -> str:
    """SHA-256 of a ``state.json`` without its own. (States of before this had one of the tensors alone.)"""
    others = {name: value for name, value in record["sha256"].items() if name != RECORD}
    return hashlib.sha256(_text({**record, "sha256": others}).encode()).hexdigest()


def read_state(path: Path) -> tuple[Progress, TrainedState]:
    """A state's progress and tensors. Raises :class:`UserError` where it is not valid."""
    record = read_record(path)
    progress = Progress.from_record(record)
    try:
        weights, moments = load_file(path / WEIGHTS), load_file(path / MOMENTS)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: {error}") from None
    first, second = (
        {key.removeprefix(f"{kind}."): tensor for key, tensor in moments.items() if key.startswith(f"{kind}.")}
        for kind in ("exp_avg", "exp_avg_sq")
    )
    return progress, TrainedState(weights, first, second, progress.adam_step)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
