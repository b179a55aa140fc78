"""Checkpoint files in the original's format, and encoders from them."""

import errno
import math
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from mmgraph.errors import UserError
from mmgraph.models.multimodal_graph_encoder import file_keys
from mmgraph.utils.files import write_durably

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class TrainedState(NamedTuple):
    """The trained module and its optimizer, whole, on the CPU; in the order of the module's parameters."""

    weights: dict[str, torch.Tensor]  # float32
    exp_avg: dict[str, torch.Tensor]  # Adam's first moments by parameter; empty before the first step
    exp_avg_sq: dict[str, torch.Tensor]
    adam_step: int


class Checkpoint(NamedTuple):
    """What a file of the original's format holds; a final file has only the model."""

    model_state_dict: dict[str, torch.Tensor]  # under the original's keys
    optimizer_state_dict: dict[str, Any] | None = None
    epoch: int | None = None
    loss: float | None = None


def epoch_file(output: Path, epoch: int) -> Path:
    return output / "checkpoints" / f"multimodal_encoder_epoch_{epoch}.pt"


def epoch_files(output: Path) -> list[Path]:
    """The epoch files that a run has written, in order."""
    names = [path.name for path in (output / "checkpoints").glob("*.pt")]
    numbers = [re.fullmatch(r"multimodal_encoder_epoch_(\d+)\.pt", name) for name in names]
    return [epoch_file(output, number) for number in sorted(int(match[1]) for match in numbers if match)]


def final_file(output: Path) -> Path:
    return output / "checkpoints" / "multimodal_encoder_final.pt"


def best_file(output: Path) -> Path:
    return output / "checkpoints" / "multimodal_encoder_best.pt"


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write an epoch file, or, where there is no epoch, a final file: the bare ``model_state_dict``."""
    content: dict[str, Any] = checkpoint.model_state_dict
    if checkpoint.epoch is not None:
        content = {
            "epoch": checkpoint.epoch,
            "model_state_dict": checkpoint.model_state_dict,
            "optimizer_state_dict": checkpoint.optimizer_state_dict,
            "loss": checkpoint.loss,
        }
    path.parent.mkdir(parents=True, exist_ok=True)
    write_durably(path, lambda temporary: save(content, temporary))


def save(content: Any, path: Path) -> None:
    """``torch.save``, whose failures to write are an ``OSError``."""
    try:
        torch.save(content, path)
    except RuntimeError as error:  # its C++ has no other word for a full disk
        raise OSError(errno.EIO, "torch.save could not write it, as on a full disk", str(path)) from error


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read an epoch or final file, of mmgraph or the original, under either layout of keys. No code in it is run.

    Raises:
        UserError: no such file, or not a checkpoint of this format; with the reason.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        content = load_safely(Path(path))
    except Exception as error:  # torch raises whatever a broken zip or a forbidden pickle makes it raise
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{path}: not a checkpoint that can be read safely ({type(error).__name__}: {reason})"
        ) from None
    whole = isinstance(content, dict) and "model_state_dict" in content
    state = content["model_state_dict"] if whole else content
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in state.items()
    ):
        raise UserError(f"{path}: holds no model_state_dict")
    check_data(path, state)
    model = file_keys(state)
    for key, tensor in model.items():
        if tensor.dtype not in FLOATS:
            raise UserError(f"{path}: {key} holds {tensor.dtype}, not floating-point numbers of 16 bits or more")
    if "graph_proj.weight" not in state or "fusion.text_proj.weight" not in state:
        raise UserError(
            f"{path}: not a multimodal graph encoder: it has no graph_proj.weight or fusion.text_proj.weight"
        )
    if not whole:
        return Checkpoint(model)
    missing = {"epoch", "optimizer_state_dict", "loss"} - content.keys()
    if missing:
        raise UserError(f"{path}: an epoch file without {', '.join(sorted(missing))}")
    _check_optimizer(path, content["optimizer_state_dict"])
    try:
        loss = float(content["loss"])
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise UserError(f"{path}: its loss is no number") from None
    return Checkpoint(model, content["optimizer_state_dict"], _count(path, "epoch", content["epoch"]), loss)


def load_safely(path: Path, mmap: bool = False) -> Any:
    """``torch.load`` of a file from strangers: no code in it is run, and memory is given for what it holds alone.

    Args:
        mmap: leave tensors in the file, to be read as they are used.

    Raises:
        Exception: whatever a broken zip or a forbidden pickle makes torch raise.
    """
    if not zipfile.is_zipfile(path):  # torch's older format may claim tensors without having their data
        raise ValueError("no zip, as torch.save has written since torch 1.6; load and save an older file with torch")
    with zipfile.ZipFile(path) as file:
        size = sum(entry.file_size for entry in file.infolist())
    if size > path.stat().st_size:  # torch.save never compresses
        raise ValueError(f"a zip of {size:,} bytes in a file of {path.stat().st_size:,}")
    return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)


def _check_optimizer(path: str | Path, content: object) -> None:
    """Raise :class:`UserError` where an ``optimizer_state_dict`` is not made like one of torch's."""
    try:
        states = content["state"]  # type: ignore[index]
        values = {f"param {i}: {name}": value for i, state in states.items() for name, value in state.items()}
        fits = isinstance(content["param_groups"], list)  # type: ignore[index]
    except (KeyError, TypeError, AttributeError):
        fits = False
    if not fits or not all(isinstance(value, torch.Tensor | int | float) for value in values.values()):
        raise UserError(f"{path}: its optimizer_state_dict is not one of torch's")
    check_data(path, {name: value for name, value in values.items() if isinstance(value, torch.Tensor)})


def _count(path: str | Path, what: str, value: Any) -> int:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # such as a tensor of two numbers, or complex
        number = math.nan
    if not math.isfinite(number) or number < 0 or number != int(number):
        raise UserError(f"{path}: its {what} is no number of 0 or more")
    return int(number)


def check_data(path: str | Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise :class:`UserError` where a tensor is not what it looks like: of strides of 0, sparse, or of no data."""
    for key, tensor in tensors.items():
        plain = not tensor.is_nested and tensor.layout is torch.strided and not tensor.is_quantized
        if not plain or tensor.device.type != "cpu" or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: {key} is no plain tensor that has all of its data")


def model_state(towers: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """``model_state_dict`` as the original writes it: towers (under its keys), fusion, heads; float32, on the CPU."""
    return {key: tensor.detach().float().cpu().contiguous() for key, tensor in [*towers.items(), *weights.items()]}


def optimizer_state(trained: TrainedState, group: Mapping[str, Any]) -> dict[str, Any]:
    """``optimizer_state_dict`` as torch's AdamW writes it: one group over params 0..31.

    Args:
        group: the optimizer's param group, for its settings.
    """
    names = list(trained.weights)
    settings = {key: value for key, value in group.items() if key != "params"}
    state = {
        i: {
            "step": torch.tensor(float(trained.adam_step)),
            "exp_avg": trained.exp_avg[name],
            "exp_avg_sq": trained.exp_avg_sq[name],
        }
        for i, name in enumerate(names)
        if name in trained.exp_avg
    }
    return {"state": state, "param_groups": [{**settings, "params": list(range(len(names)))}]}


def trained_state(checkpoint: Checkpoint, module: nn.Module, path: str | Path) -> TrainedState:
    """The trained part of a file, float32; without moments where it is a final file.

    Args:
        module: what it is for, if only on torch's meta device; its parameters' names and shapes are compared.

    Raises:
        UserError: a tensor is missing or of another shape, or the moments are no AdamW's.
    """
    names, model = [name for name, _ in module.named_parameters()], checkpoint.model_state_dict
    found = TrainedState({name: model[name] for name in names if name in model}, {}, {}, 0)
    states = (checkpoint.optimizer_state_dict or {}).get("state")
    if states:
        try:
            first, second = (
                {name: states[i][key] for i, name in enumerate(names)} for key in ("exp_avg", "exp_avg_sq")
            )
            found = TrainedState(found.weights, first, second, _count(path, "Adam step", states[0]["step"]))
        except KeyError:
            raise UserError(f"{path}: its optimizer_state_dict is not AdamW's over {len(names)} parameters") from None
    check_fit(found, module, path)  # before more memory is given
    weights, first, second = ({name: tensor.float() for name, tensor in part.items()} for part in found[:3])
    return TrainedState(weights, first, second, found.adam_step)


def check_fit(trained: TrainedState, module: nn.Module, path: str | Path) -> None:
    """Raise :class:`UserError` where weights or moments have other names or shapes than the module's, or no floats."""
    expected = dict(module.named_parameters())
    kinds = {"weights": trained.weights}
    if trained.exp_avg or trained.exp_avg_sq:
        kinds |= {"Adam's first moments": trained.exp_avg, "Adam's second moments": trained.exp_avg_sq}
    for kind, tensors in kinds.items():
        for name in [*expected, *tensors]:
            found, wanted = (_described(among.get(name)) for among in (tensors, expected))
            if found != wanted:
                raise UserError(f"{path}: its {kind} do not fit the model: {name} is {found}, expected {wanted}")


def _described(tensor: object) -> str:
    if not isinstance(tensor, torch.Tensor):
        return "missing"
    return f"{tuple(tensor.shape)}{'' if tensor.dtype in FLOATS else f' {tensor.dtype}'}"
