"""The frozen CLIP towers, and the token source that the trainer reads them through."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
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

from mmgraph.data.images import Preprocessing
from mmgraph.errors import UserError

MODEL_FILES = (
    "config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    "vocab.json", "merges.txt", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
)  # fmt: skip


TOWER_NAMES = ("text_model", "vision_model")


class Tokens(NamedTuple):
    """What the towers say about U nodes: all that the trained module needs."""

    text: torch.Tensor  # (U, L, d_text) last hidden states of the text tower
    mask: torch.Tensor  # (U, L) 1 at valid text tokens, 0 at padding
    patches: torch.Tensor  # (U, P, d_vis) last hidden states of the vision tower, without the class token


class Towers(NamedTuple):
    """Both towers, frozen, in eval mode."""

    text_model: nn.Module
    vision_model: nn.Module


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


def fingerprint(state: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over both towers' tensors (names, shapes, bytes as float32), in hexadecimal."""
    digest = hashlib.sha256()
    for tower in TOWER_NAMES:
        prefix = f"{tower}.{tower}."
        for key in sorted(key for key in state if key.startswith(prefix)):
            tensor = state[key].detach().cpu().float().contiguous()
            digest.update(f"{key.removeprefix(prefix)} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_fingerprints(model_name: str) -> dict[str, str]:
    """SHA-256 of each file of a model, as they lie in its folder or in the hub cache here; empty if none do.

    In seconds, and without loading anything.

    Raises:
        UserError: it is neither a folder nor what could be a name on the hub.
    """
    found = {}
    for name in MODEL_FILES:
        folder = Path(model_name)
        try:
            path = folder / name if folder.is_dir() else try_to_load_from_cache(model_name, name)
        except ValueError as error:
            raise _no_model(model_name, error) from None
        if isinstance(path, str | Path) and Path(path).is_file():
            with Path(path).open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def widths(towers: Towers) -> tuple[int, int]:
    """The widths of their tokens: d_text and d_vis."""
    return tuple(tower.config.hidden_size for tower in towers)  # type: ignore[union-attr, return-value]


class LiveTowers:
    """The token source that runs the towers on every batch.

    Args:
        towers: moved to ``device``.
        preprocessing: of the towers' pictures.
        device: where batches are.
        dtype: what the towers compute in; 16-bit ones by autocast.
    """

    def __init__(
        self,
        towers: Towers,
        preprocessing: Preprocessing,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ):
        self.towers = Towers(*(tower.to(device) for tower in towers))
        self.preprocessing, self.device, self.dtype = preprocessing, device, dtype

    def batches(self, loader: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
        """The loader's batches, which have all that :meth:`tokens` needs."""
        return loader

    @torch.no_grad()
    def tokens(self, batch: Mapping[str, torch.Tensor], micro_batches: int = 1) -> Tokens:
        """Tokens of the batch's U distinct nodes: reads ``input_ids``, ``attention_mask`` and ``pictures``.

        Args:
            micro_batches: parts that the towers see one after the other.
        """
        inputs = [batch[name].tensor_split(micro_batches) for name in ("input_ids", "attention_mask", "pictures")]
        parts = [part for part in zip(*inputs, strict=True) if len(part[0])]
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            tokens = [
                run_towers(self.towers, input_ids, mask, self.preprocessing.normalize(pictures))[0]
                for input_ids, mask, pictures in parts
            ]
        return tokens[0] if len(tokens) == 1 else Tokens(*map(torch.cat, zip(*tokens, strict=True)))


def run_towers(
    towers: Towers, input_ids: torch.Tensor, attention_mask: torch.Tensor, pixel_values: torch.Tensor
) -> tuple[Tokens, torch.Tensor, torch.Tensor]:
    """Run both towers on N nodes: their tokens, and the pooled outputs (N, d_text) and (N, d_vis)."""
    text = towers.text_model(input_ids=input_ids, attention_mask=attention_mask)
    vision = towers.vision_model(pixel_values=pixel_values)
    patches = vision.last_hidden_state[:, 1:]  # (N, 1 + P, d_vis) -> (N, P, d_vis)
    return Tokens(text.last_hidden_state, attention_mask, patches), text.pooler_output, vision.pooler_output


def _no_model(model_name: str, error: Exception) -> UserError:
    reason = " ".join(str(error).split())[:200]
    return UserError(
        f"--model_name {model_name}: no CLIP model, tokenizer or image processor could be loaded from there; give a "
        f"folder, or a hub name on a machine that reaches the hub ({reason})"
    )
