"""Embeds all nodes on all ranks: each rank embeds its shard, and the shards are gathered."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather

from mmgraph.data.images import is_black
from mmgraph.inference.node_outputs import BATCH, NodeOutputs
from mmgraph.towers.tokens import Tokens

PART = 1 << 14  # rows that each rank passes to one gather
NO_WORDS = 2  # number of tokens of a text without words: start and end

Embeddings = Callable[[Tokens], dict[str, torch.Tensor]]


def rank_range(accelerator: Accelerator, count: int, multiple: int = 1) -> range:
    """Return this rank's range of ``count`` items. A range starts at a multiple of ``multiple``, or it is empty."""
    rank, size = accelerator.process_index, _size(accelerator, count, multiple)
    return range(min(count, size * rank), min(count, size * (rank + 1)))


def _size(accelerator: Accelerator, count: int, multiple: int) -> int:
    return -(-count // (multiple * accelerator.num_processes)) * multiple


@torch.no_grad()
def embed_shard(
    accelerator: Accelerator,
    embeddings: Embeddings,
    outputs: NodeOutputs,
    kinds: Sequence[str],
    image_rows: np.ndarray | None = None,
) -> dict[str, torch.Tensor]:
    """Return the embeddings of this rank's shard of n nodes, on the CPU.

    Args:
        embeddings: :meth:`mmgraph.models.multimodal_graph_encoder.TrainedModule.embeddings` of a module.
        outputs: tower outputs of the graph's nodes.
        kinds: names of the embeddings.
        image_rows: see :meth:`NodeOutputs.of`.

    Returns:
        Tensors by name. Each embedding is (n, d) float32. ``complete`` is (n,) uint8, 1 for nodes that have words and
        an image. ``image_status`` is (n,) uint8, indices into :data:`mmgraph.data.images.IMAGE_STATUS`.
    """
    rows, parts = rank_range(accelerator, len(outputs.nodes), BATCH), dict[str, list[torch.Tensor]]()
    # A rank without nodes embeds node 0, only to get the widths of the embeddings.
    for batch in outputs.of([rows or range(1)], image_rows):
        embedded = embeddings(batch.tokens)
        has_words = (batch.tokens.text_mask.sum(1) > NO_WORDS).cpu()
        has_picture = torch.from_numpy(~is_black(batch.image_status, outputs.inputs.rules.truncated_images))
        parts.setdefault("complete", []).append((has_words & has_picture).to(torch.uint8))
        parts.setdefault("image_status", []).append(torch.from_numpy(batch.image_status.astype(np.uint8)))
        for name in kinds:
            parts.setdefault(name, []).append(embedded[name].float().cpu())
    return {name: torch.cat(tensors)[: len(rows)] for name, tensors in parts.items()}


def gather_shards(accelerator: Accelerator, shard: torch.Tensor, nodes: int) -> torch.Tensor:
    """Gather the shards of all ranks in node order, on the device of every rank. Call on all ranks.

    Args:
        shard: this rank's shard, from :func:`embed_shard`.
        nodes: number of nodes in the graph.
    """
    shard = shard.to(accelerator.device)
    if accelerator.num_processes == 1:
        return shard
    padded = shard.new_zeros((_size(accelerator, nodes, BATCH), *shard.shape[1:]))
    padded[: len(shard)] = shard
    return gather(padded)[:nodes]


def gather_on_main_process(accelerator: Accelerator, shard: torch.Tensor, nodes: int) -> torch.Tensor:
    """Gather the shards of all ranks in node order, on the CPU of the main process. Call on all ranks.

    The shards are gathered in parts, so that no device and no other rank needs memory for all rows.

    Args:
        shard, nodes: see :func:`gather_shards`.

    Returns:
        All rows on the main process, an empty tensor on the other ranks.
    """
    if accelerator.num_processes == 1:
        return shard.cpu()
    size, ranks = _size(accelerator, nodes, BATCH), accelerator.num_processes
    rows = shard.new_empty((ranks, size if accelerator.is_main_process else 0, *shard.shape[1:]), device="cpu")
    for start in range(0, size, PART):
        part = shard.new_zeros((min(PART, size - start), *shard.shape[1:]), device=accelerator.device)
        chunk = shard[start : start + len(part)]
        part[: len(chunk)] = chunk.to(accelerator.device)
        gathered = gather(part)  # (ranks * len(part), ...)
        if accelerator.is_main_process:
            rows[:, start : start + len(part)] = gathered.reshape(ranks, *part.shape).cpu()
    return rows.flatten(0, 1)[:nodes]
