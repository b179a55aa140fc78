"""Fingerprints of towers, from their tensors or from a model's files."""

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
    """Return one SHA-256 over the names, shapes and float32 values of both towers' tensors, in hexadecimal."""
    digest = hashlib.sha256()
    for tower in TOWER_NAMES:
        prefix = f"{tower}.{tower}."
        for key in sorted(key for key in state if key.startswith(prefix)):
            tensor = state[key].detach().cpu().float().contiguous()
            digest.update(f"{key.removeprefix(prefix)} {tuple(tensor.shape)} {tensor.dtype}".encode())
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_fingerprints(model_name: str) -> dict[str, str]:
    """Return the SHA-256 of each file of a model, by file name.

    The files are read from the model's folder, or from the hub cache on this machine. If there are no such files, the
    result is empty. This function takes seconds and loads no model.

    Raises:
        UserError: ``model_name`` is neither a folder nor a valid name on the hub.
    """
    fingerprints = {}
    for name in MODEL_FILES:
        folder = Path(model_name)
        try:
            path = folder / name if folder.is_dir() else try_to_load_from_cache(model_name, name)
        except ValueError as error:
            raise no_model(model_name, error) from None
        if isinstance(path, str | Path) and Path(path).is_file():
            with Path(path).open("rb") as file:
                fingerprints[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return fingerprints


def check_same_towers(fingerprint: str) -> None:
    """Check that all ranks have loaded the same towers. Call on all ranks.

    Raises:
        UserError: a rank has loaded different towers than rank 0, for example another revision of the model.
    """
    ranks = gather_object([(platform.node(), fingerprint)])
    main_host, main_fingerprint = ranks[0]
    for number, (host, rank_fingerprint) in enumerate(ranks):
        if rank_fingerprint != main_fingerprint:
            remedy = "give every machine the same --model_name files"
            raise UserError(f"rank {number} ({host}) has loaded different towers than rank 0 ({main_host}); {remedy}")
