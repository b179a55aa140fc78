"""Writes the metrics of each step one step late, so that the host does not wait for the current step."""

import math
import time
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from mmgraph.checkpoints.consolidate import loss_scale
from mmgraph.checkpoints.progress import Progress
from mmgraph.config import Config
from mmgraph.data.images import ImageCounter, describe_image_status
from mmgraph.distributed.launch import peak_memory_gb
from mmgraph.distributed.signals import StopRequest
from mmgraph.errors import UserError
from mmgraph.losses.objective import GRAPH_CHANCE, TOTAL
from mmgraph.training.batch_stream import BatchStream
from mmgraph.training.nonfinite import NonfiniteSteps
from mmgraph.training.run_log import RunLog, count_image_status_of_all_ranks
from mmgraph.training.schedule import Schedule
from mmgraph.training.train_step import StepResult, TrainStep
from mmgraph.utils.device_copies import HostCopy


class InFlightStep(NamedTuple):
    """A step whose metrics are being copied to the host."""

    row: dict[str, Any]  # metrics that are known on the host
    names: list[str]  # names of the values in means
    means: HostCopy  # means over the ranks
    result: StepResult  # losses of this rank
    first_sample: int  # number of edges that earlier steps of this epoch used
    scaler_skipped: bool  # whether the fp16 loss scaler skipped the step because the loss scale was too large


class StepLog:
    """Averages the metrics of each step over the ranks, and writes them one step later.

    All ranks must call :meth:`submit` and :meth:`flush`.

    The collective that averages the metrics also averages the number of images read, the number of bad images, and the
    ranks' requests to stop. A rank requests a stop after a stop signal, or if it cannot write a row.

    Args:
        config, accelerator, progress, schedule: settings, accelerator, progress and schedule of the run.
        train_step: gives the learning rate and the loss scale of the step.
        stream: gives the time that the step waited for its data.
        images: counts the image files that this rank has read.
        signals: this rank's stop request. ``signals.agree()`` is called after any rank has requested a stop.
        nonfinite: decides whether a non-finite step is skipped or ends the run.
        run_log: writes the rows.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        progress: Progress,
        schedule: Schedule,
        train_step: TrainStep,
        stream: BatchStream,
        images: ImageCounter,
        signals: StopRequest,
        nonfinite: NonfiniteSteps,
        run_log: RunLog,
    ):
        self.config, self.accelerator, self.progress, self.schedule = config, accelerator, progress, schedule
        self.train_step, self.stream, self.images = train_step, stream, images
        self.signals, self.nonfinite, self.run_log = signals, nonfinite, run_log
        self._in_flight: InFlightStep | None = None
        self._submitted = time.perf_counter()

    def restart_clock(self) -> None:
        """Measure the duration of the next step from this call."""
        self._submitted = time.perf_counter()

    def submit(self, result: StepResult) -> None:
        """Queue the metrics of the step that was just launched, and write those of the previous step.

        Args:
            result: this rank's results of that step; on a GPU they may not be computed yet.

        Raises:
            UserError: too many images are bad (see ``--max_bad_images``).
            RunError: too many steps are not finite (see ``--max_skipped_steps``).
        """
        row, scaler_skipped = self._begin_row()
        values = {**result.losses, "grad_norm": result.grad_norm, **result.counters}
        stop_requested = self.signals.requested or self.run_log.failure is not None
        counts = {"images_read": self.images.read, "images_bad": self.images.bad, "stop_requested": stop_requested}
        local = torch.stack(list(values.values()))
        # new_full creates the values on the device, without a copy from the host.
        local = torch.cat([local, *(local.new_full((1,), count) for count in counts.values())])
        means = HostCopy(self.accelerator.reduce(local, "mean"))
        first_sample = self.progress.samples_in_epoch - self.config.global_batch_size
        in_flight = InFlightStep(row, [*values, *counts], means, result, first_sample, scaler_skipped)
        self.flush()
        self._in_flight = in_flight
        self.signals.step_finished()

    def _begin_row(self) -> tuple[dict[str, Any], bool]:
        """Build the row of the step that was just launched, with the values that the host knows.

        Returns:
            The row, and whether the fp16 loss scaler skipped the step because the loss scale was too large.
        """
        now, edges = time.perf_counter(), self.config.global_batch_size
        seconds, self._submitted = now - self._submitted, now
        row = {
            "step": self.progress.step,
            "epoch": self.progress.epoch,
            "lr": self.train_step.optimizer.param_groups[0]["lr"],
            "edges_per_s": edges / seconds,
            "edges_per_s_per_process": edges / seconds / self.accelerator.num_processes,
            "data_wait_s": self.stream.data_wait,
            "data_wait_share": self.stream.data_wait / seconds,
            "peak_memory_gb": peak_memory_gb(self.accelerator.device),
        }
        if not self.accelerator.optimizer_step_was_skipped:
            return row, False
        scale = loss_scale(self.accelerator, self.train_step.module)
        # With a loss scale below 1, scaling is not the cause of an overflow, so the step counts as non-finite.
        return {**row, "skipped": True}, scale is not None and scale["scale"] >= 1

    def flush(self) -> None:
        """Write the row of the last submitted step.

        All ranks check for bad images, stop requests and non-finite values. Only the main process writes the row.
        """
        if self._in_flight is None:
            return
        step, self._in_flight = self._in_flight, None
        means = dict(zip(step.names, step.means.tolist(), strict=True))
        self._check_images(means.pop("images_read"), means.pop("images_bad"))
        if means.pop("stop_requested") > 0:
            self.signals.agree()
        norm = means.pop("grad_norm")
        row, losses = step.row, {name: means.pop(name) for name in step.result.losses}
        local_loss = step.result.losses[TOTAL]
        if self.nonfinite.handle(row, losses[TOTAL], norm, local_loss, step.first_sample, step.scaler_skipped):
            row["skipped"] = True
        else:
            chance = {GRAPH_CHANCE: means[GRAPH_CHANCE]} if GRAPH_CHANCE in means else {}
            self.progress.add_losses({**losses, **chance})
        row["grad_norm"] = norm if math.isfinite(norm) and norm >= 0 else None
        finite = {name: value if math.isfinite(value) else None for name, value in losses.items()}
        self._write({"step": row.pop("step"), "epoch": row.pop("epoch"), **finite, **row, **means})

    def _write(self, row: dict[str, Any]) -> None:
        if row["step"] == self.progress.step and self.schedule.evaluation_due:
            self.progress.unevaluated = row  # held back until the evaluation adds its metrics
        else:
            self.run_log.row(row)

    def _check_images(self, read: float, bad: float) -> None:
        """Raise an error if the fraction of bad images exceeds ``--max_bad_images``.

        Args:
            read, bad: numbers of images read and of bad images among them, averaged over the ranks.
        """
        count, limit = read * self.accelerator.num_processes, self.config.max_bad_images
        # Do not judge before enough images have been read.
        if bad <= limit * read or count < min(100, len(self.images.image_status) // 2):
            return
        problems = describe_image_status(count_image_status_of_all_ranks(self.images.image_status))
        raise UserError(
            f"{bad / read:.0%} of the images so far are missing or incomplete ({problems}); the limit is {limit:.0%} "
            f"(--max_bad_images {limit:g}); check --image_root and the files, or raise the limit"
        )
