"""CLIP towers, based on the models of transformers.

Checkpoints store the towers' tensors under the keys of the original trainer (the single-GPU research trainer that
mmgraph grew from).
"""

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import (
    AutoTokenizer,
    CLIPConfig,
    CLIPImageProcessor,
    CLIPTextConfig,
    CLIPTextModel,
    CLIPVisionConfig,
    CLIPVisionModel,
)
from transformers.utils import cached_file
from transformers.utils import logging as transformers_logging

from mmgraph.config import Config
from mmgraph.errors import UserError
from mmgraph.towers.cost import transformer_flops
from mmgraph.towers.tokens import TowerOutput, Towers
from mmgraph.utils.error_text import one_line

DEFAULT_MODEL = Config.model_name
RANDOM_WEIGHTS_MARK = "UNTRAINED.txt"  # file that marks the towers of a demo graph
TOWER_NAMES = ("text_model", "vision_model")
COMMON_SETTINGS = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "hidden_act",
                   "layer_norm_eps")  # fmt: skip


@dataclass(frozen=True)
class CLIPTextTower:
    """CLIP's text tower, a :class:`mmgraph.towers.tokens.TextTower`."""

    model: CLIPTextModel

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    @property
    def length(self) -> int:
        return self.model.config.max_position_embeddings

    def tokens(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> TowerOutput:
        output = self.model(input_ids=input_ids, attention_mask=attention_mask)
        return TowerOutput(output.last_hidden_state, attention_mask, output.pooler_output)

    def flops(self, length: int) -> float:
        return _flops(self.model.config, length)

    def description(self) -> dict[str, Any]:
        return _settings(self.model.config, (*COMMON_SETTINGS, "max_position_embeddings", "eos_token_id"))


@dataclass(frozen=True)
class CLIPImageTower:
    """CLIP's image tower, a :class:`mmgraph.towers.tokens.ImageTower`."""

    model: CLIPVisionModel

    @property
    def width(self) -> int:
        return self.model.config.hidden_size

    @property
    def patches(self) -> int:
        return (self.image_size // int(self.model.config.patch_size)) ** 2  # type: ignore[arg-type]

    @property
    def image_size(self) -> int:
        return int(self.model.config.image_size)  # type: ignore[arg-type]

    def tokens(self, pixel_values: torch.Tensor) -> TowerOutput:
        output = self.model(pixel_values=pixel_values)
        patches = output.last_hidden_state[:, 1:]  # (N, 1 + P, d_vis) -> (N, P, d_vis), without the class token
        return TowerOutput(patches, None, output.pooler_output)

    def flops(self) -> float:
        return _flops(self.model.config, self.patches + 1)

    def description(self) -> dict[str, Any]:
        return _settings(self.model.config, (*COMMON_SETTINGS, "image_size", "patch_size"))


def _flops(config: CLIPTextConfig | CLIPVisionConfig, length: int) -> float:
    return transformer_flops(config.num_hidden_layers, config.hidden_size, config.intermediate_size, length)


def _settings(config: CLIPTextConfig | CLIPVisionConfig, names: Sequence[str]) -> dict[str, Any]:
    return {name: getattr(config, name) for name in names}


def load_towers(model_name: str) -> Towers:
    """Load both towers in float32 from a hub name or a folder.

    Raises:
        UserError: the model cannot be loaded as a CLIP model, or weights are missing.
    """
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # otherwise, each load warns that the other tower's weights are unused
    transformers_logging.disable_progress_bar()
    try:
        (text_model, text_report), (vision_model, vision_report) = (  # type: ignore[misc]
            model_class.from_pretrained(model_name, dtype=torch.float32, output_loading_info=True)
            for model_class in (CLIPTextModel, CLIPVisionModel)
        )
    except Exception as error:  # broken files raise various errors in transformers, tokenizers and safetensors
        raise no_model(model_name, error) from None
    finally:
        transformers_logging.set_verbosity(verbosity)
    missing = sorted({*text_report["missing_keys"], *vision_report["missing_keys"]})
    if missing:  # transformers initializes missing weights randomly
        raise UserError(
            f"--model_name {model_name}: no weights for {missing[0]} and {len(missing) - 1} more tensors; use a "
            "complete CLIP model"
        )
    return _freeze(text_model, vision_model)


def random_towers(text_config: CLIPTextConfig, vision_config: CLIPVisionConfig) -> Towers:
    """Build towers from their configurations. The weights are random, so load a checkpoint afterwards."""
    return _freeze(CLIPTextModel(text_config), CLIPVisionModel(vision_config))


def tower_shapes(model_name: str) -> Towers:
    """Build a model's towers on torch's meta device, without weights.

    Raises:
        UserError: the model's configuration cannot be loaded.
    """
    configs = _read_configs(model_name)
    with torch.device("meta"):
        return random_towers(*configs)


def empty_towers(model_name: str) -> Towers:
    """Build a model's towers with random weights. The default model needs no files.

    Raises:
        UserError: the model's configuration cannot be loaded.
    """
    if model_name == DEFAULT_MODEL:
        return random_towers(CLIPTextConfig(), CLIPVisionConfig())  # transformers' defaults describe this model
    return random_towers(*_read_configs(model_name))


def _read_configs(model_name: str) -> tuple[CLIPTextConfig, CLIPVisionConfig]:
    try:
        config = CLIPConfig.from_pretrained(model_name)
    except Exception as error:  # broken files raise various errors in transformers, tokenizers and safetensors
        raise no_model(model_name, error) from None
    return config.text_config, config.vision_config  # type: ignore[return-value]


def load_tokenizer_and_processor(model_name: str) -> tuple[Any, Any]:
    """Load the tokenizer and the image processor from a hub name or a folder.

    Raises:
        UserError: they cannot be loaded.
    """
    try:
        return AutoTokenizer.from_pretrained(model_name), CLIPImageProcessor.from_pretrained(model_name)
    except Exception as error:  # broken files raise various errors in transformers, tokenizers and safetensors
        raise no_model(model_name, error) from None


def _freeze(text_model: CLIPTextModel, vision_model: CLIPVisionModel) -> Towers:
    """Set both models to eval mode, disable their gradients, and wrap them as towers."""
    for model in (text_model, vision_model):
        model.eval().requires_grad_(False)
    return Towers(CLIPTextTower(text_model), CLIPImageTower(vision_model))


def tower_state(towers: Towers) -> dict[str, torch.Tensor]:
    """Return both towers' tensors under the original trainer's keys.

    With any version of transformers, each key starts with the tower's name twice.
    """
    return {
        file_key(f"{name}.{key}"): tensor
        for name, model in zip(TOWER_NAMES, (towers.text_model, towers.vision_model), strict=True)
        for key, tensor in model.state_dict().items()
    }


def file_key(key: str) -> str:
    """Return the original trainer's key for a tensor: the tower's name twice, then the tensor's name.

    Args:
        key: a key that starts with a tower's name once or twice. Other keys are returned unchanged.
    """
    tower, _, rest = key.partition(".")
    return f"{tower}.{key}" if tower in TOWER_NAMES and not rest.startswith(f"{tower}.") else key


def read_tower_state(model_name: str) -> dict[str, torch.Tensor]:
    """Return the :func:`tower_state` of a model, given by a hub name or a folder.

    The tensors are memory-mapped from the model's weight files, without building the towers. If a file is broken, or
    has other keys or shapes than the towers, this function calls :func:`load_towers` instead.

    Raises:
        UserError: see :func:`load_towers`.
    """
    expected = tower_state(tower_shapes(model_name))
    state: dict[str, torch.Tensor] = {}
    with suppress(Exception):  # for a broken file, load_towers() below raises a clearer error
        for file in _weight_files(model_name):
            tensors = (
                load_file(file) if file.endswith(".safetensors") else torch.load(file, mmap=True, weights_only=True)
            )
            state |= {file_key(key): tensor for key, tensor in tensors.items() if key.startswith(TOWER_NAMES)}
    if all(key in state and state[key].shape == tensor.shape for key, tensor in expected.items()):
        return {key: state[key] for key in expected}
    return tower_state(load_towers(model_name))  # another layout, or a broken file


def _weight_files(model_name: str) -> list[str]:
    """Return the weight files that transformers would load. The list is empty if no file is found."""
    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        try:
            path = cached_file(model_name, name)
        except (OSError, ValueError):  # the file does not exist, or the hub cannot be reached
            continue
        if not str(path).endswith(".json"):
            return [str(path)]
        parts = set(json.loads(Path(str(path)).read_text())["weight_map"].values())
        return [str(cached_file(model_name, part)) for part in sorted(parts)]
    return []


def no_model(model_name: str, error: Exception) -> UserError:
    """Return the error for a model that cannot be loaded."""
    reason = one_line(error)[:200]
    return UserError(
        f"--model_name {model_name}: no CLIP model, tokenizer or image processor could be loaded; give a folder, or "
        f"a hub name on a machine with access to the hub ({reason})"
    )


def has_random_weights(model_name: str) -> bool:
    """Return whether the model folder contains a demo graph's towers, which have random weights."""
    return (Path(model_name) / RANDOM_WEIGHTS_MARK).is_file()
