"""Learning rate schedule: a pure function of the step."""

import math

from mmgraph.config import Config


def lr_at(step: int, config: Config, total_steps: int) -> float:
    """Return the learning rate of a step. The first step of a run is 1.

    The rate rises linearly during the warmup. After the warmup, ``--lr_schedule`` decides: the rate is constant, or
    falls to 0 along a half cosine (SGDR without restarts, Loshchilov and Hutter, 2017).
    """
    if step <= config.warmup_steps:
        return config.learning_rate * step / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    fraction = (step - config.warmup_steps) / max(total_steps - config.warmup_steps, 1)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * min(fraction, 1.0)))
