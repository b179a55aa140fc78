"""The original's four feature files, from any checkpoint."""

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from mmgraph import checkpoints
from mmgraph.errors import UserError
from mmgraph.files import write_durably
from mmgraph.graph import find_images
from mmgraph.images import describe_causes
from mmgraph.loader.node_inputs import NodeInputs, node_text
from mmgraph.models.multimodal_graph_encoder import MultimodalGraphEncoder
from mmgraph.node_table import NodeTable
from mmgraph.table_cache import open_nodes
from mmgraph.table_files import fingerprint
from mmgraph.tables import ImagePaths
from mmgraph.text_log import log
from mmgraph.towers import load_tokenizer_and_processor
from mmgraph.world import build_accelerator, on_main_process, together

FEATURES = ("fused", "text_only", "image_only", "concat")


def encode(
    source: Path,
    nodes_path: str | None = None,
    image_root: str | None = None,
    model_name: str | None = None,
    output: Path | None = None,
    batch_size: int = 64,
    num_workers: int = 0,
) -> None:
    """Write ``features_{fused,text_only,image_only,concat}.pt``: one (N, d) float32 tensor each, in node order.

    Args:
        source: a run's output folder (its final file is used), or an epoch or final file.
        nodes_path, image_root, model_name: default to those of the run that the checkpoint lies in.
        output: folder to write to; default: ``features`` in the run's folder, else ``features``.
        batch_size: nodes at a time in each process.

    Raises:
        UserError: no checkpoint, no node table, or towers that do not fit.
    """
    checkpoint = checkpoints.final_file(source) if source.is_dir() else source
    if not checkpoint.is_file():
        raise UserError(f"{checkpoint}: no such checkpoint; give a run's folder or an epoch or final file (.pt)")
    settings = checkpoints.run_settings(checkpoint) or {}
    nodes_path, image_root = nodes_path or settings.get("nodes"), image_root or settings.get("image_root")
    if nodes_path is None:
        raise UserError(f"{checkpoint} lies in no run's folder: give --nodes")
    output = output or (checkpoint.parent.parent / "features" if settings else Path("features"))
    truncated = settings.get("truncated_images", "partial")
    name = model_name or settings.get("model_name") or checkpoints.DEFAULT_MODEL

    accelerator = build_accelerator()
    nodes, paths = together(accelerator, lambda: _open_nodes(nodes_path, image_root))
    together(accelerator, lambda: _make_folder(output))
    tokenizer, processor = together(accelerator, lambda: load_tokenizer_and_processor(name))
    encoder = together(
        accelerator, lambda: checkpoints.load_pretrained_encoder(checkpoint, accelerator.device, model_name=name)
    )
    rank, world_size = accelerator.process_index, accelerator.num_processes
    rows = range(len(nodes) * rank // world_size, len(nodes) * (rank + 1) // world_size)
    collate = partial(_collate, NodeInputs(tokenizer, processor, 0, truncated), paths)
    loader = DataLoader(Subset(nodes, rows), batch_size, collate_fn=collate, num_workers=num_workers)
    part = output / f".part-{rank}.tmp"
    together(accelerator, lambda: torch.save(_encode_rows(encoder, loader, accelerator), part))
    on_main_process(accelerator, lambda: _join_parts(output, world_size))
    log(f"features of {len(nodes):,} nodes: {output}")
    accelerator.end_training()


def _open_nodes(path: str, image_root: str | None) -> tuple[NodeTable, ImagePaths]:
    nodes = open_nodes(path, fingerprint(path))
    return nodes, find_images(nodes, path, image_root, seed=0)


def _make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output_dir {folder}: {error.strerror}") from None


def _collate(inputs: NodeInputs, paths: ImagePaths, nodes: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
    input_ids, attention_mask = inputs.texts([node_text(node) for node in nodes])
    pictures, causes = inputs.pictures([paths.resolve(node["image_path"]) for node in nodes])
    return {
        "input_ids": input_ids,
        "attention_mask": attention_mask,
        "pixel_values": inputs.preprocessing.normalize(pictures),
        "image_causes": torch.tensor(causes),
    }


@torch.no_grad()
def _encode_rows(
    encoder: MultimodalGraphEncoder, loader: DataLoader[Any], accelerator: Accelerator
) -> dict[str, torch.Tensor]:
    """Features and image causes of this rank's rows; empty tensors where it has none."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in (*FEATURES, "image_causes")}
    for batch in tqdm(loader, unit="batch", disable=None if accelerator.is_main_process else True):
        found["image_causes"].append(batch.pop("image_causes"))
        features = encoder.encode(**{name: tensor.to(accelerator.device) for name, tensor in batch.items()})
        for name in FEATURES:
            found[name].append(features[name].float().cpu())
    return {name: torch.cat(parts) if parts else torch.empty(0) for name, parts in found.items()}


def _join_parts(output: Path, world_size: int) -> None:
    """Each rank took one run of rows: joining their files in rank order gives node order."""
    files = [output / f".part-{rank}.tmp" for rank in range(world_size)]
    parts = [torch.load(file, weights_only=True) for file in files]
    for name in FEATURES:
        joined = torch.cat([part[name] for part in parts if part[name].numel()])
        write_durably(output / f"features_{name}.pt", partial(torch.save, joined))
    told = describe_causes([int(code) for part in parts for code in part["image_causes"]])
    if told:
        log(f"images that are black or in part: {told}")
    for file in files:
        file.unlink()
