"""Writes the embeddings of all nodes to files: on all ranks, in constant memory, and resumable."""

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
from mmgraph.utils.files import lock_folder
from mmgraph.utils.log import log

FEATURES = ("z_graph", "fused", "text_only", "image_only", "concat")


def encode(
    checkpoint: Path, config: Config, accelerator: Accelerator, output: Path, features: Sequence[str], file_format: str
) -> None:
    """Write ``features_<name>.<file_format>``: one float32 vector per node, in node order. Called by all ranks.

    All ranks embed shards of nodes and store them in a hidden folder in ``output``; an interrupted call resumes from
    these shards. Then the shards are joined into the output files. Each feature is written by one rank.

    Args:
        checkpoint: an epoch or final file, of mmgraph or the original trainer.
        output: folder to write to. All ranks must see it.
        features: names from :data:`FEATURES`.
        file_format: file format, one of :data:`mmgraph.inference.feature_files.FORMATS`.

    Raises:
        UserError: as :func:`mmgraph.inference.pretrained.open_checkpoint`; or a feature or the format is unknown,
            ``output`` cannot be written to, or another process is encoding into it.
    """
    _check(features, file_format)
    with ExitStack() as stack:
        on_main_process(accelerator, lambda: _open_folder(output, stack))
        _encode(open_checkpoint(checkpoint, config, accelerator), config, accelerator, output, features, file_format)


def _encode(
    inference: Inference,
    config: Config,
    accelerator: Accelerator,
    output: Path,
    features: Sequence[str],
    file_format: str,
) -> None:
    shards = FeatureShards(inference, output, tuple(dict.fromkeys(features)), config.truncated_images)
    rank, world_size = accelerator.process_index, accelerator.num_processes
    build_shards(shards, accelerator)
    with progress_bar(accelerator, len(inference.nodes) * len(shards.features), 0, "row") as bar:
        written = shards.write(shards.features[rank::world_size], file_format)
        for others in work_on_all_ranks(accelerator, show_progress(written, bar, output)):
            bar.update(others)
    on_main_process(accelerator, lambda: _finish(shards, output, file_format))


def _check(features: Sequence[str], file_format: str) -> None:
    unknown = [name for name in features if name not in FEATURES]
    if unknown:
        raise UserError(f"--features {unknown[0]}: unknown feature; choose from {', '.join(FEATURES)}")
    if file_format not in FORMATS:
        raise UserError(f"--format {file_format}: unknown format; choose from {', '.join(FORMATS)}")


def _open_folder(folder: Path, stack: ExitStack) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not lock_folder(folder, stack):
            raise UserError(
                f"--output_dir {folder}: another process is encoding into it; choose another folder or wait for it"
            )
    except OSError as error:
        raise UserError(f"--output_dir {folder}: {error.strerror}") from None


def _finish(shards: FeatureShards, output: Path, file_format: str) -> None:
    image_status = shards.image_status()
    counts = ", ".join(
        f"{count:,} {status}"
        for status, count in zip(IMAGE_STATUS, image_status.tolist(), strict=True)
        if status and count
    )
    if counts:
        log(f"nodes whose image is black or partial: {counts}")
    shutil.rmtree(shards.folder)
    log(f"{', '.join(shards.features)} of {len(shards.inference.nodes):,} nodes: {output}/features_*.{file_format}")
