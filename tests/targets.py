"""What tests replace, wrap or look up in the package by its name: the one place that knows of its shape."""

from pkgutil import resolve_name
from typing import Any

# training, faults
TAKE_STEP = "mmgraph.training.train_step.TrainStep.__call__"  # of a train step and a batch: forward, backward, update
RECORD_STEP = "mmgraph.training.step_log.StepLog.submit"  # of a step log and a step's result, after each step
HOST_COPY_START = "mmgraph.training.host_copy.HostCopy.__init__"
HOST_COPY_READ = "mmgraph.training.host_copy.HostCopy.tolist"
SAVE = "mmgraph.training.checkpointer.Checkpointer.save"  # all that a save writes, epoch and final file too
EVALUATE = "mmgraph.training.trainer.Run.evaluate"  # all that an evaluation writes
BUILD_LOADER = "mmgraph.data.batches.build_loader"  # at a start, once the state was read
RANK_HELD_OUT = "mmgraph.evaluation.evaluator.Evaluation.evaluate"
RECORD_EVALUATION = "mmgraph.training.run_log.RunLog.evaluation"  # on the main process
RECORD_ROW = "mmgraph.training.run_log.RunLog.row"  # and log line, of a step
WRITE_ROW = "mmgraph.training.metrics_file.MetricsFile.write"  # on the main process
LOSSES = "mmgraph.losses.contrastive.contrastive_losses"
FORWARD = "mmgraph.models.multimodal_graph_encoder.TrainedModule.forward"
COLLATE = "mmgraph.data.batches.BatchCollator.__call__"  # where towers run
COLLATE_EDGES = "mmgraph.data.batches.EdgeCollator.__call__"  # where tokens are stored
EDGE_ROWS = "mmgraph.data.batches.EdgeRows.__getitems__"
CONSOLIDATE = "mmgraph.checkpoints.consolidate.consolidate"  # on every rank, in a save and an evaluation
WRITE_STATE = "mmgraph.checkpoints.resume_state.write_state"  # on the main process
PRUNE_STATES = "mmgraph.checkpoints.resume_state._prune"
WRITE_CHECKPOINT = "mmgraph.checkpoints.files.write_checkpoint"  # epoch and final file
OPEN_GRAPH = "mmgraph.cli.start.open_graph"
LOAD_CONTENT_HASHES = "mmgraph.towers.cached.load_content_hashes"
OPEN_STORE = "mmgraph.towers.cached.open_store"
BUILD_STORE = "mmgraph.towers.store_builder.build"
BUILD_ACCELERATOR = "mmgraph.distributed.launch.build_accelerator"
MEET_ANSWER = "mmgraph.distributed.launch._answer"  # rank 0's part of how ranks meet
MEET = "mmgraph.distributed.launch._join"
MEET_FOLDER = "mmgraph"  # of the keys in the store by which ranks meet
FAIL = "mmgraph.cli.failures.end_workers"  # first of all, where a run ends in an error
OTHERS_WAIT_SECONDS = "mmgraph.cli.failures.OTHERS_WAIT_SECONDS"  # before another rank than the main one says an error
TRACKER_SECONDS = [f"mmgraph.training.trackers.{name}_SECONDS" for name in ("START", "HANG", "FINISH")]  # patience

# data, towers, losses, command line
CLAIM_FILE = "mmgraph.utils.files.claim_file"
CHECK_UNIQUE = "mmgraph.data.table_cache.check_unique"
READ_CHUNKS = "mmgraph.data.table_cache.read_chunks"
ROW_CHUNK = "mmgraph.data.table_cache.ROW_CHUNK"
EDGE_CHUNK = "mmgraph.data.table_cache.EDGE_CHUNK"
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
LOAD_ENCODER = "mmgraph.inference.pretrained.load_pretrained_encoder"
LOGIT_CHUNK = "mmgraph.losses.contrastive.LOGIT_CHUNK"
INFO_NCE = "mmgraph.losses.contrastive._info_nce"

# evaluation, inference, report, bench
QUERY_CHUNK = "mmgraph.evaluation.ranking.QUERY_CHUNK"
CANDIDATE_CHUNK = "mmgraph.evaluation.ranking.CANDIDATE_CHUNK"
SAMPLED_NEGATIVES = "mmgraph.evaluation.ranking._negatives"
RANKS_OF_EMBEDDINGS = "mmgraph.evaluation.evaluator.Evaluation.ranks"
NODES_OF_A_FEATURE_SHARD = "mmgraph.inference.feature_shards.SHARD_NODES"
MAKE_FEATURE_SHARDS = "mmgraph.inference.feature_shards.FeatureShards.make"
REPORT_AT_THE_END = "mmgraph.report.make.end_of_run"
WRITE_PAGE = "mmgraph.report.make.write_page"
EMBED_SHARD_OF_REPORT = "mmgraph.report.make.embed_shard"
STUDY_LAUNCH = "mmgraph.bench.study.launch"
TOWERS_OF_BENCH_GRAPH = "mmgraph.bench.graph.build_towers"
LOG_FILE = "mmgraph.utils.log.log_file"
CHECK_AGREEMENT = "mmgraph.training.preflight._check_agreement"
DESCRIBE_WORLD = "mmgraph.training.preflight._world"
HOST_MEMORY = "mmgraph.training.preflight._host_memory"
GATHER_OF_TOWERS = "mmgraph.towers.fingerprint.gather_object"
TENSORBOARD_IS_INSTALLED = "mmgraph.training.preflight.is_tensorboard_available"
DEEPSPEED_IS_INSTALLED = "mmgraph.distributed.deepspeed.is_deepspeed_available"


def steps_done(part: Any) -> int:
    """Of what ``TAKE_STEP`` and ``RECORD_STEP`` are called with first: how many optimizer steps are done."""
    return part.progress.step


def stop_requested(part: Any) -> bool:
    """Of what ``RECORD_STEP`` and ``SAVE`` are called with first: whether this process was asked to stop."""
    return part.signals.requested


def finished(part: Any) -> bool:
    """Of the same: whether all steps are done."""
    return part.schedule.finished


def get(target: str) -> Any:
    """What a dotted name stands for."""
    return resolve_name(target)


def put(target: str, value: object) -> None:
    """Replace what a dotted name stands for."""
    owner, name = target.rsplit(".", 1)
    setattr(resolve_name(owner), name, value)


def imports(*things: Any) -> str:
    """Lines of a script that import what a test has imported."""
    return "".join(f"from {thing.__module__} import {thing.__qualname__}\n" for thing in things)
