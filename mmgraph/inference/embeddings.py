"""Unit-length embeddings of all nodes of a graph, cached on disk for later queries."""

import os
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator

from mmgraph.config import Config
from mmgraph.distributed.collectives import broadcast_from_main_process, raise_on_all_ranks
from mmgraph.errors import UserError
from mmgraph.inference.feature_shards import FeatureShards, build_shards, missing_shards
from mmgraph.inference.pretrained import Inference
from mmgraph.utils.files import lock_folder
from mmgraph.utils.log import log

KEPT_FOLDERS = 3  # shard folders of other checkpoints or settings to keep, because another process may read them


class NodeVectors(NamedTuple):
    """Embeddings and image status of N nodes, in the order of the node table."""

    vectors: np.ndarray  # (N, d) float32, of unit length
    image_status: np.ndarray  # (N,) uint8 indices into mmgraph.data.images.IMAGE_STATUS


NO_VECTORS = NodeVectors(np.empty((0, 0), np.float32), np.empty(0, np.uint8))


def embed_all_nodes(
    inference: Inference, config: Config, accelerator: Accelerator, embedding: str, folder: Path
) -> NodeVectors:
    """Embed all nodes, or read the cached embeddings. Call on all ranks.

    Args:
        embedding: name of the embedding: ``z_graph``, ``fused``, ``text_only``, ``image_only`` or ``concat``.
        folder: cache folder for the embeddings. If it is not writable and all ranks are on one machine, the embeddings
            are computed but not cached.

    Returns:
        The embeddings on the main process, :data:`NO_VECTORS` on the other ranks.

    Raises:
        UserError: another process is writing embeddings to the folder; a vector is not finite; or the ranks are on
            several machines and ``folder`` cannot be written to.
    """
    shards = FeatureShards(inference, folder / embedding, (embedding,))
    with ExitStack() as stack:
        if missing_shards(shards, accelerator):
            opened = broadcast_from_main_process(
                accelerator, lambda: _open(folder / embedding, stack, accelerator.num_processes)
            )
            shards = FeatureShards(inference, opened, (embedding,))
            build_shards(shards, accelerator, others=KEPT_FOLDERS)
        return raise_on_all_ranks(
            accelerator, lambda: _read(shards, embedding) if accelerator.is_main_process else NO_VECTORS
        )


def _read(shards: FeatureShards, embedding: str) -> NodeVectors:
    return NodeVectors(normalize_rows(shards.read(embedding)), shards.read("causes").numpy())


def normalize_rows(vectors: torch.Tensor) -> np.ndarray:
    """Scale (N, d) vectors to unit length, in float32. Raise :class:`UserError` if a vector is not finite."""
    finite = vectors.isfinite().all(dim=1)
    if not finite.all():
        raise UserError(
            f"the embedding of row {int((~finite).nonzero()[0])} is not finite, so it has no nearest nodes; "
            "use another checkpoint"
        )
    return F.normalize(vectors.float(), dim=1).cpu().numpy()


def _open(folder: Path, stack: ExitStack, world_size: int) -> Path:
    """Create and lock the folder. If it is not writable and all ranks are on this machine, use a temporary folder."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if lock_folder(folder, stack):
            return folder
    except OSError as error:
        if world_size > int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
            raise UserError(f"{folder}: {error.strerror}; make the folder writable, or use one machine") from None
        log(f"{folder}: {error.strerror}; the embeddings are computed but not cached")
        return Path(stack.enter_context(TemporaryDirectory()))
    raise UserError(f"{folder}: another process is writing embeddings to it; try again when it has finished")
