"""Lossless conversion of checkpoints between the original trainer's ``.pt`` format and safetensors."""

import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from mmgraph.checkpoints.files import Checkpoint, read_checkpoint, write_checkpoint
from mmgraph.errors import UserError
from mmgraph.models.multimodal_graph_encoder import file_keys
from mmgraph.utils.files import write_durably

OPTIMIZER = "optimizer_state_dict."  # key prefix of the optimizer's tensors; the parameter's number follows


def convert(source: Path, target: Path) -> None:
    """Convert an epoch or final file to the format that the file ending of ``target`` names.

    The model's tensors keep the original trainer's keys. In safetensors, an epoch file's optimizer state has the keys
    ``optimizer_state_dict.<param>.<name>``, where param is a number as in the ``.pt`` file. The epoch, the loss and the
    optimizer settings are in the metadata. The conversion back to ``.pt`` gives an epoch file again.

    Raises:
        UserError: the file endings are not one ``.pt`` and one ``.safetensors``; the source cannot be read; the source
            has optimizer settings that JSON cannot store; the target is a folder; or the target's folder does not
            exist.
    """
    if {source.suffix, target.suffix} != {".pt", ".safetensors"}:
        raise UserError(f"{source} -> {target}: one file must end in .pt and the other in .safetensors")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent}: no such folder; create it first")
    if target.is_dir():
        raise UserError(f"{target}: is a folder; pass a file name")
    if source.suffix == ".pt":
        checkpoint = read_checkpoint(source)
        tensors, metadata = _to_safetensors(checkpoint)
        # save_file is not used, because only the owner may read the files that it creates.
        write_durably(target, lambda path: path.write_bytes(save(tensors, metadata)))
    else:
        write_checkpoint(target, _read_safetensors(source))


def _to_safetensors(checkpoint: Checkpoint) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    tensors = dict(checkpoint.model_state_dict)
    metadata = {"format": "pt", "keys": json.dumps(list(tensors))}  # keys: safetensors loses their order
    if checkpoint.optimizer_state_dict is not None:
        for param, state in checkpoint.optimizer_state_dict["state"].items():
            tensors |= {f"{OPTIMIZER}{param}.{name}": torch.as_tensor(value) for name, value in state.items()}
        try:
            groups = json.dumps(checkpoint.optimizer_state_dict["param_groups"])
        except (TypeError, ValueError, RecursionError) as error:
            raise UserError(f"optimizer_state_dict: param_groups cannot be stored as JSON: {error}") from None
        metadata |= {"epoch": str(checkpoint.epoch), "loss": repr(checkpoint.loss), "param_groups": groups}
    return {key: tensor.contiguous() for key, tensor in tensors.items()}, metadata


def _read_safetensors(path: Path) -> Checkpoint:
    if not path.is_file():
        raise UserError(f"{path}: no such file")
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 - not a dict
        model = file_keys({key: tensor for key, tensor in tensors.items() if not key.startswith(OPTIMIZER)})
        model = {key: model[key] for key in json.loads(metadata.get("keys", "null")) or model}
        if "epoch" not in metadata:
            return Checkpoint(model)
        groups = json.loads(metadata["param_groups"])
        for group in groups:
            if "betas" in group:
                group["betas"] = tuple(group["betas"])  # JSON has no tuples
        epoch, loss = int(metadata["epoch"]), float(metadata["loss"])
        state: dict[int, dict[str, torch.Tensor]] = {}
        for key in sorted(key for key in tensors if key.startswith(OPTIMIZER)):
            param, name = key.removeprefix(OPTIMIZER).split(".")
            state.setdefault(int(param), {})[name] = tensors[key]
    except (SafetensorError, OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"{path}: not a converted checkpoint ({type(error).__name__}: {error})") from None
    state = {param: state[param] for param in sorted(state)}
    return Checkpoint(model, {"state": state, "param_groups": groups}, epoch, loss)
