"""Towers of a model by its name: the one place that knows which implementation a model has."""

from types import ModuleType
from typing import Any

import torch
from transformers import PretrainedConfig

from mmgraph.errors import UserError
from mmgraph.towers import clip
from mmgraph.towers.tokens import Towers


def _implementation(model_name: str) -> ModuleType:
    """The module that has this module's functions for a model, by the ``model_type`` of its configuration.

    Raises:
        UserError: there is no such model, or its towers have no implementation.
    """
    match _model_type(model_name):
        case "clip":
            return clip
        case other:
            raise UserError(f"--model_name {model_name}: model_type '{other}' is not implemented; supported: clip")


def _model_type(model_name: str) -> str:
    if model_name == clip.DEFAULT_MODEL:
        return "clip"  # known without the hub
    try:
        config, _ = PretrainedConfig.get_config_dict(model_name)
    except Exception as error:  # whatever broken files make transformers raise
        raise clip.no_model(model_name, error) from None
    return str(config.get("model_type", "clip"))  # transformers loads a CLIP without it


def load_towers(model_name: str) -> Towers:
    """Load both towers in float32 from a hub name or a folder, on the CPU, frozen.

    Raises:
        UserError: there is no such model, its towers have no implementation, or weights are missing.
    """
    return _implementation(model_name).load_towers(model_name)


def tower_shapes(model_name: str) -> Towers:
    """Both towers on torch's meta device, from the model's configuration: no weights are loaded or allocated.

    Raises:
        UserError: as :func:`load_towers`.
    """
    return _implementation(model_name).tower_shapes(model_name)


def empty_towers(model_name: str) -> Towers:
    """Both towers on torch's default device, to be filled from a file. The default model needs no files of its own.

    Raises:
        UserError: as :func:`load_towers`.
    """
    return _implementation(model_name).empty_towers(model_name)


def load_tokenizer_and_processor(model_name: str) -> tuple[Any, Any]:
    """The tokenizer and the image processor that make the towers' inputs.

    Raises:
        UserError: as :func:`load_towers`.
    """
    return _implementation(model_name).load_tokenizer_and_processor(model_name)


def read_tower_state(model_name: str) -> dict[str, torch.Tensor]:
    """Both towers' tensors under the keys of checkpoint files, without loading the towers.

    Raises:
        UserError: as :func:`load_towers`.
    """
    return _implementation(model_name).read_tower_state(model_name)
