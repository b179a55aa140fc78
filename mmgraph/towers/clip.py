"""The frozen CLIP towers, and the token source that the trainer reads them through."""

import json
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
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
from mmgraph.towers.tokens import Towers

TOWER_NAMES = ("text_model", "vision_model")


def load_towers(model_name: str) -> Towers:
    """Load both towers in float32 from a hub name or a folder.

    Raises:
        UserError: there is no such model, or it is no CLIP.
    """
    shown = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()  # a CLIP checkpoint holds the other tower too: not worth a report
    transformers_logging.disable_progress_bar()
    try:
        (text_model, text_report), (vision_model, vision_report) = (  # type: ignore[misc]
            kind.from_pretrained(model_name, dtype=torch.float32, output_loading_info=True)
            for kind in (CLIPTextModel, CLIPVisionModel)
        )
    except Exception as error:  # whatever broken files make transformers, tokenizers and safetensors raise
        raise _no_model(model_name, error) from None
    finally:
        transformers_logging.set_verbosity(shown)
    missing = sorted({*text_report["missing_keys"], *vision_report["missing_keys"]})
    if missing:  # transformers would go on with random weights
        raise UserError(f"--model_name {model_name}: holds no weights for {missing[0]} and {len(missing) - 1} more")
    return freeze(text_model, vision_model)


def random_towers(text_config: CLIPTextConfig, vision_config: CLIPVisionConfig) -> Towers:
    """Towers of the given shape with random weights, to be filled from a file."""
    return freeze(CLIPTextModel(text_config), CLIPVisionModel(vision_config))


def load_tower_configs(model_name: str) -> tuple[CLIPTextConfig, CLIPVisionConfig]:
    """The shapes of both towers, without their weights. Raises :class:`UserError` where there is no such model."""
    try:
        config = CLIPConfig.from_pretrained(model_name)
    except Exception as error:  # whatever broken files make transformers, tokenizers and safetensors raise
        raise _no_model(model_name, error) from None
    return config.text_config, config.vision_config  # type: ignore[return-value]


def load_tokenizer_and_processor(model_name: str) -> tuple[Any, Any]:
    """The tokenizer and the image processor of a hub name or folder. Raises :class:`UserError` where there is none."""
    try:
        return AutoTokenizer.from_pretrained(model_name), CLIPImageProcessor.from_pretrained(model_name)
    except Exception as error:  # whatever broken files make transformers, tokenizers and safetensors raise
        raise _no_model(model_name, error) from None


def freeze(text_model: nn.Module, vision_model: nn.Module) -> Towers:
    """Eval mode and no gradients, for both."""
    for tower in (text_model, vision_model):
        tower.eval().requires_grad_(False)
    return Towers(text_model, vision_model)


def tower_state(towers: Towers) -> dict[str, torch.Tensor]:
    """Both towers' tensors under the original's keys: the tower's name twice, whatever transformers calls them."""
    return {
        file_key(f"{name}.{key}"): tensor
        for name, tower in zip(TOWER_NAMES, towers, strict=True)
        for key, tensor in tower.state_dict().items()
    }


def file_key(key: str) -> str:
    """The original's key for a tower's tensor of either layout; other keys stay as they are."""
    tower, _, rest = key.partition(".")
    return f"{tower}.{key}" if tower in TOWER_NAMES and not rest.startswith(f"{tower}.") else key


def read_tower_state(model_name: str) -> dict[str, torch.Tensor]:
    """:func:`tower_state` of a hub name or a folder, without loading the towers: tensors lie in the mapped file.

    Raises:
        UserError: as :func:`load_towers`.
    """
    with torch.device("meta"):
        expected = tower_state(random_towers(*load_tower_configs(model_name)))
    found: dict[str, torch.Tensor] = {}
    with suppress(Exception):  # of a broken file: transformers says better what is wrong with it
        for file in _weight_files(model_name):
            whole = load_file(file) if file.endswith(".safetensors") else torch.load(file, mmap=True, weights_only=True)
            found |= {file_key(key): tensor for key, tensor in whole.items() if key.startswith(TOWER_NAMES)}
    if all(key in found and found[key].shape == tensor.shape for key, tensor in expected.items()):
        return {key: found[key] for key in expected}
    return tower_state(load_towers(model_name))  # of another layout, or broken


def _weight_files(model_name: str) -> list[str]:
    """The files of a model's weights: those that transformers would take."""
    for name in ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"):
        try:
            path = cached_file(model_name, name)
        except (OSError, ValueError):  # not there, or no hub to ask
            continue
        if not str(path).endswith(".json"):
            return [str(path)]
        parts = set(json.loads(Path(str(path)).read_text())["weight_map"].values())
        return [str(cached_file(model_name, part)) for part in sorted(parts)]
    return []


def widths(towers: Towers) -> tuple[int, int]:
    """The widths of their tokens: d_text and d_vis."""
    return tuple(tower.config.hidden_size for tower in towers)  # type: ignore[union-attr, return-value]


def _no_model(model_name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(
        f"--model_name {model_name}: no CLIP model, tokenizer or image processor could be loaded from there; give a "
        f"folder, or a hub name on a machine that reaches the hub ({reason})"
    )


STAND_IN = "UNTRAINED.txt"


def is_stand_in(model_name: str) -> bool:
    """Whether these are a demo graph's towers."""
    return (Path(model_name) / STAND_IN).is_file()


DEFAULT_MODEL = Config.model_name


def tower_configs(model_name: str) -> tuple[CLIPTextConfig, CLIPVisionConfig]:
    """The shapes of both towers. Raises :class:`UserError` where there is no such model."""
    if model_name == DEFAULT_MODEL:
        return CLIPTextConfig(), CLIPVisionConfig()  # transformers' defaults are this model's: no hub is needed
    return load_tower_configs(model_name)
