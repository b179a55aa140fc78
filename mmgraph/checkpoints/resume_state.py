"""Resume states: one folder per state, written atomically, independent of the number of processes."""

import dataclasses
import errno
import hashlib
import json
import os
import platform
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

from safetensors import SafetensorError
from safetensors.torch import load_file, save

from mmgraph.checkpoints.files import TrainedState
from mmgraph.checkpoints.progress import Progress
from mmgraph.config import FIXED_ON_RESUME, Config
from mmgraph.errors import UserError
from mmgraph.models.multimodal_graph_encoder import uncompiled_name
from mmgraph.utils.environment import versions
from mmgraph.utils.files import sync
from mmgraph.utils.log import log

Result = TypeVar("Result")

FORMAT = 1
WEIGHTS, MOMENTS, RECORD = "trainable.safetensors", "optimizer.safetensors", "state.json"


class StateNotReadableError(UserError):
    """A newer mmgraph wrote the state, or it cannot be read now. It may be valid, so a run must not skip it."""


def compute_run_fingerprint(config: Config, nodes: str, edges: str) -> dict[str, Any]:
    """Return the settings and data fingerprints that determine a run's results. They must not change on resume.

    The caller adds the fingerprint of the towers after it has loaded the towers.

    Args:
        config: the run's settings.
        nodes: fingerprint of the node table.
        edges: fingerprint of the edge table.
    """
    known: dict[str, Any] = {name: getattr(config, name) for name in FIXED_ON_RESUME}
    if config.lr_schedule != "constant":  # the learning rate depends on the total number of steps
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
    """Write ``folder/step-<n>``, then remove all but the newest ``keep_last`` states. Call on the main process only.

    The write is atomic: the files are written to a temporary folder and synced, and the folder is renamed.

    Returns:
        The folder of the state.
    """
    folder.mkdir(parents=True, exist_ok=True)
    sync(folder.parent)  # makes the new folder durable, if mkdir() has created one
    for leftover in folder.glob(".tmp-*"):
        with suppress(OSError):  # on a network file system, a file in the leftover folder may still be open
            _remove(leftover)
    target, temporary = folder / f"step-{progress.step:08d}", folder / f".tmp-{os.getpid()}"
    try:
        hashes = _fill(temporary, progress, trained, run_fingerprint, config)
        # If this step was saved before with equal tensors, replace only the record. An evaluation may have changed it.
        if target.exists() and _same_tensors(target, hashes):
            (temporary / RECORD).replace(target / RECORD)
        else:
            _remove(target)  # if the target exists, it is invalid or has other tensors
            temporary.rename(target)
    finally:
        _remove(temporary)  # the folder still exists after an error, or if only the record was moved
    sync(target)
    sync(folder)
    try:
        _prune(folder, target, keep_last)
    except OSError as error:  # the new state is complete, so the run continues
        log(f"{folder}: cannot remove old states: {error}")
    return target


def _fill(
    folder: Path, progress: Progress, trained: TrainedState, run_fingerprint: dict[str, Any], config: Config
) -> dict[str, str]:
    """Write and sync a state's files in a new folder. Return the SHA-256 of each file."""
    folder.mkdir()
    moments = {f"exp_avg.{name}": tensor for name, tensor in trained.exp_avg.items()}
    moments |= {f"exp_avg_sq.{name}": tensor for name, tensor in trained.exp_avg_sq.items()}
    for name, tensors in ((WEIGHTS, trained.weights), (MOMENTS, moments)):
        (folder / name).write_bytes(save(tensors))  # save_file would create files that only the owner can read
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
        existing = read_record(path)["sha256"]
    except UserError:
        return False
    return all(existing[name] == hashes[name] for name in (WEIGHTS, MOMENTS))


def _prune(folder: Path, newest: Path, keep_last: int) -> None:
    """Keep ``newest`` and the newest valid states before it, ``keep_last`` in total. Remove all other states.

    States with a higher number than ``newest`` are removed too. They are invalid; otherwise the run would have resumed
    from them. An older state that cannot be read now is not counted. It is removed only if ``keep_last`` newer
    states are kept.
    """
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
    """Remove a folder, or a file or link that another program has put in its place."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def state_folders(folder: Path) -> list[Path]:
    """Return the folders named like states, newest first. The states may be invalid: see :func:`read_record`."""
    named = [path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{8,}", path.name) and path.is_dir()]
    return sorted(named, key=lambda path: int(path.name[5:]), reverse=True)


def newest_state(folder: Path, on_invalid: Callable[[str], object]) -> Path | None:
    """Return the newest valid state, or None. Call ``on_invalid`` with a message for each newer state that is invalid.

    Raises:
        StateNotReadableError: the newest state, apart from invalid ones, was written by a newer mmgraph or cannot be
            read now.
    """
    for path in state_folders(folder):
        try:
            read_record(path)
            return path
        except StateNotReadableError:
            raise
        except UserError as error:
            on_invalid(f"skipped an invalid state: {error}")
    return None


def newer_state(folder: Path, start: Path | None, progress: Progress) -> Path | None:
    """Return the newest valid state if another process has written it since the run read ``start``, else None.

    Args:
        folder: folder of the states.
        start: the state that the run resumes from; None for a new run, which has read no state.
        progress: the progress in ``start``.
    """
    newest = newest_state(folder, on_invalid=lambda line: None)
    if newest is None or start is None or newest.resolve() != start.resolve():
        return newest
    record = json.loads((newest / RECORD).read_text(encoding="utf-8"))  # newest_state has validated this file
    return newest if record["metrics_bytes"] != progress.metrics_bytes else None


def read_record(path: Path) -> dict[str, Any]:
    """Check the SHA-256 of each file of a state, and return its ``state.json``.

    Raises:
        StateNotReadableError: a newer mmgraph wrote the state, or a file cannot be read now.
        UserError: the folder is not a state, or a file is damaged. The message names the file.
    """
    try:
        text = _read(path / RECORD, Path.read_bytes).decode()
        record = json.loads(text)
        hashes = record["sha256"]
        # Check the record's own hash before its format, so that a damaged record is not taken for a newer format. All
        # formats compute this hash in the same way.
        if RECORD in hashes and (hashes[RECORD] != _digest(record) or text != _text(record)):
            raise UserError(f"{path / RECORD}: damaged, its content does not match its own SHA-256")
        if record["format"] > FORMAT:
            raise StateNotReadableError(
                f"{path}: written by a newer mmgraph in format {record['format']}, but this version reads "
                f"format {FORMAT}; update mmgraph"
            )
        if not {WEIGHTS, MOMENTS} <= hashes.keys() <= {WEIGHTS, MOMENTS, RECORD}:
            raise ValueError(f"sha256 lists {', '.join(hashes)} instead of {WEIGHTS} and {MOMENTS}")
        if not isinstance(record["identity"], dict):
            raise ValueError(f"invalid run fingerprint (identity): {record['identity']!r}")
        Progress.from_record(record)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path / RECORD}: damaged ({type(error).__name__}: {error})") from None
    for name in (WEIGHTS, MOMENTS):
        if _read(path / name, _sha256) != hashes.get(name):
            raise UserError(f"{path / name}: damaged, its SHA-256 differs from the one in {RECORD}")
    return record


def _read(path: Path, read: Callable[[Path], Result]) -> Result:
    """Return ``read(path)`` for a file of a state.

    Raises:
        StateNotReadableError: the file cannot be read now, for example because a network file system is not available
            or a permission is missing.
        UserError: the file does not exist or is damaged.
    """
    try:
        return read(path)
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise UserError(f"{path.parent}: not a resume state, {path.name} is missing") from None
    except OSError as error:
        if error.errno == errno.EIO:
            raise UserError(f"{path}: damaged, the disk failed to read it ({error.strerror})") from None
        raise StateNotReadableError(
            f"{path}: cannot be read now ({error.strerror or error}); run the command again, or remove "
            f"{path.parent.name} to resume from the state before it"
        ) from None


def _text(record: Mapping[str, Any]) -> str:
    return json.dumps(record, indent=1)


def _digest(record: Mapping[str, Any]) -> str:
    """Return the SHA-256 of a ``state.json``, computed without the entry for the file itself.

    Older states contain the hashes of the tensor files only, so they have no such entry.
    """
    others = {name: value for name, value in record["sha256"].items() if name != RECORD}
    return hashlib.sha256(_text({**record, "sha256": others}).encode()).hexdigest()


def readable_records(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield the records of the states in ``folder`` that can be read, newest first. Nothing in them is checked."""
    for state in state_folders(folder):
        with suppress(OSError, ValueError, RecursionError):
            record = json.loads((state / RECORD).read_text(encoding="utf-8"))
            if isinstance(record, dict):
                yield record


def read_identity(folder: Path) -> dict[str, Any]:
    """Return the run fingerprint in the newest readable state in ``folder``, or an empty dict. Tensors are not read."""
    identities = (record.get("identity") for record in readable_records(folder))
    return next((identity for identity in identities if isinstance(identity, dict)), {})


def read_state(path: Path) -> tuple[Progress, TrainedState]:
    """Return the progress and the tensors of a state. Raise :class:`UserError` if it is invalid."""
    record = read_record(path)
    progress = Progress.from_record(record)
    try:
        # Older versions wrote the prefix of torch.compile for compiled runs.
        weights, moments = (
            {uncompiled_name(name): tensor for name, tensor in load_file(path / file).items()}
            for file in (WEIGHTS, MOMENTS)
        )
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path}: {error}") from None
    first, second = (
        {key.removeprefix(f"{name}."): tensor for key, tensor in moments.items() if key.startswith(f"{name}.")}
        for name in ("exp_avg", "exp_avg_sq")
    )
    return progress, TrainedState(weights, first, second, progress.adam_step)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
