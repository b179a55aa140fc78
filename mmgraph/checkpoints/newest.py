"""Finds the newest checkpoint of a run, and the run that finished last.

The order comes from what was trained, never from the times of files, because a copy of a run changes these times.
"""

from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import SafetensorError, safe_open

from mmgraph.checkpoints.files import epoch_files, epoch_of, final_file, load_safely
from mmgraph.checkpoints.resume_state import WEIGHTS, readable_records, state_folders
from mmgraph.errors import UserError
from mmgraph.utils.environment import read_starts

COMPARED = "graph_proj.weight"  # trained tensor that differs between the epochs


class FinalRecord(NamedTuple):
    """What a resume state says of the final file."""

    time: str  # when it was written, UTC
    epoch: int  # the epoch in progress then, from 1


def last_checkpoint(folder: Path) -> Path:
    """Return the epoch file or final file of a run that was trained for the most steps.

    The final file is older than the epoch files that the run has written after it was continued. The resume state
    records the step of the final file. Without this record, the final file is taken to be as old as the epoch file with
    equal weights; otherwise, to be the newest file if the newest state has its weights.

    Raises:
        UserError: the run has not written such a file.
    """
    final, epochs = final_file(folder), epoch_files(folder)
    if not final.is_file():
        if not epochs:
            raise UserError(f"{folder}: the run has not written a checkpoint yet")
        return epochs[-1]
    return final if not epochs or _finished_epochs(folder) >= epoch_of(epochs[-1]) else epochs[-1]


def _finished_epochs(folder: Path) -> float:
    """Return the number of epochs that the final file has been trained for.

    If no file shows the number, return -1 if the run has continued since, else infinity.
    """
    record = _final_record(folder)
    if record is not None:
        return record.epoch - 1
    weights = _weights(final_file(folder))
    for path in reversed(epoch_files(folder)):
        other = _weights(path)
        if weights is not None and other is not None and torch.equal(weights, other):
            return epoch_of(path)
    states = state_folders(folder / "state")
    if weights is not None and states and not torch.equal(weights, _state_weights(states[0])):
        return -1  # the run has continued since its final file
    return float("inf")


def _final_record(folder: Path) -> FinalRecord | None:
    """Return the record of the final file in the newest state that has one, or None."""
    for record in readable_records(folder / "state"):
        with suppress(AttributeError, KeyError, TypeError, ValueError):
            final = record["components"].get("final")
            if final is not None:
                return FinalRecord(str(final["time"]), int(final["epoch"]))
    return None


def _weights(path: Path) -> torch.Tensor | None:
    """Return the tensor that is compared, or None if the file cannot be read."""
    try:
        content = load_safely(path, mmap=True)
        return content.get("model_state_dict", content)[COMPARED]
    except Exception:  # torch raises many types of errors for broken files, which are reported when the file is used
        return None


def _state_weights(state: Path) -> torch.Tensor:
    """Return the tensor that is compared; empty if the state cannot be read."""
    with suppress(OSError, SafetensorError), safe_open(state / WEIGHTS, "pt") as file:
        return file.get_tensor(COMPARED)
    return torch.empty(0)


def newest_run(runs: Path) -> Path:
    """Return the run in the folder ``runs`` that finished last. Raise :class:`UserError` if no run has finished.

    The resume state records when the final file was written. Without this record, the start of the run counts.
    """
    finished = [folder for folder in sorted(runs.glob("*")) if final_file(folder).is_file()]
    if not finished:
        raise UserError(f"no run in the folder {runs}/ has finished; give a run's folder")
    return max(finished, key=_finished_at)


def _finished_at(folder: Path) -> str:
    """Return the time (UTC) at which a run finished, as text that sorts by time; empty if no file shows it."""
    record = _final_record(folder)
    if record is not None:
        return record.time
    return str(next((start["time"] for start in reversed(read_starts(folder)) if "time" in start), ""))
