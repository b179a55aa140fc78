"""When a run evaluates, saves and ends."""

from typing import NamedTuple

from mmgraph.checkpoints.progress import Progress
from mmgraph.config import Config
from mmgraph.training.early_stopping import EarlyStopping


class Due(NamedTuple):
    """What is to be done after a step."""

    evaluation: bool
    save: bool


class Schedule:
    """What a run's settings say of where it stands.

    Args:
        config: the run's settings.
        progress: where the run stands; read anew each time.
        early_stopping: of the run.
        steps_per_epoch: steps in a whole epoch.
        evaluates: there are edges to evaluate on.

    Attributes:
        total_steps: the step that the run ends with, if it is not stopped early.
    """

    def __init__(
        self, config: Config, progress: Progress, early_stopping: EarlyStopping, steps_per_epoch: int, evaluates: bool
    ):
        self.config, self.progress, self.early_stopping = config, progress, early_stopping
        self.samples_per_epoch, self.evaluates = steps_per_epoch * config.global_batch_size, evaluates
        left = (config.epochs - progress.epoch + 1) * self.samples_per_epoch - progress.samples_in_epoch
        total = progress.step + max(left, 0) // config.global_batch_size
        self.total_steps = min(total, config.max_steps or total)

    @property
    def finished(self) -> bool:
        return self.progress.step >= self.total_steps or self.early_stopping.exhausted

    @property
    def epoch_finished(self) -> bool:
        return self.progress.samples_in_epoch == self.samples_per_epoch

    @property
    def due(self) -> Due:
        """What is to be done after the step that was finished last."""
        step, every = self.progress.step, self.config.save_every
        return Due(self.evaluation_due, self.epoch_finished or (every > 0 and step % every == 0))

    @property
    def evaluation_due(self) -> bool:
        step, every = self.progress.step, self.config.eval_every
        return self.evaluates and (step >= self.total_steps or (every > 0 and step % every == 0))
