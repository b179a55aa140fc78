"""Checkpoint files in the original trainer's format."""

import errno
import math
import re
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from mmgraph.errors import UserError
from mmgraph.models.multimodal_graph_encoder import file_keys, uncompiled_name
from mmgraph.utils.error_text import one_line
from mmgraph.utils.files import write_durably

FLOATS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class TrainedState(NamedTuple):
    """The complete weights and Adam moments of the trained module, on the CPU, in the order of its parameters."""

    weights: dict[str, torch.Tensor]  # float32
    exp_avg: dict[str, torch.Tensor]  # Adam's first moments, float32; empty before the first step
    exp_avg_sq: dict[str, torch.Tensor]  # Adam's second moments, float32; empty before the first step
    adam_step: int  # number of steps that Adam has done


def parameters_by_name(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Yield a module's parameters with their names, without the prefix that ``torch.compile`` adds to names."""
    for name, parameter in module.named_parameters():
        yield uncompiled_name(name), parameter


class Checkpoint(NamedTuple):
    """Content of a checkpoint file in the original trainer's format. A final file contains only the model."""

    model_state_dict: dict[str, torch.Tensor]  # under the original trainer's keys
    optimizer_state_dict: dict[str, Any] | None = None
    epoch: int | None = None
    loss: float | None = None


def epoch_file(output: Path, epoch: int) -> Path:
    return output / "checkpoints" / f"multimodal_encoder_epoch_{epoch}.pt"


def epoch_files(output: Path) -> list[Path]:
    """Return the epoch files in a run's output folder, ordered by epoch."""
    names = [path.name for path in (output / "checkpoints").glob("*.pt")]
    numbers = [re.fullmatch(r"multimodal_encoder_epoch_(\d+)\.pt", name) for name in names]
    return [epoch_file(output, number) for number in sorted(int(match[1]) for match in numbers if match)]


def epoch_of(path: Path) -> int:
    """Return the epoch in the name of an epoch file."""
    return int(path.stem.rpartition("_")[2])


def final_file(output: Path) -> Path:
    return output / "checkpoints" / "multimodal_encoder_final.pt"


def has_checkpoint(output: Path) -> bool:
    """Return whether a folder is a run's output folder with an epoch file or a final file."""
    return final_file(output).is_file() or bool(epoch_files(output))


def best_file(output: Path) -> Path:
    return output / "checkpoints" / "multimodal_encoder_best.pt"


def write_checkpoint(path: Path, checkpoint: Checkpoint) -> None:
    """Write an epoch file. If the checkpoint's ``epoch`` is None, write a final file: only the ``model_state_dict``."""
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
    """Save ``content`` with ``torch.save``. Raise ``OSError`` if the file cannot be written."""
    try:
        torch.save(content, path)
    except RuntimeError as error:  # torch's C++ code raises RuntimeError if the disk is full
        raise OSError(errno.EIO, "torch.save could not write the file (is the disk full?)", str(path)) from error


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read an epoch or final file that mmgraph or the original trainer has written. No code in the file is run.

    The keys may have either of the two layouts that :func:`file_keys` accepts.

    Raises:
        UserError: the file does not exist, or is not a checkpoint in this format. The message contains the reason.
    """
    if not Path(path).is_file():
        raise UserError(f"{path}: no such file")
    try:
        content = load_safely(Path(path))
    except Exception as error:  # torch raises many types of errors for broken zips and forbidden pickles
        reason = one_line(error)[:200]
        raise UserError(f"{path}: cannot be read safely as a checkpoint ({type(error).__name__}: {reason})") from None
    is_epoch_file = isinstance(content, dict) and "model_state_dict" in content
    state = content["model_state_dict"] if is_epoch_file else content
    if not isinstance(state, dict) or not all(
        isinstance(key, str) and isinstance(tensor, torch.Tensor) for key, tensor in state.items()
    ):
        raise UserError(f"{path}: contains no model_state_dict")
    check_data(path, state)
    model = file_keys(state)
    for key, tensor in model.items():
        if tensor.dtype not in FLOATS:
            raise UserError(f"{path}: {key} is {tensor.dtype}, expected floating-point numbers of at least 16 bits")
    if "graph_proj.weight" not in model or "fusion.text_proj.weight" not in model:
        raise UserError(
            f"{path}: not a multimodal graph encoder: graph_proj.weight or fusion.text_proj.weight is missing"
        )
    if not is_epoch_file:
        return Checkpoint(model)
    missing = {"epoch", "optimizer_state_dict", "loss"} - content.keys()
    if missing:
        raise UserError(f"{path}: incomplete epoch file: {', '.join(sorted(missing))} missing")
    _check_optimizer(path, content["optimizer_state_dict"])
    try:
        loss = float(content["loss"])
    except (TypeError, ValueError, OverflowError, RuntimeError):
        raise UserError(f"{path}: loss is not a number") from None
    return Checkpoint(model, content["optimizer_state_dict"], _count(path, "epoch", content["epoch"]), loss)


def load_safely(path: Path, mmap: bool = False) -> Any:
    """Load a file from an untrusted source with ``torch.load``.

    No code in the file is run, and memory is allocated only for data that the file contains.

    Args:
        path: file to load.
        mmap: map the file into memory, so that a tensor is read from the disk only when it is used.

    Raises:
        ValueError: the file is not a zip, or its zip is compressed.
        Exception: any error that torch raises for a broken zip or a forbidden pickle.
    """
    if not zipfile.is_zipfile(path):  # torch's older format can declare tensors without their data
        raise ValueError(
            "not a zip file, which torch.save writes since torch 1.6; load an older file with torch and save it again"
        )
    with zipfile.ZipFile(path) as file:
        size = sum(entry.file_size for entry in file.infolist())
    if size > path.stat().st_size:  # torch.save does not compress
        raise ValueError(f"a compressed zip: {size:,} bytes in a file of {path.stat().st_size:,} bytes")
    return torch.load(path, map_location="cpu", mmap=mmap, weights_only=True)


def _check_optimizer(path: str | Path, content: object) -> None:
    """Raise :class:`UserError` unless ``content`` has the structure of a torch optimizer's state dict."""
    try:
        states = content["state"]  # type: ignore[index]
        values = {f"param {i}: {name}": value for i, state in states.items() for name, value in state.items()}
        fits = isinstance(content["param_groups"], list)  # type: ignore[index]
    except (KeyError, TypeError, AttributeError):
        fits = False
    if not fits or not all(isinstance(value, torch.Tensor | int | float) for value in values.values()):
        raise UserError(f"{path}: optimizer_state_dict is not the state dict of a torch optimizer")
    check_data(path, {name: value for name, value in values.items() if isinstance(value, torch.Tensor)})


def _count(path: str | Path, name: str, value: Any) -> int:
    try:
        number = float(value)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # e.g. a tensor of two numbers, or a complex number
        number = math.nan
    if not math.isfinite(number) or number < 0 or number != int(number):
        raise UserError(f"{path}: {name} is not an integer of at least 0")
    return int(number)


def check_data(path: str | Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise :class:`UserError` unless every tensor is dense, on the CPU, and has data for all of its elements.

    This rejects expanded tensors (strides of 0), sparse, nested and quantized tensors, and meta tensors.
    """
    for key, tensor in tensors.items():
        plain = not tensor.is_nested and tensor.layout is torch.strided and not tensor.is_quantized
        if not plain or tensor.device.type != "cpu" or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise UserError(f"{path}: {key} is not a dense CPU tensor with data for all of its elements")


def model_state(towers: Mapping[str, torch.Tensor], weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a ``model_state_dict`` in the original trainer's format: towers, fusion and heads, float32, on the CPU.

    Args:
        towers: tensors of the towers under the original trainer's keys.
        weights: tensors of the trained module.
    """
    return {key: tensor.detach().float().cpu().contiguous() for key, tensor in [*towers.items(), *weights.items()]}


def optimizer_state(trained: TrainedState, group: Mapping[str, Any]) -> dict[str, Any]:
    """Return the ``optimizer_state_dict`` in the format of torch's AdamW: one param group with params 0 to 31.

    Args:
        trained: the state that contains the moments.
        group: the optimizer's param group, which contains the settings.
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
    """Return the trained part of a checkpoint in float32. A final file has no moments, so they are empty.

    Args:
        checkpoint: content of the file.
        module: the module whose parameter names and shapes the tensors must have. It may be on the meta device.
        path: the file, for error messages.

    Raises:
        UserError: a tensor is missing or has another shape, or the moments are not AdamW's.
    """
    names, model = [name for name, _ in module.named_parameters()], checkpoint.model_state_dict
    trained = TrainedState({name: model[name] for name in names if name in model}, {}, {}, 0)
    states = (checkpoint.optimizer_state_dict or {}).get("state")
    if states:
        try:
            first, second = (
                {name: states[i][key] for i, name in enumerate(names)} for key in ("exp_avg", "exp_avg_sq")
            )
            trained = TrainedState(trained.weights, first, second, _count(path, "Adam step", states[0]["step"]))
        except KeyError:
            raise UserError(f"{path}: optimizer_state_dict does not fit AdamW with {len(names)} parameters") from None
    check_fit(trained, module, path)  # before float() allocates memory
    weights, first, second = ({name: tensor.float() for name, tensor in part.items()} for part in trained[:3])
    return TrainedState(weights, first, second, trained.adam_step)


def check_fit(trained: TrainedState, module: nn.Module, path: str | Path) -> None:
    """Raise :class:`UserError` unless weights and moments are floats with the names and shapes in ``module``."""
    parameters = dict(module.named_parameters())
    groups = {"weights": trained.weights}
    if trained.exp_avg or trained.exp_avg_sq:
        groups |= {"Adam's first moments": trained.exp_avg, "Adam's second moments": trained.exp_avg_sq}
    for label, tensors in groups.items():
        for name in [*parameters, *tensors]:
            actual, expected = (_described(source.get(name)) for source in (tensors, parameters))
            if actual != expected:
                raise UserError(f"{path}: {label} do not fit the model: {name} is {actual}, expected {expected}")


def _described(tensor: object) -> str:
    if not isinstance(tensor, torch.Tensor):
        return "missing"
    return f"{tuple(tensor.shape)}{'' if tensor.dtype in FLOATS else f' {tensor.dtype}'}"
