"""Set up DeepSpeed's ZeRO.

DeepSpeed is imported inside the functions: the import takes seconds and prints messages, and most runs do not need it.
"""

import logging
import os
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType, is_deepspeed_available

import mmgraph
from mmgraph.errors import UserError
from mmgraph.utils.error_text import one_line

RESERVED_KEYS = {  # key of a DeepSpeed config that conflicts with flags of the run -> these flags
    "optimizer": "AdamW with --learning_rate and --weight_decay",
    "scheduler": "--lr_schedule",
    "gradient_clipping": "--max_grad_norm",
    "gradient_accumulation_steps": "--micro_batch_size, which keeps the loss over the full batch",
}
CONFIG_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"  # variable that `accelerate launch` sets to deepspeed_config_file


def build_plugin(cpu: bool) -> DeepSpeedPlugin:
    """Build Accelerate's DeepSpeed plugin from the JSON file that the accelerate config names.

    Args:
        cpu: the machine has no GPU, so DeepSpeed runs on CPUs over gloo.

    Raises:
        UserError: DeepSpeed is not installed, or the JSON file cannot be used.
    """
    if not is_deepspeed_available():
        raise UserError("the accelerate config uses DeepSpeed, which is not installed: run pip install deepspeed")
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.pop("ACCELERATE_USE_CPU", None)  # if set, Accelerate would treat each rank as a separate world
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if cpu:
        # DeepSpeed would compile a shared-memory all-reduce at its first start. If that start is killed, it leaves a
        # lock that all later starts wait for. gloo does not need this extension.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    path = os.environ.get(CONFIG_FILE, "none")
    if path != "none":
        # The path may be relative to the checkout while the working directory is another folder.
        in_checkout = Path(mmgraph.__file__).parent.parent / path
        os.environ[CONFIG_FILE] = path if Path(path).exists() or not in_checkout.exists() else str(in_checkout)
    # Accelerate rejects a config with both mixed_precision and a DeepSpeed JSON, although it uses this precision for
    # each "auto" in the JSON. So mixed_precision is removed from the fields that Accelerate checks.
    fields = os.environ.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")
    os.environ["ACCELERATE_CONFIG_DS_FIELDS"] = ",".join(name for name in fields if name != "mixed_precision")
    try:
        plugin = DeepSpeedPlugin(zero3_init_flag=False)
    except (OSError, ValueError) as error:
        raise UserError(f"DeepSpeed config {path}: {one_line(error)[:300]}") from None
    for key, flag in RESERVED_KEYS.items():
        harmless = ("auto", 1) if key == "gradient_accumulation_steps" else ("auto",)
        if plugin.deepspeed_config.get(key, "auto") not in harmless:
            raise UserError(f"DeepSpeed config {path}: remove '{key}' or set it to \"auto\"; mmgraph uses {flag}")
    return plugin


def disable_zero3_for_towers() -> None:
    """Keep transformers from partitioning the frozen towers when it loads them under ZeRO-3.

    The towers are not part of the DeepSpeed engine, so nothing would gather their partitioned weights.
    """
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def configure_deepspeed(accelerator: Accelerator, micro_batch: int, max_grad_norm: float) -> None:
    """Write the run's values into DeepSpeed's config. Called before ``prepare``. Without DeepSpeed, do nothing.

    Gradient clipping must always be set to a number, and 0 disables it. By default, DeepSpeed clips at 1.0, and
    Accelerate turns "auto" into 1.0.

    Args:
        accelerator: the run's Accelerator.
        micro_batch: edges per step on this rank.
        max_grad_norm: L2 norm that gradients are clipped to; 0 disables clipping.

    Raises:
        UserError: ZeRO stage 0, or fp16 on a device that does not support it.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    settings = accelerator.deepspeed_plugin.deepspeed_config
    settings["gradient_clipping"] = max_grad_norm
    settings["train_micro_batch_size_per_gpu"] = micro_batch
    settings["train_batch_size"] = micro_batch * accelerator.num_processes
    if "bf16" in settings:  # without this, stages 1 and 2 may apply a non-finite gradient
        settings["bf16"]["check_grad_overflow"] = True
    if settings["zero_optimization"].get("stage", 0) == 0:
        raise UserError(
            "ZeRO stage 0 is plain data parallel training: use accelerate_configs/multi_gpu.yaml, without DeepSpeed"
        )
    from deepspeed.accelerator import get_accelerator

    if accelerator.mixed_precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise UserError("DeepSpeed does not support fp16 on this device: set --mixed_precision bf16 (or no)")


def is_engine(module: Any) -> bool:
    """Whether a prepared module is a DeepSpeed engine with ZeRO partitions. Stage 0 has none."""
    return hasattr(module, "zero_optimization_stage") and module.zero_optimization_stage() > 0
