"""The original's four feature files, from any checkpoint."""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Subset
from tqdm import tqdm

from mmgraph import checkpoints
from mmgraph.config import Config
from mmgraph.errors import UserError
from mmgraph.files import write_durably
from mmgraph.graph import find_images
from mmgraph.images import describe_causes
from mmgraph.loader.node_inputs import NodeInputs, node_text
from mmgraph.models.multimodal_graph_encoder import MultimodalGraphEncoder
from mmgraph.node_table import NodeTable
from mmgraph.table_cache import open_nodes
from mmgraph.table_files import fingerprint as file_fingerprint
from mmgraph.tables import ImagePaths
from mmgraph.text_log import log
from mmgraph.tower_cache import StoredTokens, existing_store
from mmgraph.towers import Tokens, fingerprint, load_tokenizer_and_processor, run_towers
from mmgraph.world import build_accelerator, on_main_process, together

# Of some nodes: tokens and pooled outputs, as run_towers gives them; and an index into CAUSES for each.
Outputs = tuple[tuple[Tokens, torch.Tensor, torch.Tensor], torch.Tensor]
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

    config = Config(
        nodes=nodes_path,
        image_root=image_root,
        model_name=model_name or settings.get("model_name") or checkpoints.DEFAULT_MODEL,
        truncated_images=settings.get("truncated_images", "partial"),
        tower_cache=settings.get("tower_cache", "auto"),
        num_workers=num_workers,
    )
    accelerator = build_accelerator()
    nodes, paths, digest = together(accelerator, lambda: _open_nodes(config))
    together(accelerator, lambda: _make_folder(output))
    tokenizer, processor = together(accelerator, lambda: load_tokenizer_and_processor(config.model_name))
    inputs = NodeInputs(tokenizer, processor, 0, config.truncated_images)
    encoder = together(
        accelerator,
        lambda: checkpoints.load_pretrained_encoder(checkpoint, accelerator.device, model_name=config.model_name),
    )
    towers = fingerprint(encoder.state_dict())
    stored = existing_store(config, accelerator, nodes, paths, digest, inputs, towers)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    rows = range(len(nodes) * rank // world_size, len(nodes) * (rank + 1) // world_size)
    if stored is not None:
        log(f"tower store: {stored.store.folder}, of float32 tokens; no tower is run")
        batches = _from_store(stored, rows, batch_size)
    else:
        collate = partial(_collate, inputs, paths)
        loader = DataLoader(Subset(nodes, rows), batch_size, collate_fn=collate, num_workers=num_workers)
        batches = _from_towers(encoder, loader, accelerator.device)
    bar = tqdm(total=len(rows), unit="node", disable=None if accelerator.is_main_process else True)
    part = output / f".part-{rank}.tmp"
    with bar:
        together(accelerator, lambda: torch.save(_encode(encoder, batches, bar), part))
    on_main_process(accelerator, lambda: _join_parts(output, world_size))
    log(f"features of {len(nodes):,} nodes: {output}")
    accelerator.end_training()


def _open_nodes(config: Config) -> tuple[NodeTable, ImagePaths, str]:
    digest = file_fingerprint(config.nodes)
    nodes = open_nodes(config.nodes, digest)
    return nodes, find_images(nodes, config.nodes, config.image_root, seed=0), digest


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
def _from_towers(encoder: MultimodalGraphEncoder, loader: Iterable[Any], device: torch.device) -> Iterator[Outputs]:
    for batch in loader:
        causes = batch.pop("image_causes")
        tensors = {name: tensor.to(device) for name, tensor in batch.items()}
        yield run_towers(encoder.towers, **tensors), causes


def _from_store(stored: StoredTokens, rows: Sequence[int], batch_size: int) -> Iterator[Outputs]:
    for start in range(0, len(rows), batch_size):
        part = np.array(rows[start : start + batch_size])
        yield stored.outputs(part, part), torch.from_numpy(stored.image_causes[part])


def _encode(encoder: MultimodalGraphEncoder, batches: Iterator[Outputs], bar: "tqdm[Any]") -> dict[str, torch.Tensor]:
    """Features and image causes of this rank's rows; empty tensors where it has none."""
    found: dict[str, list[torch.Tensor]] = {name: [] for name in (*FEATURES, "image_causes")}
    for outputs, causes in batches:
        found["image_causes"].append(causes)
        features = encoder.embeddings(*outputs)
        for name in FEATURES:
            found[name].append(features[name].float().cpu())
        bar.update(len(causes))
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
