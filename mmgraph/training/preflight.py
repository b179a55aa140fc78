"""Checks a launch at the start: raises errors and logs warnings before the towers are loaded."""

import dataclasses
import math
import os
import platform
import shutil
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, is_tensorboard_available, is_wandb_available

from mmgraph.config import Config
from mmgraph.data.graph import Graph
from mmgraph.distributed.collectives import broadcast_from_main_process, on_main_process, raise_on_all_ranks
from mmgraph.distributed.launch import check_batch_size, compute_dtype, describe
from mmgraph.errors import UserError
from mmgraph.towers.cost import MATMUL_SHARE, matmul_flops_per_s
from mmgraph.towers.fingerprint import file_fingerprints
from mmgraph.towers.load import empty_towers
from mmgraph.towers.store_plan import nodes_seen
from mmgraph.training import estimate
from mmgraph.utils.environment import host_memory, versions
from mmgraph.utils.log import log
from mmgraph.utils.units import size

SAME_EVERYWHERE = {  # values that must be equal on all ranks, and the remedy if they are not
    "settings": "give every machine the same command",
    "precision": "give every machine the same accelerate config",
    "node table": "give every machine the same files",
    "edge table": "give every machine the same files",
    "held-out edges": "give every machine the same files",
    "towers": "give every machine the same --model_name files",
    "versions": "install the same versions on every machine",
}


class Rank(NamedTuple):
    """Properties of one rank. They are gathered from all ranks."""

    host: str
    device: str
    free_gb: float
    total_gb: float
    local_ranks: int
    visible_gpus: int
    flops_per_s: float
    same_everywhere: dict[str, Any]  # values that must be equal on all ranks; the keys are those of SAME_EVERYWHERE


def check_run(config: Config, accelerator: Accelerator, graph: Graph) -> None:
    """Check a launch. With ``--check``, log all findings. Without it, log only the warnings.

    All ranks must call this function.

    Raises:
        UserError: a value differs between ranks, the global batch does not fit the number of ranks or the graph, the
            output folder cannot be used, or a tracker is not installed.
    """
    on_main_process(accelerator, lambda: _check_trackers(config))
    this_rank = raise_on_all_ranks(accelerator, lambda: _inspect(config, accelerator, graph))
    ranks: list[Rank] = gather_object([this_rank])
    _check_agreement(ranks)
    check_batch_size(config.global_batch_size, len(graph.rows), accelerator.num_processes)
    sizes = raise_on_all_ranks(accelerator, lambda: _sizes(config))
    output = broadcast_from_main_process(accelerator, lambda: _check_output(config, sizes))
    log(describe(accelerator, config.global_batch_size))
    findings = [
        *_world(accelerator, ranks),
        *(_device(number, rank) for number, rank in enumerate(ranks)),
        *_precision(accelerator),
        *_towers(config, ranks),
        f"every rank has the same {', '.join(SAME_EVERYWHERE)}",
        _batch(config, accelerator, len(graph.rows)),
        *output,
        *_resources(config, accelerator, ranks, sizes, graph),
    ]
    for finding in findings:
        if config.check or finding.startswith("warning: "):
            log(finding)


def _check_trackers(config: Config) -> None:
    if config.report_to in ("tensorboard", "all") and not is_tensorboard_available():
        raise UserError(f"--report_to {config.report_to}: TensorBoard is not installed; run pip install tensorboard")
    if config.report_to in ("wandb", "all") and not is_wandb_available():
        raise UserError(f"--report_to {config.report_to}: wandb is not installed; run pip install wandb")


def _sizes(config: Config) -> estimate.Sizes:
    with torch.device("meta"):
        towers = empty_towers(config.model_name)
    return estimate.model_sizes(towers, config)


def _inspect(config: Config, accelerator: Accelerator, graph: Graph) -> Rank:
    device = accelerator.device
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        name = f"{device} {torch.cuda.get_device_name(device)}"
    else:
        free, total, name = *host_memory(), f"{device.type}, {torch.get_num_threads()} thread(s)"
    same_everywhere = {
        "settings": dataclasses.asdict(config),
        "precision": f"{accelerator.mixed_precision}, {accelerator.distributed_type.value}",
        "node table": graph.nodes_fingerprint,
        "edge table": graph.edges_fingerprint,
        "held-out edges": graph.held_out.fingerprint if graph.held_out is not None else "",
        "towers": file_fingerprints(config.model_name),
        "versions": versions(("mmgraph", "torch", "accelerate", "transformers")),
    }
    speed = matmul_flops_per_s(device, compute_dtype(accelerator)) if config.check else math.nan
    local = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return Rank(
        platform.node(), name, free / 1e9, total / 1e9, local, torch.cuda.device_count(), speed, same_everywhere
    )


def _check_agreement(ranks: list[Rank]) -> None:
    for number, rank in enumerate(ranks):
        for name, remedy in SAME_EVERYWHERE.items():
            expected, value = ranks[0].same_everywhere[name], rank.same_everywhere[name]
            if isinstance(value, dict):
                # Only keys that both ranks have are compared: a rank may lack a model file that it does not need or has
                # not downloaded yet.
                keys = sorted(key for key in expected.keys() & value.keys() if expected[key] != value[key])
                expected, value = (", ".join(f"{key} {values[key]}" for key in keys) for values in (expected, value))
            if expected == value:
                continue
            raise UserError(
                f"rank {number} ({rank.host}) does not have the same {name} as rank 0 ({ranks[0].host}): "
                f"{str(value)[:60]} instead of {str(expected)[:60]}; {remedy}"
            )


def _world(accelerator: Accelerator, ranks: list[Rank]) -> list[str]:
    hosts = {rank.host: rank for rank in ranks}
    address = ""
    if len(ranks) > 1:
        address = f", rendezvous at {os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    lines = [f"{len(ranks)} process(es) on {len(hosts)} host(s){address}"]
    for host, rank in hosts.items():
        if rank.visible_gpus > rank.local_ranks and accelerator.device.type == "cuda":
            lines.append(
                f"warning: {host} has {rank.visible_gpus} visible GPUs, but the run uses {rank.local_ranks} of them; "
                "set --num_processes to the number of GPUs of all machines together"
            )
    return lines


def _device(number: int, rank: Rank) -> str:
    return f"rank {number}: {rank.host}, {rank.device}, {rank.free_gb:.1f} of {rank.total_gb:.1f} GB free"


def _precision(accelerator: Accelerator) -> list[str]:
    info = Path("/proc/cpuinfo")
    if accelerator.device.type != "cpu" or accelerator.mixed_precision != "bf16" or not info.exists():
        return []
    if {"amx_bf16", "avx512_bf16", "bf16"} & set(info.read_text().split()):
        return []
    return ["warning: this CPU has no bf16 instructions, so bf16 is much slower than float32; set --mixed_precision no"]


def _towers(config: Config, ranks: list[Rank]) -> list[str]:
    hosts = sorted({rank.host for rank in ranks if not rank.same_everywhere["towers"]})
    if not hosts:
        return []
    return [
        f"{config.model_name}: not on {', '.join(hosts)} yet; training first downloads it from the Hugging Face Hub"
    ]


def _batch(config: Config, accelerator: Accelerator, num_edges: int) -> str:
    steps, remainder = divmod(num_edges, config.global_batch_size)
    edges = config.global_batch_size // accelerator.num_processes
    micro = f", {min(config.micro_batch_size, edges)} per micro batch" if config.micro_batch_size else ""
    return (
        f"{config.global_batch_size} edges per step, {edges} per process{micro}; {steps:,} steps per epoch; an epoch "
        f"leaves out {remainder} of {num_edges:,} edges"
    )


def _check_output(config: Config, sizes: estimate.Sizes) -> list[str]:
    """Check that the output folder is writable and has enough disk space. Leave no file or folder behind."""
    folder = config.output_folder.resolve()
    while not folder.exists():
        folder = folder.parent
    try:
        with tempfile.TemporaryFile(dir=folder):
            free = shutil.disk_usage(folder).free
    except OSError as error:
        raise UserError(f"--output_dir {config.output_folder}: cannot write to {folder}: {error.strerror}") from None
    epoch, state = estimate.epoch_file_bytes(sizes), estimate.state_bytes(sizes)
    needed = epoch + 2 * state  # a new state is written before an old one is removed
    total = config.epochs * epoch + (config.keep_last + 1) * state + estimate.final_file_bytes(sizes)
    if free < needed:
        raise UserError(
            f"--output_dir {config.output_folder}: {size(free)} free, but an epoch file and two resume states need "
            f"{size(needed)}; free some disk space, or set another --output_dir"
        )
    line = (
        f"{config.output_folder}: writable, {free / 1e9:.1f} GB free; the complete run needs up to {total / 1e9:.1f} GB"
    )
    return [line if total <= free else f"warning: {line}"]


def _resources(
    config: Config, accelerator: Accelerator, ranks: list[Rank], sizes: estimate.Sizes, graph: Graph
) -> list[str]:
    edges = config.global_batch_size // len(ranks)
    device, half = accelerator.device.type, accelerator.mixed_precision != "no"
    stored = _stored(config, graph)
    needed = estimate.memory_gb(
        sizes, edges, config.micro_batch_size, "cuda" if device == "cuda" else "cpu", half, stored
    )
    lines = [f"about {needed:.1f} GB of memory per process (estimate)"]
    if stored:
        store = size(estimate.store_bytes(sizes, len(graph.nodes), half))
        lines.append(f"the towers run once per node, before the first step; their tokens take up to {store} on disk")
    for number, rank in enumerate(ranks):
        free = rank.free_gb if device == "cuda" else rank.free_gb / rank.local_ranks
        if needed > free:
            lines.append(
                f"warning: rank {number} ({rank.host}) may run out of memory: about {needed:.1f} GB needed, "
                f"{free:.1f} GB free; set --micro_batch_size {max(1, edges // 4)} to use less memory"
            )
    if config.check:
        slowest = min(rank.flops_per_s for rank in ranks)
        seconds = estimate.step_seconds(sizes, edges, config.micro_batch_size, slowest, stored)
        speed = f"{MATMUL_SHARE:.0%} of the {slowest / 1e9:,.0f} GFLOP/s measured for a matrix product"
        lines.append(
            f"about {seconds:.2g} s per step at full text length (estimate: {speed})"
            + ("" if stored else ", plus the time to read images")
        )
    return lines


def _stored(config: Config, graph: Graph) -> bool:
    """Return whether the run will use a tower store. It is assumed that the store can be written."""
    steps = config.epochs * (len(graph.rows) // config.global_batch_size)
    planned_nodes = nodes_seen(config, graph, min(steps, config.max_steps or steps))
    return config.tower_cache != "off" and (config.tower_cache != "auto" or planned_nodes > len(graph.nodes))
