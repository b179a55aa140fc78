"""Finds where a run starts: from the beginning, from a state in its output folder, or from the ``--resume`` state."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from mmgraph.checkpoints.files import TrainedState, best_file, check_fit, read_checkpoint, trained_state
from mmgraph.checkpoints.progress import Progress
from mmgraph.checkpoints.resume_state import newest_state, read_record, read_state
from mmgraph.config import FIXED_ON_RESUME, Config
from mmgraph.errors import UserError
from mmgraph.models.multimodal_graph_encoder import TrainedModule
from mmgraph.towers.load import tower_shapes
from mmgraph.utils.log import log

NEW_RUN_HINT = "choose another --run_name (or --output_dir) for a new run"


def find_state(config: Config, run_fingerprint: Mapping[str, Any]) -> Path | None:
    """Return the state to resume from, or None for a new run.

    Raises:
        UserError: the output folder contains another run, checkpoints but no valid state, a newer state than the one
            that ``--resume`` names, or (with ``--resume never``) any run; the state that ``--resume`` names is invalid;
            or the ``--init_from`` file of a new run does not exist.
    """
    state = _find(config, run_fingerprint)
    if state is None and config.init_from is not None and not Path(config.init_from).is_file():
        raise UserError(f"--init_from {config.init_from}: no such file")
    return state


def _find(config: Config, run_fingerprint: Mapping[str, Any]) -> Path | None:
    output = config.output_folder
    if config.resume not in ("auto", "never"):
        return _named_state(Path(config.resume), output, run_fingerprint)
    if config.resume == "never":
        if _used(output) or (output / "metrics.jsonl").exists():
            raise UserError(f"--resume never: {output} contains a run; {NEW_RUN_HINT}")
        return None
    state = newest_state(output / "state", on_invalid=log)
    if state is None:
        if _used(output):
            raise UserError(f"{output} contains checkpoints but no valid state to resume from; {NEW_RUN_HINT}")
        return None
    check_run_fingerprint(state, run_fingerprint, f"{output} contains another run")
    return state


def _named_state(state: Path, output: Path, run_fingerprint: Mapping[str, Any]) -> Path:
    read_record(state)
    newest = newest_state(output / "state", on_invalid=log)
    if newest is not None and newest.resolve() != state.resolve():
        raise UserError(
            f"--resume {state}: {output} has a newer state, {newest.name}; set --resume auto to resume from it, or "
            f"{NEW_RUN_HINT}"
        )
    if newest is None and _used(output):
        raise UserError(f"--resume {state}: {output} contains another run's checkpoints; {NEW_RUN_HINT}")
    check_run_fingerprint(state, run_fingerprint, f"--resume {state} belongs to another run")
    return state


def read_start(
    config: Config, state: Path | None, run_fingerprint: Mapping[str, Any], frozen: Mapping[str, torch.Tensor]
) -> tuple[Progress, TrainedState | None]:
    """Return the progress and the trained state at the start of a run.

    The trained state is None if the run starts from random weights.

    Args:
        config: the run's settings.
        state: from :func:`find_state`.
        run_fingerprint: the run's fingerprint, including the towers.
        frozen: the towers' tensors under the original trainer's keys. An ``--init_from`` file must have equal tensors.

    Raises:
        UserError: the state belongs to a run with another fingerprint, the state or the ``--init_from`` file does not
            fit the model, or the file's epoch is not before ``--epochs``.
    """
    if state is not None:
        check_run_fingerprint(state, run_fingerprint, f"{state} was written with other towers")
        progress, trained = read_state(state)
        check_fit(trained, _empty_module(config), state)
        if state.parent.resolve() != (config.output_folder / "state").resolve():
            progress.leave_folder()
        return progress, trained
    if config.init_from is not None:
        trained, epoch = _read_init_from(config, frozen)
        return Progress(epoch=epoch + 1), trained
    return Progress(), None


def _read_init_from(config: Config, frozen: Mapping[str, torch.Tensor]) -> tuple[TrainedState, int]:
    """Return the trained state and the last finished epoch of the ``--init_from`` file.

    The towers in the file must be equal to those of this run.
    """
    path = Path(str(config.init_from))
    checkpoint = read_checkpoint(path)
    for key, tensor in frozen.items():
        other = checkpoint.model_state_dict.get(key)
        if other is None or other.shape != tensor.shape or not torch.equal(other.float(), tensor.float()):
            raise UserError(
                f"--init_from {path}: the towers in the file differ from --model_name {config.model_name} (in {key}); "
                "set --model_name to the model that the file was trained with"
            )
    epoch = checkpoint.epoch or 0
    if epoch >= config.epochs:
        raise UserError(f"--init_from {path}: epoch {epoch} is already finished; raise --epochs (now {config.epochs})")
    module = _empty_module(config)
    extra = checkpoint.model_state_dict.keys() - frozen.keys() - dict(module.named_parameters()).keys()
    if extra:
        raise UserError(f"--init_from {path}: contains {min(extra)}, which is not a tensor of this model")
    return trained_state(checkpoint, module, path), epoch


def _empty_module(config: Config) -> TrainedModule:
    """Return the run's trained module on the meta device. It has names and shapes to compare with, but no data."""
    widths = tower_shapes(config.model_name).widths
    with torch.device("meta"):
        return TrainedModule(*widths, config.fused_dim, config.proj_dim)


def _used(output: Path) -> bool:
    """Whether an output folder contains states, or checkpoints other than the best file."""
    best = best_file(output)  # the first evaluation may write this file before the first state exists
    written = [path for path in (output / "checkpoints").glob("*.pt") if path != best]
    return bool(written) or any((output / "state").glob("step-*/state.json"))


def check_run_fingerprint(state: Path, run_fingerprint: Mapping[str, Any], what: str) -> None:
    """Raise :class:`UserError` if a state belongs to a run with another fingerprint.

    Args:
        state: folder of the state.
        run_fingerprint: fingerprint of this run.
        what: start of the error message; the differences follow.
    """
    defaults = {name: getattr(Config, name) for name in FIXED_ON_RESUME}  # values of flags that an older state lacks
    record = read_record(state)
    path = record["config"].get("init_from") if isinstance(record.get("config"), dict) else None
    init_from = None if path is None else {"file": path, "sha256": None}  # of older states, which have only the path
    before = {**defaults, "init_from": init_from, **record["identity"]}
    differences = [
        f"{name} {_short(before.get(name))} -> {_short(value)}"
        for name, value in run_fingerprint.items()
        if before.get(name) != value and not (name == "init_from" and _same_file(before[name], value))
    ]
    if differences:
        raise UserError(f"{what}: {', '.join(differences)}; {NEW_RUN_HINT}")


def init_from_fingerprint(config: Config) -> dict[str, str | None] | None:
    """Return path and SHA-256 of the ``--init_from`` file; None without the flag. A missing file has no SHA-256."""
    if config.init_from is None:
        return None
    try:
        with Path(config.init_from).open("rb") as file:
            return {"file": config.init_from, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError:  # a resumed run does not need the file any more
        return {"file": config.init_from, "sha256": None}


def keep_init_from(state: Path | None, fingerprint: dict[str, Any] | None) -> dict[str, Any] | None:
    """Return the fingerprint of ``--init_from``. If the file is missing, it has the SHA-256 that the state has."""
    if state is None or fingerprint is None or fingerprint["sha256"] is not None:
        return fingerprint
    return read_record(state)["identity"].get("init_from") or fingerprint


def _same_file(before: Mapping[str, Any] | None, now: Mapping[str, Any] | None) -> bool:
    """Whether two fingerprints of ``--init_from`` name the same file. Without both SHA-256, the path decides."""
    if before is None or now is None:
        return before is now
    if before["sha256"] and now["sha256"]:
        return bool(before["sha256"] == now["sha256"])
    return bool(before["file"] == now["file"])


def _short(value: object) -> str:
    if isinstance(value, dict):
        return " ".join(_short(part) for part in value.values() if part)
    return f"{value[:8]}..." if isinstance(value, str) and len(value) == 64 else str(value)  # a SHA-256
