"""Loads the towers of a model. Each type of model has its own implementation; these functions select it."""

from types import ModuleType
from typing import Any

import torch
from transformers import PretrainedConfig

from mmgraph.errors import UserError
from mmgraph.towers import clip
from mmgraph.towers.tokens import Towers


def _implementation(model_name: str) -> ModuleType:
    """Return the module that implements the functions below for the ``model_type`` in a model's configuration.

    Raises:
        UserError: the configuration cannot be loaded, or its ``model_type`` is not implemented.
    """
    match _model_type(model_name):
        case "clip":
            return clip
        case other:
            raise UserError(f"--model_name {model_name}: model_type '{other}' is not implemented; supported: clip")


def _model_type(model_name: str) -> str:
    if model_name == clip.DEFAULT_MODEL:
        return "clip"  # no configuration is read, so the default model needs no access to the hub
    try:
        config, _ = PretrainedConfig.get_config_dict(model_name)
    except Exception as error:  # transformers raises various errors for broken files
        raise clip.no_model(model_name, error) from None
    return str(config.get("model_type", "clip"))  # transformers also loads CLIP models without a model_type


def load_towers(model_name: str) -> Towers:
    """Load both towers from a hub name or a folder. They are frozen, in float32, on the CPU.

    Raises:
        UserError: the model cannot be loaded, its ``model_type`` is not implemented, or weights are missing.
    """
    return _implementation(model_name).load_towers(model_name)


def tower_shapes(model_name: str) -> Towers:
    """Build both towers on torch's meta device from the model's configuration. No weights are loaded or allocated.

    Raises:
        UserError: the configuration cannot be loaded, or its ``model_type`` is not implemented.
    """
    return _implementation(model_name).tower_shapes(model_name)


def empty_towers(model_name: str) -> Towers:
    """Build both towers with random weights on torch's default device. Load weights from a checkpoint afterwards.

    The default model needs no files. For any other model, its configuration is read.

    Raises:
        UserError: the configuration cannot be loaded, or its ``model_type`` is not implemented.
    """
    return _implementation(model_name).empty_towers(model_name)


def load_tokenizer_and_processor(model_name: str) -> tuple[Any, Any]:
    """Load the tokenizer and the image processor that convert texts and images to tower inputs.

    Raises:
        UserError: they cannot be loaded, or the model's ``model_type`` is not implemented.
    """
    return _implementation(model_name).load_tokenizer_and_processor(model_name)


def read_tower_state(model_name: str) -> dict[str, torch.Tensor]:
    """Return both towers' tensors under the keys of checkpoint files, without loading the towers.

    Raises:
        UserError: see :func:`load_towers`.
    """
    return _implementation(model_name).read_tower_state(model_name)
