"""Writes the checkpoints of a run: the resume state, and the epoch, final and best files."""

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from mmgraph.checkpoints.consolidate import consolidate, loss_scale
from mmgraph.checkpoints.files import (
    Checkpoint,
    TrainedState,
    best_file,
    epoch_file,
    final_file,
    model_state,
    optimizer_state,
    write_checkpoint,
)
from mmgraph.checkpoints.progress import Progress
from mmgraph.checkpoints.resume_state import write_state
from mmgraph.config import Config
from mmgraph.distributed.collectives import write_on_main_process
from mmgraph.distributed.signals import StopRequest
from mmgraph.losses.objective import GRAPH_CHANCE, LABELS, TOTAL
from mmgraph.models.multimodal_graph_encoder import TrainedModule
from mmgraph.training.run_log import RunLog
from mmgraph.training.schedule import Schedule
from mmgraph.training.step_log import StepLog


class Checkpointer:
    """Saves a run. All ranks must call each method; only the main process writes.

    Args:
        config, accelerator, progress, schedule: settings, accelerator, progress and schedule of the run.
        run_fingerprint: values that must not change when the run is resumed.
        frozen: the towers' tensors, under the keys of the original trainer.
        module, optimizer: the trained module and its optimizer, prepared by Accelerate.
        step_log, run_log: they are flushed before a state is written, so that ``metrics.jsonl`` has all steps that the
            state covers.
        signals: this rank's stop request. Its watchdog is paused during a save, because a save may take longer than a
            step.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        progress: Progress,
        schedule: Schedule,
        run_fingerprint: dict[str, Any],
        frozen: Mapping[str, torch.Tensor],
        module: nn.Module,
        optimizer: AcceleratedOptimizer,
        step_log: StepLog,
        run_log: RunLog,
        signals: StopRequest,
    ):
        self.config, self.accelerator, self.progress, self.schedule = config, accelerator, progress, schedule
        self.run_fingerprint, self.frozen, self.module, self.optimizer = run_fingerprint, frozen, module, optimizer
        self.step_log, self.run_log, self.signals = step_log, run_log, signals
        self.output = config.output_folder
        # Content of the newest state: its step, whether this step is evaluated, and whether the run is finished.
        self._saved: tuple[int, bool, bool] | None = None

    def save(self) -> None:
        """Write the row of the last step, then the resume state.

        At the end of an epoch, the epoch file is written before the state. At the end of the run, the final file is
        also written before the state. If nothing has changed since the last save, only the row is written.
        """
        self.step_log.flush()
        progress, finished = self.progress, self.schedule.finished
        if finished:
            self.signals.disarm()  # the run is ending anyway, so a stop signal needs no watchdog
        content = progress.step, progress.unevaluated is None, finished
        if content == self._saved:
            return
        with self.signals.pause_watchdog():
            trained = consolidate(self.module, self.optimizer.optimizer)
            progress.adam_step = trained.adam_step
            progress.loss_scale = loss_scale(self.accelerator, self.module)
            if self.schedule.epoch_finished:
                self.write(lambda: self._write_epoch(trained))
                progress.begin_epoch()
            self.write(lambda: self._write_state(trained, finished))
        self._saved = content

    def save_best(self, module: TrainedModule) -> None:
        """Write the best file.

        Args:
            module: the trained module, from :meth:`full_module`.
        """
        best = Checkpoint(model_state(self.frozen, module.state_dict()))
        self.write(lambda: write_checkpoint(best_file(self.output), best))

    def write(self, write: Callable[[], object]) -> None:
        """Call ``write``, which writes to the output folder, on the main process. If it fails, every rank raises."""
        write_on_main_process(self.accelerator, self.output, write)

    def full_module(self) -> TrainedModule:
        """Return the full trained module in float32, on this rank's device. This works with every backend."""
        weights = consolidate(self.module, self.optimizer.optimizer).weights
        return TrainedModule.from_weights(weights).to(self.accelerator.device)

    def _write_epoch(self, trained: TrainedState) -> None:
        progress, sums = self.progress, self.progress.epoch_sums
        steps = int(sums.get("steps", 0))
        means = {name: sums[name] / steps if steps else math.nan for name in (TOTAL, *LABELS)}
        chance = math.log(self.config.global_batch_size)
        if steps and GRAPH_CHANCE in sums:
            chance = sums[GRAPH_CHANCE] / steps
        self.run_log.epoch(progress.epoch, means, steps, chance)
        checkpoint = Checkpoint(
            model_state(self.frozen, trained.weights),
            optimizer_state(trained, self.optimizer.param_groups[0]),
            progress.epoch,
            means[TOTAL],
        )
        write_checkpoint(epoch_file(self.output, progress.epoch), checkpoint)

    def _write_state(self, trained: TrainedState, finished: bool) -> None:
        config = self.config
        if finished:
            write_checkpoint(final_file(self.output), Checkpoint(model_state(self.frozen, trained.weights)))
            self.progress.record_final()
        self.progress.metrics_bytes = self.run_log.sync()
        write_state(self.output / "state", self.progress, trained, self.run_fingerprint, config, config.keep_last)
