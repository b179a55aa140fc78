"""Build the Accelerator of a launch, and check that it matches the launch."""

import os
import time
import uuid
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import (
    DataLoaderConfiguration,
    DistributedDataParallelKwargs,
    DistributedType,
    InitProcessGroupKwargs,
)

from mmgraph.distributed.deepspeed import build_plugin, disable_zero3_for_towers
from mmgraph.errors import UserError

SUPPORTED = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU, DistributedType.DEEPSPEED)


def build_accelerator(collective_timeout: float = 600) -> Accelerator:
    """Build the Accelerator of this launch.

    Args:
        collective_timeout: seconds that a rank waits for the other ranks before it fails.

    Raises:
        UserError: the launch does not fit this machine, or training would silently be wrong, for example because each
            rank would train alone.
    """
    cpu = not torch.accelerator.is_available()
    deepspeed = _is_requested("DEEPSPEED")
    _refuse_lone_process()
    if not cpu:
        check_gpus(int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.accelerator.device_count())
        _configure_cuda()
    timeout = timedelta(seconds=collective_timeout)
    process_group = InitProcessGroupKwargs(timeout=timeout)
    if cpu and deepspeed:
        process_group.backend = "gloo"
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True" and (cpu or torch.cuda.is_available()):
        _join(timeout, "gloo" if cpu else "nccl")
    try:
        accelerator = Accelerator(
            cpu=cpu and not deepspeed,  # Accelerate ignores DeepSpeed if this is true
            deepspeed_plugin=build_plugin(cpu) if deepspeed else None,
            step_scheduler_with_optimizer=False,
            dataloader_config=DataLoaderConfiguration(
                split_batches=True,  # the sampler's batches are global; each rank takes its slice
                even_batches=False,  # do not fill the last batch with repeated edges: they would be false negatives
                dispatch_batches=False,
                non_blocking=True,
            ),
            # gloo sums in the order of DDP's buckets, and DDP reorders its buckets after the first step unless it looks
            # for unused parameters. With reordered buckets, a resumed run of 3 or more ranks would differ in the last
            # bits from an uninterrupted run. With 2 ranks, the order does not change the sums, so the flag stays off
            # to avoid DDP's warning.
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=cpu and _launched_processes() > 2),
                process_group,
            ],
        )
    except ValueError as error:
        raise UserError(f"the accelerate config does not fit this machine: {error}") from None
    if deepspeed:
        disable_zero3_for_towers()
    _check_world(accelerator)
    return accelerator


def _configure_cuda() -> None:
    """Set PyTorch's switches for CUDA. They have no effect on other devices."""
    # cuDNN's attention builds a plan on the host for each new shape, and the numbers of unique nodes and of text tokens
    # change from step to step. One user measured 1 s per shape (FunASR issue 3704).
    torch.backends.cuda.enable_cudnn_sdp(False)
    # float32 means float32: by default, the convolution of the patches would round its inputs to TF32 (10 bits).
    torch.backends.cudnn.allow_tf32 = False


def _join(timeout: timedelta, backend: str) -> None:
    """Initialize the process group under a prefix of torchrun's store that no earlier start has used.

    torchrun keeps one store across restarts (``--max_restarts``), and ranks would find the addresses of dead ranks in
    it. So each rank asks rank 0 for the number of this start. Rank 0 stores the answer under a random key that the rank
    has chosen, so that no rank reads the answer to a request of an earlier start.
    """
    environment = os.environ
    rank, world_size = int(environment["RANK"]), int(environment["WORLD_SIZE"])
    store = dist.TCPStore(environment["MASTER_ADDR"], int(environment["MASTER_PORT"]), timeout=timeout)
    if rank == 0:
        start = store.add("mmgraph/starts", 1)
        _answer(store, start, world_size, time.monotonic() + timeout.total_seconds())
    else:
        name = uuid.uuid4().hex
        store.set(f"mmgraph/asks/{rank}", name)
        try:
            start = int(store.get(f"mmgraph/answers/{name}"))
        except dist.DistStoreError:
            raise UserError(
                f"rank {rank} got no answer from rank 0 in time (--collective_timeout); see the output of rank 0"
            ) from None
        store.set(f"mmgraph/{start}/{rank}", "is here")
    dist.init_process_group(
        backend, store=dist.PrefixStore(f"mmgraph/{start}", store), rank=rank, world_size=world_size, timeout=timeout
    )


def _answer(store: dist.Store, start: int, world_size: int, deadline: float) -> None:
    """On rank 0, answer the other ranks' requests until every rank has confirmed this start.

    The store may contain requests of dead ranks from an earlier start. Rank 0 answers these requests too, which has no
    effect.
    """
    missing = list(range(1, world_size))
    while missing := [rank for rank in missing if not store.check([f"mmgraph/{start}/{rank}"])]:
        if time.monotonic() > deadline:
            raise UserError(
                f"rank 0 got no message from rank(s) {missing} in time (--collective_timeout); see their output"
            )
        for rank in missing:
            if store.check([f"mmgraph/asks/{rank}"]):
                store.set(f"mmgraph/answers/{store.get(f'mmgraph/asks/{rank}').decode()}", str(start))
        time.sleep(0.02)


def _refuse_lone_process() -> None:
    """Raise :class:`UserError` if several CPU processes were requested and only one was started.

    ``accelerate launch --cpu --num_processes 2`` starts only one. This launch sets MASTER_ADDR, but not RANK.
    """
    environment = os.environ
    if (
        environment.get("ACCELERATE_USE_CPU", "").lower() == "true"
        and "MASTER_ADDR" in environment
        and "RANK" not in environment
    ):
        raise UserError(
            "several CPU processes were requested, but the launcher started only one; use --config_file "
            "accelerate_configs/cpu_2proc.yaml (with --num_processes N for another number), or unset MASTER_ADDR to "
            "run one process"
        )


def _launched_processes() -> int:
    return int(os.environ.get("WORLD_SIZE", "1"))


def _is_requested(backend: str) -> bool:
    return os.environ.get(f"ACCELERATE_USE_{backend}", "false").lower() == "true"


def check_gpus(local_ranks: int, visible: int) -> None:
    """Raise :class:`UserError` if a host has fewer visible GPUs than ranks."""
    if local_ranks > visible:
        raise UserError(
            f"{local_ranks} processes were started on host {os.uname().nodename}, but only {visible} GPUs are visible; "
            "set --num_processes to the number of GPUs on all machines together, and check CUDA_VISIBLE_DEVICES"
        )


def _check_world(accelerator: Accelerator) -> None:
    launched = _launched_processes()
    if launched != accelerator.num_processes:
        raise UserError(
            f"{launched} processes were launched, but Accelerate sees {accelerator.num_processes}: each would train "
            "alone; use a config from accelerate_configs/"
        )
    unsupported = [name for name in ("FSDP", "MEGATRON_LM", "TPU") if _is_requested(name)]
    if unsupported or accelerator.distributed_type not in SUPPORTED:
        backend_name = unsupported[0] if unsupported else accelerator.distributed_type.value
        raise UserError(
            f"{backend_name} is not supported; use a config from accelerate_configs/ (data parallel or DeepSpeed)"
        )
    if _is_requested("DEEPSPEED") and accelerator.distributed_type != DistributedType.DEEPSPEED:
        raise UserError("DeepSpeed was requested but is not in use: start with accelerate launch, without --cpu")
    if accelerator.gradient_accumulation_steps != 1:
        raise UserError(
            "gradient_accumulation_steps must be 1: contrastive losses need the full batch; for larger batches, set "
            "--global_batch_size"
        )


def check_batch_size(batch_size: int, num_edges: int, num_processes: int) -> None:
    """Raise :class:`UserError` if ``batch_size`` is not a multiple of ``num_processes`` or exceeds ``num_edges``."""
    if batch_size % num_processes:
        below = batch_size - batch_size % num_processes
        sizes = " or ".join(str(size) for size in (below, below + num_processes) if size)
        raise UserError(
            f"--global_batch_size {batch_size} is not divisible by the {num_processes} processes; use {sizes}"
        )
    if batch_size > num_edges:
        raise UserError(
            f"--global_batch_size {batch_size} is larger than the graph's {num_edges:,} edges, and incomplete batches "
            "are dropped; use a smaller batch"
        )


def describe(accelerator: Accelerator, batch_size: int) -> str:
    """Describe a launch in one line: processes, device, precision, edges per step and per process."""
    count = accelerator.num_processes
    device = (
        torch.cuda.get_device_name(accelerator.device) if accelerator.device.type == "cuda" else accelerator.device.type
    )
    hint = ""
    if device != "cpu" and batch_size // count < 64:
        hint = f"; give each GPU 64 edges or more: set --global_batch_size {64 * count}"
    threads = f", {torch.get_num_threads()} thread(s) each" if device == "cpu" else ""
    return (
        f"{count} process{'es' if count > 1 else ''} ({accelerator.distributed_type.value}), device {device}{threads}, "
        f"precision {accelerator.mixed_precision}, {batch_size} edges per step, {batch_size // count} per process{hint}"
    )


def compute_dtype(accelerator: Accelerator) -> torch.dtype:
    """Return the dtype of matrix products in the mixed precision of the launch."""
    return {"bf16": torch.bfloat16, "fp16": torch.float16}.get(accelerator.mixed_precision, torch.float32)


def peak_memory_gb(device: torch.device) -> float:
    """Return this rank's peak memory so far, in GB (10^9 bytes): GPU memory on a GPU, else the process's memory."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    # not getrusage: a process inherits that value from its parent
    status = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(status["VmHWM"].split()[0]) * 1024 / 1e9
