"""The learning rate, a pure function of the step."""

import math

from mmgraph.config import Config


def lr_at(step: int, config: Config, total_steps: int) -> float:
    """The rate of update ``step`` (from 1): linear warmup, then constant or a cosine that ends at 0 (SGDR,
    Loshchilov and Hutter, 2017, without restarts)."""
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    share = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(share, 1.0)))
