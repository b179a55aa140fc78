"""Writes the embeddings of all nodes to files. All ranks compute, memory is constant, and interrupted calls resume."""

import shutil
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from accelerate import Accelerator

from mmgraph.checkpoints.resume_state import read_identity
from mmgraph.config import Config
from mmgraph.data.images import describe_image_status, image_remarks
from mmgraph.data.readers import fingerprint
from mmgraph.data.run_split import read_split
from mmgraph.distributed.collectives import on_main_process, work_on_all_ranks
from mmgraph.errors import UserError
from mmgraph.inference.feature_files import FORMATS
from mmgraph.inference.feature_shards import FeatureShards, build_shards, progress_bar, show_progress
from mmgraph.inference.pretrained import Inference, open_checkpoint, read_settings, run_folder
from mmgraph.utils.files import lock_folder
from mmgraph.utils.log import log

FEATURES = ("z_graph", "fused", "text_only", "image_only", "concat")


def encode(
    checkpoint: Path, config: Config, accelerator: Accelerator, output: Path, features: Sequence[str], file_format: str
) -> None:
    """Write ``features_<name>.<file_format>``: one float32 vector per node, in node order. Call on all ranks.

    All ranks embed shards of nodes, and store the shards in a hidden folder in ``output``. After an interruption, the
    next call resumes from these shards. At the end, the shards are joined into the output files. Each file is
    written by a single rank.

    Args:
        checkpoint: an epoch or final file that mmgraph or the original trainer has written.
        output: folder to write to. All ranks must see it.
        features: names from :data:`FEATURES`.
        file_format: file format, one of :data:`mmgraph.inference.feature_files.FORMATS`.

    Raises:
        UserError: see :func:`mmgraph.inference.pretrained.open_checkpoint`. Also if a feature or the format is unknown,
            ``output`` cannot be written to, or another process is encoding into ``output``.
    """
    _check(features, file_format)
    with ExitStack() as stack:
        on_main_process(accelerator, lambda: _open_folder(output, stack))
        _encode(open_checkpoint(checkpoint, config, accelerator), config, accelerator, output, features, file_format)


def default_output(checkpoint: Path, config: Config) -> Path:
    """Return the folder for the features of a checkpoint's run, or ``features`` for a checkpoint outside of a run.

    Raises:
        UserError: ``config`` names another node table than that of the run, whose features would be overwritten.
    """
    folder = run_folder(checkpoint)
    if folder is None:
        return Path("features")
    own = Path(str((read_settings(folder) or {}).get("nodes")))
    split = read_split(folder)
    trained_on = split.nodes_fingerprint if split is not None else read_identity(folder / "state").get("nodes table")
    if own.resolve() != Path(config.nodes).resolve() and trained_on != fingerprint(config.nodes):
        raise UserError(
            f"--nodes {config.nodes}: not the node table that the run was trained on; set --output_dir, so that the "
            f"run's own features in {folder / 'features'} are not overwritten"
        )
    return folder / "features"


def _encode(
    inference: Inference,
    config: Config,
    accelerator: Accelerator,
    output: Path,
    features: Sequence[str],
    file_format: str,
) -> None:
    shards = FeatureShards(inference, output, tuple(dict.fromkeys(features)))
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
                f"--output_dir {folder}: another process is encoding into this folder; wait until it has finished, or "
                "choose another folder"
            )
    except OSError as error:
        raise UserError(f"--output_dir {folder}: {error.strerror}; choose a writable folder") from None


def _finish(shards: FeatureShards, output: Path, file_format: str) -> None:
    counts = shards.count_image_status()
    problems = describe_image_status(counts)
    if problems:
        log(f"nodes whose image is black or partial: {problems}")
    for remark in image_remarks(counts, shards.inference.outputs.inputs.rules):
        log(remark)
    shutil.rmtree(shards.folder)
    log(
        f"wrote {', '.join(shards.features)} of {len(shards.inference.nodes):,} nodes to "
        f"{output}/features_*.{file_format}"
    )
