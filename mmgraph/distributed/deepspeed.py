"""The set-up of DeepSpeed's ZeRO.

DeepSpeed is imported inside the functions: it costs seconds and prints, and most runs do without it.
"""

import logging
import os
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from accelerate.utils import DeepSpeedPlugin, DistributedType, is_deepspeed_available

import mmgraph
from mmgraph.errors import UserError

OURS = {  # what DeepSpeed would do beside, or instead of, the run's settings
    "optimizer": "AdamW, --learning_rate, --weight_decay",
    "scheduler": "--lr_schedule",
    "gradient_clipping": "--max_grad_norm",
    "gradient_accumulation_steps": "--micro_batch_size, with the loss over the whole batch",
}
CONFIG_FILE = "ACCELERATE_DEEPSPEED_CONFIG_FILE"  # where `accelerate launch` puts the config's deepspeed_config_file


def build_plugin(cpu: bool) -> DeepSpeedPlugin:
    """The plugin for Accelerate, from the JSON that the accelerate config names.

    Args:
        cpu: there is no GPU: DeepSpeed is to run on gloo.

    Raises:
        UserError: DeepSpeed is not installed, or the JSON cannot be used.
    """
    if not is_deepspeed_available():
        raise UserError("this accelerate config wants DeepSpeed, which is not installed: pip install deepspeed")
    if cpu:
        os.environ["DS_ACCELERATOR"] = "cpu"
        os.environ.pop("ACCELERATE_USE_CPU", None)  # Accelerate would take each rank for a world of its own
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.WARNING)
    if cpu:
        # It would compile a shared-memory all-reduce at the first start, and a start that is killed meanwhile leaves a
        # lock that all later ones wait for. gloo does without.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    path = os.environ.get(CONFIG_FILE, "none")
    if path != "none":
        beside = Path(mmgraph.__file__).parent.parent / path  # relative to the checkout, launched from another folder
        os.environ[CONFIG_FILE] = path if Path(path).exists() or not beside.exists() else str(beside)
    # Accelerate refuses a precision in its own config beside a JSON, though it takes it where the JSON says "auto".
    fields = os.environ.get("ACCELERATE_CONFIG_DS_FIELDS", "").split(",")
    os.environ["ACCELERATE_CONFIG_DS_FIELDS"] = ",".join(name for name in fields if name != "mixed_precision")
    try:
        plugin = DeepSpeedPlugin(zero3_init_flag=False)
    except (OSError, ValueError) as error:
        raise UserError(f"DeepSpeed config {path}: {' '.join(str(error).split())[:300]}") from None
    for key, flag in OURS.items():
        harmless = ("auto", 1) if key == "gradient_accumulation_steps" else ("auto",)
        if plugin.deepspeed_config.get(key, "auto") not in harmless:
            raise UserError(f"DeepSpeed config {path}: leave '{key}' out or \"auto\"; mmgraph has {flag}")
    return plugin


def leave_towers_alone() -> None:
    """Under ZeRO-3, have transformers not partition the frozen towers as it loads them: they are not DeepSpeed's."""
    from transformers.integrations import unset_hf_deepspeed_config

    unset_hf_deepspeed_config()


def set_run(accelerator: Accelerator, micro_batch: int, max_grad_norm: float) -> None:
    """Write the run's own values into DeepSpeed's config, before ``prepare``; nothing where it is not in use.

    DeepSpeed clips gradients at 1.0 where its config says nothing, and Accelerate turns "auto" into 1.0.

    Args:
        micro_batch: edges of a step on this rank.
        max_grad_norm: L2 norm that gradients are clipped to; 0 does not clip.
    """
    if accelerator.distributed_type != DistributedType.DEEPSPEED:
        return
    settings = accelerator.deepspeed_plugin.deepspeed_config
    settings["gradient_clipping"] = max_grad_norm
    settings["train_micro_batch_size_per_gpu"] = micro_batch
    settings["train_batch_size"] = micro_batch * accelerator.num_processes
    if "bf16" in settings:  # else stages 1 and 2 may be told to take a step that is not finite
        settings["bf16"]["check_grad_overflow"] = True
    if settings["zero_optimization"].get("stage", 0) == 0:
        raise UserError("ZeRO stage 0 is plain data parallel training: use accelerate_configs/multi_gpu.yaml")
    from deepspeed.accelerator import get_accelerator

    if accelerator.mixed_precision == "fp16" and not get_accelerator().is_fp16_supported():
        raise UserError("DeepSpeed has no fp16 on this device: --mixed_precision bf16 (or no)")


def is_engine(module: Any) -> bool:
    """Whether a prepared module is DeepSpeed's with partitions. (Stage 0 has none: its parameters are plain ones.)"""
    return hasattr(module, "zero_optimization_stage") and module.zero_optimization_stage() > 0
