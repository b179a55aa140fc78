"""One vector for each node of a run's graph, kept below the run's folder: a second question finds them there."""

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
from mmgraph.utils.files import locked
from mmgraph.utils.log import log

KEPT = 3  # of other checkpoints: a process may be reading one


class NodeVectors(NamedTuple):
    """Of N nodes, in the order of the table."""

    vectors: np.ndarray  # (N, d) float32, of unit length
    image_status: np.ndarray  # (N,) uint8, indices into mmgraph.data.images.IMAGE_STATUS


NO_VECTORS = NodeVectors(np.empty((0, 0), np.float32), np.empty(0, np.uint8))


def embed_all_nodes(
    inference: Inference, config: Config, accelerator: Accelerator, kind: str, folder: Path
) -> NodeVectors:
    """Embed all nodes, or read what was kept of it. Called by all ranks; on those but the main one, of no node.

    Args:
        kind: ``z_graph``, ``fused``, ``text_only``, ``image_only`` or ``concat``.
        folder: where to keep them; in a temporary one where it cannot be written to.

    Raises:
        UserError: another process embeds these nodes; or a vector is not finite.
    """
    shards = FeatureShards(inference, folder / kind, (kind,), config.truncated_images)
    with ExitStack() as stack:
        if missing_shards(shards, accelerator):
            opened = broadcast_from_main_process(
                accelerator, lambda: _open(folder / kind, stack, accelerator.num_processes)
            )
            shards = FeatureShards(inference, opened, (kind,), config.truncated_images)
            build_shards(shards, accelerator, others=KEPT)
        return raise_on_all_ranks(
            accelerator, lambda: _read(shards, kind) if accelerator.is_main_process else NO_VECTORS
        )


def _read(shards: FeatureShards, kind: str) -> NodeVectors:
    return NodeVectors(normalize_rows(shards.read(kind)), shards.read("causes").numpy())


def normalize_rows(vectors: torch.Tensor) -> np.ndarray:
    """(N, d) float32 rows of unit length. Raises :class:`UserError` where one is not finite."""
    finite = vectors.isfinite().all(dim=1)
    if not finite.all():
        raise UserError(f"the embedding of row {int((~finite).nonzero()[0])} is not finite: nothing is near it")
    return F.normalize(vectors.float(), dim=1).cpu().numpy()


def _open(folder: Path, stack: ExitStack, world_size: int) -> Path:
    """The folder, made and locked; a temporary one where it cannot be, and all ranks are on this machine."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if locked(folder, stack):
            return folder
    except OSError as error:
        if world_size > int(os.environ.get("LOCAL_WORLD_SIZE", "1")):
            raise UserError(f"{folder}: {error.strerror}") from None
        log(f"{folder}: {error.strerror}: the embeddings are made, and not kept")
        return Path(stack.enter_context(TemporaryDirectory()))
    raise UserError(f"{folder}: another process embeds into it; try again when it is done")
