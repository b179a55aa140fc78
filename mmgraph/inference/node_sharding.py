"""All nodes' embeddings over the ranks: each embeds its share, and the shares are put together."""

from collections.abc import Callable, Sequence

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather

from mmgraph.data.images import is_black
from mmgraph.inference.node_outputs import BATCH, NodeOutputs
from mmgraph.towers.tokens import Tokens

PART = 1 << 14  # nodes of each rank that are gathered at once
NO_WORDS = 2  # tokens of a text without any: its beginning and its end

Embeddings = Callable[[Tokens], dict[str, torch.Tensor]]


def rank_range(accelerator: Accelerator, count: int, multiple: int = 1) -> range:
    """This rank's of ``count`` things, in parts of ``multiple``."""
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
    """Embeddings of this rank's share of the nodes, on the CPU.

    Args:
        embeddings: :meth:`mmgraph.models.multimodal_graph_encoder.TrainedModule.embeddings` of a module.
        outputs: of the graph's nodes.
        kinds: names of embeddings.
        partners: as :meth:`NodeOutputs.of`.

    Returns:
        (n, d) each; ``whole`` (n,) uint8, 1 for nodes with words and a picture; and ``image_status`` (n,) uint8,
        indices into :data:`mmgraph.data.images.IMAGE_STATUS`.
    """
    rows, parts = rank_range(accelerator, len(outputs.nodes), BATCH), dict[str, list[torch.Tensor]]()
    for found in outputs.of([rows or range(1)], image_rows):  # a rank without nodes has to know the widths
        embedded = embeddings(found.tokens)
        has_words = (found.tokens.text_mask.sum(1) > NO_WORDS).cpu()
        has_picture = torch.from_numpy(~is_black(found.image_status, outputs.inputs.truncated_images))
        parts.setdefault("whole", []).append((has_words & has_picture).to(torch.uint8))
        parts.setdefault("image_status", []).append(torch.from_numpy(found.image_status.astype(np.uint8)))
        for name in kinds:
            parts.setdefault(name, []).append(embedded[name].float().cpu())
    return {name: torch.cat(tensors)[: len(rows)] for name, tensors in parts.items()}


def gather_shards(accelerator: Accelerator, own: torch.Tensor, nodes: int) -> torch.Tensor:
    """The shares of all ranks, whole on each, on the device, in the order of the nodes; called by all ranks."""
    own = own.to(accelerator.device)
    if accelerator.num_processes == 1:
        return own
    padded = own.new_zeros((_size(accelerator, nodes, BATCH), *own.shape[1:]))
    padded[: len(own)] = own
    return gather(padded)[:nodes]


def gather_on_main_process(accelerator: Accelerator, own: torch.Tensor, nodes: int) -> torch.Tensor:
    """The shares of all ranks, whole on the main process, on the CPU; nothing on others. Called by all ranks.

    By parts, so that no device and no other rank holds them all.
    """
    if accelerator.num_processes == 1:
        return own.cpu()
    size, ranks = _size(accelerator, nodes, BATCH), accelerator.num_processes
    whole = own.new_empty((ranks, size if accelerator.is_main_process else 0, *own.shape[1:]), device="cpu")
    for start in range(0, size, PART):
        part = own.new_zeros((min(PART, size - start), *own.shape[1:]), device=accelerator.device)
        found = own[start : start + len(part)]
        part[: len(found)] = found.to(accelerator.device)
        gathered = gather(part)  # (ranks * len(part), ...)
        if accelerator.is_main_process:
            whole[:, start : start + len(part)] = gathered.reshape(ranks, *part.shape).cpu()
    return whole.flatten(0, 1)[:nodes]
