"""All nodes' embeddings from any checkpoint, to files: by all ranks, in constant memory, resumed where it stopped."""

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from accelerate import Accelerator

from mmgraph.config import Config
from mmgraph.data.images import IMAGE_STATUS
from mmgraph.distributed.collectives import on_main_process, work_on_all_ranks
from mmgraph.errors import UserError
from mmgraph.inference.feature_files import FORMATS
from mmgraph.inference.feature_shards import FeatureShards, build_shards, progress_bar, show_progress
from mmgraph.inference.pretrained import Inference, open_checkpoint
from mmgraph.utils.files import locked
from mmgraph.utils.log import log

FEATURES = ("z_graph", "fused", "text_only", "image_only", "concat")


def encode(
    checkpoint: Path, config: Config, accelerator: Accelerator, output: Path, features: Sequence[str], kind: str
) -> None:
    """Write ``features_<name>.<kind>``: one float32 vector a node, in node order. Called by all ranks.

    Blocks of nodes are embedded by all ranks and kept beside the files to be; a second start goes on from those. Then
    they are put together, a feature a rank.

    Args:
        checkpoint: an epoch or final file, of mmgraph or the original.
        output: folder to write to, which all ranks see.
        features: names of :data:`FEATURES`.
        kind: one of :data:`mmgraph.inference.feature_files.FORMATS`.

    Raises:
        UserError: as :func:`mmgraph.inference.pretrained.open_checkpoint`; or ``output`` cannot be written.
    """
    _check(features, kind)
    with ExitStack() as stack:
        on_main_process(accelerator, lambda: _open_folder(output, stack))
        _encode(open_checkpoint(checkpoint, config, accelerator), config, accelerator, output, features, kind)


def _encode(
    inference: Inference, config: Config, accelerator: Accelerator, output: Path, features: Sequence[str], kind: str
) -> None:
    shards = FeatureShards(inference, output, tuple(dict.fromkeys(features)), config.truncated_images)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    build_shards(shards, accelerator)
    with progress_bar(accelerator, len(inference.nodes) * len(shards.features), 0, "row") as shown:
        written = shards.write(shards.features[rank::world_size], kind)
        for others in work_on_all_ranks(accelerator, show_progress(written, shown, output)):
            shown.update(others)
    on_main_process(accelerator, lambda: _finish(shards, output, kind))


def _check(features: Sequence[str], kind: str) -> None:
    unknown = [name for name in features if name not in FEATURES]
    if unknown:
        raise UserError(f"--features {unknown[0]}: must be of {', '.join(FEATURES)}")
    if kind not in FORMATS:
        raise UserError(f"--format {kind}: must be one of {', '.join(FORMATS)}")


def _open_folder(folder: Path, stack: ExitStack) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not locked(folder, stack):
            raise UserError(f"--output_dir {folder}: another process encodes into it")
    except OSError as error:
        raise UserError(f"--output_dir {folder}: {error.strerror}") from None


def _finish(shards: FeatureShards, output: Path, kind: str) -> None:
    image_status = shards.image_status()
    told = ", ".join(
        f"{count:,} {cause}"
        for cause, count in zip(IMAGE_STATUS, image_status.tolist(), strict=True)
        if cause and count
    )
    if told:
        log(f"images that are black or in part: {told}")
    shutil.rmtree(shards.folder)
    log(f"{', '.join(shards.features)} of {len(shards.inference.nodes):,} nodes: {output}/features_*.{kind}")
