"""Fingerprints of towers: of their tensors, and of a model's files."""

import hashlib
import platform
from collections.abc import Mapping
from pathlib import Path

import torch
from accelerate.utils import gather_object
from huggingface_hub import try_to_load_from_cache

from mmgraph.errors import UserError
from mmgraph.towers.clip import TOWER_NAMES, no_model

MODEL_FILES = (
    "config.json", "preprocessor_config.json", "processor_config.json", "tokenizer.json", "tokenizer_config.json",
    "vocab.json", "merges.txt", "model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
)  # fmt: skip


def towers_fingerprint(state: Mapping[str, torch.Tensor]) -> str:
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
            raise no_model(model_name, error) from None
        if isinstance(path, str | Path) and Path(path).is_file():
            with Path(path).open("rb") as file:
                found[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return found


def check_same_towers(fingerprint: str) -> None:
    """Raise :class:`UserError` where a rank has loaded other towers than rank 0, such as another revision's."""
    ranks = gather_object([(platform.node(), fingerprint)])
    main_host, of_main = ranks[0]
    for number, (host, own) in enumerate(ranks):
        if own != of_main:
            remedy = "give every machine the same --model_name files"
            raise UserError(f"rank {number} ({host}) has loaded other towers than rank 0 ({main_host}); {remedy}")
