"""The frozen CLIP towers, and the token source that the trainer reads them through."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub import try_to_load_from_cache
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
from transformers.utils import logging as transformers_logging

from mmgraph.errors import UserError
from mmgraph.images import Preprocessing

MODEL_FILES = (
    "config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    "vocab.json", "merges.txt", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
)  # fmt: skip


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


def fingerprint(towers: Towers) -> str:
    """SHA-256 over both towers' tensors (names, shapes, bytes), in hexadecimal."""
    digest = hashlib.sha256()
    for tower in towers:
        for name, tensor in sorted(tower.state_dict().items()):
            name = name.removeprefix("text_model.").removeprefix("vision_model.")  # transformers 4's layout
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(memoryview(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().reshape(-1)))
    return digest.hexdigest()


def file_fingerprints(model_name: str) -> dict[str, str]:
    """SHA-256 of each file of a model, as they lie in its folder or in the hub cache here; empty if none do.

    In seconds, and without loading anything.
    """
    found = {}
    for name in MODEL_FILES:
        folder = Path(model_name)
        path = folder / name if folder.is_dir() else try_to_load_from_cache(model_name, name)
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
