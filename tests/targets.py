"""Dotted names of the parts of the package that tests replace or wrap. After a rename, only this file changes."""

from pkgutil import resolve_name
from typing import Any

# training, faults
TAKE_STEP = "mmgraph.training.train_step.TrainStep.__call__"  # (train step, batch): forward, backward, update
RECORD_STEP = "mmgraph.training.step_log.StepLog.submit"  # (step log, step result), after each step
HOST_COPY_START = "mmgraph.utils.device_copies.HostCopy.__init__"
HOST_COPY_READ = "mmgraph.utils.device_copies.HostCopy.tolist"
SAVE = "mmgraph.training.checkpointer.Checkpointer.save"  # writes the state, and the epoch or final file
EVALUATE = "mmgraph.training.trainer.Run.evaluate"  # evaluates, and writes the results
BUILD_LOADER = "mmgraph.data.batches.build_loader"  # at the start, after the state was read
RANK_HELD_OUT = "mmgraph.evaluation.evaluator.Evaluation.evaluate"
RECORD_EVALUATION = "mmgraph.training.run_log.RunLog.evaluation"  # on the main process
RECORD_ROW = "mmgraph.training.run_log.RunLog.row"  # writes the row and the log line of a step
WRITE_ROW = "mmgraph.training.metrics_file.MetricsFile.write"  # on the main process
LOSSES = "mmgraph.losses.contrastive.contrastive_losses"
FORWARD = "mmgraph.models.multimodal_graph_encoder.TrainedModule.forward"
COLLATE = "mmgraph.data.batches.BatchCollator.__call__"  # with live towers
COLLATE_EDGES = "mmgraph.data.batches.EdgeCollator.__call__"  # with stored tokens
EDGE_ROWS = "mmgraph.data.batches.EdgeRows.__getitems__"
CONSOLIDATE = "mmgraph.checkpoints.consolidate.consolidate"  # called by all ranks in a save and in an evaluation
WRITE_STATE = "mmgraph.checkpoints.resume_state.write_state"  # on the main process
PRUNE_STATES = "mmgraph.checkpoints.resume_state._prune"
WRITE_CHECKPOINT = "mmgraph.checkpoints.files.write_checkpoint"  # writes the epoch and final files
OPEN_GRAPH = "mmgraph.cli.start.open_graph"
LOAD_CONTENT_HASHES = "mmgraph.towers.cached.load_content_hashes"
OPEN_STORE = "mmgraph.towers.cached.open_store"
BUILD_STORE = "mmgraph.towers.store_builder.build"
BUILD_ACCELERATOR = "mmgraph.distributed.launch.build_accelerator"
RENDEZVOUS_ANSWER = "mmgraph.distributed.launch._answer"  # rank 0's part of the rendezvous
RENDEZVOUS = "mmgraph.distributed.launch._join"
CONFIGURE_CUDA = "mmgraph.distributed.launch._configure_cuda"
RENDEZVOUS_PREFIX = "mmgraph"  # prefix of the rendezvous keys in the store
FAIL = "mmgraph.cli.failures.end_workers"  # called first if a run ends with an error
OTHERS_WAIT_SECONDS = (
    "mmgraph.cli.failures.OTHERS_WAIT_SECONDS"  # delay before another rank than rank 0 prints an error
)
TRACKER_SECONDS = [f"mmgraph.training.trackers.{name}_SECONDS" for name in ("START", "HANG", "FINISH")]  # time limits

# data, towers, losses, command line
CLAIM_FILE = "mmgraph.utils.files.claim_file"
CHECK_UNIQUE = "mmgraph.data.table_cache.check_unique"
READ_CHUNKS = "mmgraph.data.table_cache.read_chunks"
ROW_CHUNK = "mmgraph.data.table_cache.ROW_CHUNK"
EDGE_CHUNK = "mmgraph.data.edge_conversion.EDGE_CHUNK"
BIT_CHUNK = "mmgraph.data.bits.CHUNK"
HELD_OUT_CHUNK = "mmgraph.data.run_split.EDGE_CHUNK"
WRITE_HELD_OUT = "mmgraph.data.run_split._write_held_out"
TRAINING_ROW_CHUNK = "mmgraph.data.training_edges.ROW_CHUNK"
ID_CHUNK = "mmgraph.data.tables.ID_CHUNK"
OPENED_NODE_TABLE = "mmgraph.data.table_cache.NodeTable"
RESOLVE_IMAGE_PATH = "mmgraph.data.image_paths.ImagePaths.resolve"
READ_FILE = "mmgraph.data.image_source.read_file"
IMAGE_CACHE_TICK_NS = "mmgraph.data.image_cache.TICK_NS"
MISSING_DISK_SPACE = "mmgraph.data.batches.missing_disk_space"
LOAD_TOWERS = "mmgraph.towers.load.load_towers"
LOAD_TOWERS_FOR_RUN = "mmgraph.towers.token_source.load_towers"
LOAD_TOWERS_FOR_BUILD = "mmgraph.towers.store_builder.load_towers"
BUILD_TEXT_HASH = "mmgraph.towers.store_builder.text_hash"
MAKE_SHARD = "mmgraph.towers.store_builder._ShardBuilder.make"
SHARD_ENTRIES = "mmgraph.towers.store_plan.SHARD"
LOAD_ENCODER = "mmgraph.inference.pretrained._load_encoder"
LOGIT_CHUNK = "mmgraph.losses.contrastive.LOGIT_CHUNK"
INFO_NCE = "mmgraph.losses.contrastive._info_nce"
CROSS_ENTROPY = "mmgraph.losses.contrastive._cross_entropy"
CHUNKED_CROSS_ENTROPY = "mmgraph.losses.contrastive._chunked_cross_entropy"
MASK_CHUNK = "mmgraph.losses.negative_mask.NegativeMask.chunk"
LINKED = "mmgraph.data.adjacency.Adjacency.linked"
PROJECT = "mmgraph.models.multimodal_graph_encoder.TrainedModule._project"
RESIDENT_TOKENS = "mmgraph.towers.resident.ResidentTokens.tokens"
POISON = "mmgraph.training.train_step.poison_if_nonfinite"
HOST_COPY_OF_STEP_LOG = "mmgraph.training.step_log.HostCopy"
REDUCE = "accelerate.Accelerator.reduce"

# evaluation, inference, report, bench
QUERY_CHUNK = "mmgraph.evaluation.ranking.QUERY_CHUNK"
CANDIDATE_CHUNK = "mmgraph.evaluation.ranking.CANDIDATE_CHUNK"
SAMPLED_NEGATIVES = "mmgraph.evaluation.ranking._negatives"
RANKS_OF_EMBEDDINGS = "mmgraph.evaluation.evaluator.Evaluation.ranks"
NODES_OF_A_FEATURE_SHARD = "mmgraph.inference.feature_shards.SHARD_NODES"
MIN_IMAGE_AGE_NS = "mmgraph.inference.feature_shards.MIN_AGE_NS"
WRITE_FEATURES = "mmgraph.inference.feature_shards.write_features"
MAKE_FEATURE_SHARDS = "mmgraph.inference.feature_shards.FeatureShards.make"
REPORT_AT_THE_END = "mmgraph.report.make.end_of_run"
WRITE_PAGE = "mmgraph.report.make.write_page"
EMBED_SHARD_OF_REPORT = "mmgraph.report.make.embed_shard"
SCALE_LAUNCH = "mmgraph.bench.scale.launch"
STUDY_LAUNCH = "mmgraph.bench.study.launch"
STUDY_POOL = "mmgraph.bench.study.ProcessPoolExecutor"
TOWERS_OF_BENCH_GRAPH = "mmgraph.bench.graph.build_towers"
LOG_FILE = "mmgraph.utils.log.log_file"
CHECK_AGREEMENT = "mmgraph.training.preflight._check_agreement"
DESCRIBE_WORLD = "mmgraph.training.preflight._world"
HOST_MEMORY = "mmgraph.training.preflight.host_memory"
GATHER_OF_TOWERS = "mmgraph.towers.fingerprint.gather_object"
TENSORBOARD_IS_INSTALLED = "mmgraph.training.preflight.is_tensorboard_available"
WANDB_IS_INSTALLED = "mmgraph.training.preflight.is_wandb_available"
DEEPSPEED_IS_INSTALLED = "mmgraph.distributed.deepspeed.is_deepspeed_available"


def steps_done(part: Any) -> int:
    """Return the number of finished steps. ``part`` is the first argument of ``TAKE_STEP`` or ``RECORD_STEP``."""
    return part.progress.step


def stop_requested(part: Any) -> bool:
    """Return whether this process got a stop signal. ``part`` is the first argument of ``RECORD_STEP`` or ``SAVE``."""
    return part.signals.requested


def finished(part: Any) -> bool:
    """Return whether all steps are done. ``part`` is as for :func:`stop_requested`."""
    return part.schedule.finished


def get(target: str) -> Any:
    """Return the object with a dotted name."""
    return resolve_name(target)


def put(target: str, value: object) -> None:
    """Replace the object with a dotted name."""
    owner, name = target.rsplit(".", 1)
    setattr(resolve_name(owner), name, value)


def imports(*things: Any) -> str:
    """Return the import lines of a script for some objects."""
    return "".join(f"from {thing.__module__} import {thing.__qualname__}\n" for thing in things)
