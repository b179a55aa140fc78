"""Builds a run: finds its resume state, opens its data and its token source, and builds the other parts."""

import math
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.data_loader import DataLoaderShard
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from mmgraph.checkpoints.consolidate import restore, set_loss_scale, uncompiled
from mmgraph.checkpoints.files import TrainedState
from mmgraph.checkpoints.progress import Progress
from mmgraph.checkpoints.resume_state import compute_run_fingerprint
from mmgraph.checkpoints.run_start import find_state, init_from_fingerprint, keep_init_from, read_start
from mmgraph.config import Config
from mmgraph.data.adjacency import Adjacency, pair_keys
from mmgraph.data.batches import build_loader
from mmgraph.data.graph import Graph
from mmgraph.data.images import ImageCounter
from mmgraph.data.input_rules import InputRules
from mmgraph.data.node_inputs import NodeInputs
from mmgraph.data.sampler import GlobalBatchSampler
from mmgraph.distributed.collectives import broadcast_from_main_process, raise_on_all_ranks
from mmgraph.distributed.deepspeed import configure_deepspeed
from mmgraph.distributed.signals import StopRequest
from mmgraph.errors import UserError
from mmgraph.evaluation.evaluator import Evaluation
from mmgraph.inference.node_outputs import NodeOutputs
from mmgraph.losses.negative_mask import build_false_negatives
from mmgraph.losses.objective import Objective
from mmgraph.models.multimodal_graph_encoder import TrainedModule
from mmgraph.towers.cached import load_content_hashes
from mmgraph.towers.fingerprint import check_same_towers, towers_fingerprint
from mmgraph.towers.live import LiveTowers
from mmgraph.towers.load import load_tokenizer_and_processor, read_tower_state, tower_shapes
from mmgraph.towers.store_plan import nodes_seen
from mmgraph.towers.token_source import TokenSource, open_source
from mmgraph.training.batch_stream import BatchStream
from mmgraph.training.checkpointer import Checkpointer
from mmgraph.training.early_stopping import EarlyStopping
from mmgraph.training.lr_schedule import lr_at
from mmgraph.training.nonfinite import NonfiniteSteps
from mmgraph.training.run_log import RunLog
from mmgraph.training.schedule import Schedule
from mmgraph.training.step_log import StepLog
from mmgraph.training.train_step import TrainStep
from mmgraph.training.trainer import Run
from mmgraph.utils.error_text import explain_out_of_memory


def build_run(config: Config, accelerator: Accelerator, graph: Graph) -> Run:
    """Build a run. All ranks must call this function. All random values depend only on the seed.

    Args:
        config: the run's settings.
        accelerator: from :func:`mmgraph.distributed.launch.build_accelerator`.
        graph: the run's data.

    Raises:
        UserError: the towers cannot be loaded, the output folder contains another run, or a resume state or
            ``--init_from`` file does not fit this run.
    """
    start = _read_start(config, accelerator, graph)
    progress = start.progress
    sampler = GlobalBatchSampler(len(graph.rows), config.global_batch_size, config.seed)
    early_stopping = EarlyStopping(config, progress, graph.held_out.fingerprint if graph.held_out else "")
    schedule = Schedule(config, progress, early_stopping, len(sampler), graph.held_out is not None)
    _check_position(start, schedule)
    opened = _open_data(config, accelerator, graph, schedule, start.run_fingerprint["towers"])
    prepared = _prepare(config, accelerator, graph, sampler, opened, start)

    images, signals = ImageCounter(len(graph.nodes)), StopRequest(config.stop_grace)
    run_log = RunLog(config, accelerator, progress, start.state, schedule.total_steps)
    stream = BatchStream(prepared.loader, sampler, opened.source, progress, schedule, images)
    train_step = TrainStep(
        prepared.module,
        prepared.optimizer,
        opened.objective,
        opened.source,
        accelerator,
        progress,
        config.global_batch_size,
        lambda step: lr_at(step, config, schedule.total_steps),
        _micro_batches(config, accelerator),
        config.max_grad_norm,
    )
    nonfinite = NonfiniteSteps(config, accelerator, graph, progress)
    step_log = StepLog(
        config, accelerator, progress, schedule, train_step, stream, images, signals, nonfinite, run_log
    )  # fmt: skip
    checkpointer = Checkpointer(
        config, accelerator, progress, schedule, start.run_fingerprint, start.frozen, prepared.module,
        prepared.optimizer, step_log, run_log, signals,
    )  # fmt: skip
    return Run(
        config, accelerator, graph, progress, schedule, early_stopping, stream, train_step, step_log, checkpointer,
        run_log, signals, images, opened.outputs, opened.evaluation, prepared.parameters,
    )  # fmt: skip


class _Start(NamedTuple):
    """State of a run before its first step in this launch. The run is new, uses ``--init_from``, or is resumed."""

    state: Path | None  # folder of the resume state; None for a new run
    run_fingerprint: dict[str, Any]  # values that must not change when the run is resumed
    frozen: dict[str, torch.Tensor]  # the towers' tensors, under the keys of the original trainer
    progress: Progress
    trained: TrainedState | None  # weights and Adam's moments; None if the weights are random


def _read_start(config: Config, accelerator: Accelerator, graph: Graph) -> _Start:
    fixed = compute_run_fingerprint(config, graph.nodes_fingerprint, graph.edges_fingerprint)
    fixed["init_from"] = broadcast_from_main_process(accelerator, lambda: init_from_fingerprint(config))
    state = broadcast_from_main_process(accelerator, lambda: find_state(config, fixed))
    fixed["init_from"] = broadcast_from_main_process(accelerator, lambda: keep_init_from(state, fixed["init_from"]))
    frozen = raise_on_all_ranks(accelerator, lambda: read_tower_state(config.model_name))
    fixed["towers"] = towers_fingerprint(frozen)
    check_same_towers(fixed["towers"])
    progress, trained = broadcast_from_main_process(accelerator, lambda: read_start(config, state, fixed, frozen))
    return _Start(state, fixed, frozen, progress, trained)


def _check_position(start: _Start, schedule: Schedule) -> None:
    """Raise :class:`UserError` if the state was saved at a position that no epoch of this run reaches."""
    done, epoch = start.progress.samples_in_epoch, schedule.samples_per_epoch
    if done > epoch or done % schedule.config.global_batch_size:
        raise UserError(
            f"{start.state}: belongs to another run: it was saved after {done:,} edges of an epoch, and this is no "
            f"position in an epoch of this run ({epoch:,} edges); set another --output_dir for a new run"
        )


class _Data(NamedTuple):
    """The run's inputs and token source, and the parts that depend on the graph."""

    inputs: NodeInputs
    source: TokenSource
    objective: Objective
    outputs: NodeOutputs
    evaluation: Evaluation | None


def _open_data(config: Config, accelerator: Accelerator, graph: Graph, schedule: Schedule, towers: str) -> _Data:
    tokenizer, processor = raise_on_all_ranks(accelerator, lambda: load_tokenizer_and_processor(config.model_name))
    inputs = NodeInputs(tokenizer, processor, config.cache_size, InputRules.of(config))
    content_hashes, neighbors = None, None
    if config.tower_cache != "off" or config.false_negatives != "keep":
        content_hashes = load_content_hashes(config, accelerator, graph)
    if config.false_negatives == "mask_neighbors" or graph.held_out is not None:
        neighbors = Adjacency(torch.from_numpy(pair_keys(graph.rows, len(graph.nodes))), len(graph.nodes))
    masked = build_false_negatives(config, len(graph.nodes), content_hashes, neighbors, accelerator.device)
    objective = Objective(config, masked)
    evaluation: Evaluation | None = None
    if graph.held_out is not None and neighbors is not None:
        evaluation = Evaluation(accelerator, neighbors, graph.held_out, config.seed)
    planned_nodes = nodes_seen(config, graph, max(0, schedule.total_steps - schedule.progress.step))
    source = open_source(config, accelerator, graph, content_hashes, inputs, towers, planned_nodes)
    outputs = NodeOutputs(graph.nodes, graph.images, inputs, source, config.num_workers, config.collective_timeout)
    return _Data(inputs, source, objective, outputs, evaluation)


class _Prepared(NamedTuple):
    """The parts that Accelerate has prepared, and the number of parameters."""

    module: nn.Module
    optimizer: AcceleratedOptimizer
    loader: DataLoaderShard
    parameters: tuple[int, int]  # number of trained and of frozen parameters


def _prepare(
    config: Config, accelerator: Accelerator, graph: Graph, sampler: GlobalBatchSampler, data: _Data, start: _Start
) -> _Prepared:
    d_text, d_vis = tower_shapes(config.model_name).widths
    torch.manual_seed(config.seed)  # set here, so that the weights of the module depend only on the seed
    module = TrainedModule(d_text, d_vis, config.fused_dim, config.proj_dim)
    frozen = sum(tensor.numel() for tensor in start.frozen.values())
    # Counted before prepare(), in which ZeRO partitions the parameters.
    parameters = sum(parameter.numel() for parameter in module.parameters()), frozen
    if start.trained is not None:
        module.load_state_dict(start.trained.weights)
    optimizer = build_optimizer(config, accelerator, module)
    live = data.inputs if isinstance(data.source, LiveTowers) else None
    loader = build_loader(graph, live, sampler, config.num_workers, config.collective_timeout)
    configure_deepspeed(accelerator, config.global_batch_size // accelerator.num_processes, config.max_grad_norm)
    with explain_out_of_memory("set a smaller --fused_dim"):
        wrapped, optimizer, loader = accelerator.prepare(module, optimizer, loader)
    if accelerator.num_processes > 1 and uncompiled(wrapped) is module:
        raise UserError(
            "the trained module is not wrapped for data parallel training, so the ranks would not share gradients; "
            "start with a config file from accelerate_configs/"
        )
    if start.trained is not None:
        restore(wrapped, optimizer.optimizer, start.trained)
    if start.progress.loss_scale is not None:
        set_loss_scale(accelerator, wrapped, start.progress.loss_scale)
    return _Prepared(wrapped, optimizer, loader, parameters)


def build_optimizer(config: Config, accelerator: Accelerator, module: nn.Module) -> torch.optim.AdamW:
    """Build the optimizer of a run's trained module."""
    return torch.optim.AdamW(
        module.parameters(),
        lr=config.learning_rate,
        weight_decay=config.weight_decay,
        # Accelerate cannot detect that a loss scaler skips a step of a fused optimizer. None lets PyTorch choose among
        # the other implementations; False would choose a loop over the parameters.
        fused=True if accelerator.scaler is None else None,
    )


def _micro_batches(config: Config, accelerator: Accelerator) -> int:
    """Return the number of micro batches into which a rank divides its batch in each step."""
    edges = config.global_batch_size // accelerator.num_processes
    return math.ceil(edges / (config.micro_batch_size or edges))
