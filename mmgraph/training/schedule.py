"""Decides when a run evaluates, saves and ends."""

from typing import NamedTuple

from mmgraph.checkpoints.progress import Progress
from mmgraph.config import Config
from mmgraph.training.early_stopping import EarlyStopping


class Due(NamedTuple):
    """Actions that are due after a step."""

    evaluation: bool
    save: bool


class Schedule:
    """Decides when a run evaluates, saves and ends, from its settings and its current progress.

    Args:
        config: the run's settings.
        progress: the run's progress. Every property of this class reads the current values.
        early_stopping: the run's early stopping.
        steps_per_epoch: number of steps in a full epoch.
        evaluates: whether the run has held-out edges to evaluate on.

    Attributes:
        samples_per_epoch: number of edges in a full epoch.
        total_steps: number of the last step, unless the run stops early.
    """

    def __init__(
        self, config: Config, progress: Progress, early_stopping: EarlyStopping, steps_per_epoch: int, evaluates: bool
    ):
        self.config, self.progress, self.early_stopping = config, progress, early_stopping
        self.samples_per_epoch, self.evaluates = steps_per_epoch * config.global_batch_size, evaluates
        remaining = (config.epochs - progress.epoch + 1) * self.samples_per_epoch - progress.samples_in_epoch
        total = progress.step + max(remaining, 0) // config.global_batch_size
        self.total_steps = min(total, config.max_steps or total)

    @property
    def finished(self) -> bool:
        """Whether all steps are done, or early stopping ends the run."""
        return self.progress.step >= self.total_steps or self.early_stopping.exhausted

    @property
    def epoch_finished(self) -> bool:
        return self.progress.samples_in_epoch == self.samples_per_epoch

    @property
    def due(self) -> Due:
        """Actions that are due after the last finished step."""
        step, every = self.progress.step, self.config.save_every
        return Due(self.evaluation_due, self.epoch_finished or (every > 0 and step % every == 0))

    @property
    def evaluation_due(self) -> bool:
        """Whether an evaluation follows the last finished step."""
        step, every = self.progress.step, self.config.eval_every
        return self.evaluates and (step >= self.total_steps or (every > 0 and step % every == 0))
