"""Where a run begins: from nothing, from a state in its output folder, or from a state that was named."""

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
    """The state to go on from, or None for a new run.

    Raises:
        UserError: the output folder holds another run, or one that ``--resume`` says not to touch; the state that was
            named is not valid.
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
            raise UserError(f"--resume never: {output} holds a run; {NEW_RUN_HINT}")
        return None
    state = newest_state(output / "state", tell=log)
    if state is None:
        if _used(output):
            raise UserError(f"{output} holds checkpoints but no valid state to go on from; {NEW_RUN_HINT}")
        return None
    check_run_fingerprint(state, run_fingerprint, f"{output} holds another run")
    return state


def _named_state(state: Path, output: Path, run_fingerprint: Mapping[str, Any]) -> Path:
    read_record(state)
    newest = newest_state(output / "state", tell=log)
    if newest is not None and newest.resolve() != state.resolve():
        raise UserError(
            f"--resume {state}: {output} has a newer state, {newest.name}; use --resume auto to continue from it, or "
            f"{NEW_RUN_HINT}"
        )
    if newest is None and _used(output):
        raise UserError(f"--resume {state}: {output} holds another run's checkpoints; {NEW_RUN_HINT}")
    check_run_fingerprint(state, run_fingerprint, f"--resume {state} is of another run")
    return state


def read_start(
    config: Config, state: Path | None, run_fingerprint: Mapping[str, Any], frozen: Mapping[str, torch.Tensor]
) -> tuple[Progress, TrainedState | None]:
    """Where a run begins, and with what, if not with random weights.

    Args:
        state: from :func:`find_state`.
        identity: of the run, with its towers.
        frozen: the towers' tensors under the original's keys, to compare with those of ``--init_from``.
    """
    if state is not None:
        check_run_fingerprint(state, run_fingerprint, f"{state} was made with other towers")
        progress, trained = read_state(state)
        check_fit(trained, _empty_module(config), state)
        if state.parent.resolve() != (config.output_folder / "state").resolve():
            progress.leave_folder()
        return progress, trained
    if config.init_from is not None:
        trained, epoch = _read_original(config, frozen)
        return Progress(epoch=epoch + 1), trained
    return Progress(), None


def _read_original(config: Config, frozen: Mapping[str, torch.Tensor]) -> tuple[TrainedState, int]:
    """The trained part and the finished epochs of ``--init_from``, whose towers must be this run's."""
    path = Path(str(config.init_from))
    checkpoint = read_checkpoint(path)
    for key, tensor in frozen.items():
        theirs = checkpoint.model_state_dict.get(key)
        if theirs is None or theirs.shape != tensor.shape or not torch.equal(theirs.float(), tensor.float()):
            raise UserError(f"--init_from {path}: its towers are not --model_name {config.model_name}'s ({key})")
    epoch = checkpoint.epoch or 0
    if epoch >= config.epochs:
        raise UserError(f"--init_from {path}: has finished epoch {epoch}; raise --epochs {config.epochs}")
    module = _empty_module(config)
    extra = checkpoint.model_state_dict.keys() - frozen.keys() - dict(module.named_parameters()).keys()
    if extra:
        raise UserError(f"--init_from {path}: has {min(extra)} too, which is not this model's")
    return trained_state(checkpoint, module, path), epoch


def _empty_module(config: Config) -> TrainedModule:
    """What the run trains, without memory: names, shapes and types to compare with."""
    widths = tower_shapes(config.model_name).widths
    with torch.device("meta"):
        return TrainedModule(*widths, config.fused_dim, config.proj_dim)


def _used(output: Path) -> bool:
    best = best_file(output)  # there from the first evaluation on, before a state
    made = [path for path in (output / "checkpoints").glob("*.pt") if path != best]
    return bool(made) or any((output / "state").glob("step-*/state.json"))


def check_run_fingerprint(state: Path, run_fingerprint: Mapping[str, Any], what: str) -> None:
    """Raise :class:`UserError` with the differences if a state belongs to a run with another fingerprint."""
    defaults = {name: getattr(Config, name) for name in FIXED_ON_RESUME}  # a state may be older than a flag
    before = {**defaults, **read_record(state)["identity"]}
    differences = [
        f"{name} {_short(before.get(name))} -> {_short(value)}"
        for name, value in run_fingerprint.items()
        if before.get(name) != value
    ]
    if differences:
        raise UserError(f"{what}: {', '.join(differences)}; {NEW_RUN_HINT}")


def _short(value: object) -> str:
    return f"{value[:8]}..." if isinstance(value, str) and len(value) == 64 else str(value)  # a SHA-256
