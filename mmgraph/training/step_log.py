"""The figures of each step, written one step late: the device is never waited for."""

import math
import time
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator

from mmgraph.checkpoints.consolidate import loss_scale
from mmgraph.checkpoints.progress import Progress
from mmgraph.config import Config
from mmgraph.data.images import ImageCounter
from mmgraph.distributed.launch import peak_memory_gb
from mmgraph.distributed.signals import StopRequest
from mmgraph.errors import UserError
from mmgraph.losses.objective import TOTAL
from mmgraph.training.batch_stream import BatchStream
from mmgraph.training.host_copy import HostCopy
from mmgraph.training.nonfinite import NonfiniteSteps
from mmgraph.training.run_log import RunLog, describe_image_status_of_all_ranks
from mmgraph.training.schedule import Schedule
from mmgraph.training.train_step import StepResult, TrainStep


class InFlightStep(NamedTuple):
    """A step whose figures are on their way to the host."""

    row: dict[str, Any]
    names: list[str]  # of the means
    means: HostCopy  # over the ranks
    result: StepResult  # of this rank
    first_sample: int  # edges of the epoch before the step's
    finding_scale: bool  # fp16 left the step out, in looking for its loss scale


class StepLog:
    """Reduces the figures of each step over the ranks and writes them a step later. Called by all ranks.

    What the ranks learn of each other goes with the figures: image files seen, and whether one was asked to stop.

    Args:
        config, accelerator, progress, schedule: of the run.
        train_step, stream: whose learning rate, loss scale and waiting time are written.
        images: image files seen on this rank.
        signals: of this rank; told when all ranks have agreed to stop.
        nonfinite: decides on steps that are not finite.
        run_log: gets the rows.
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
        """The time of the next step begins now."""
        self._submitted = time.perf_counter()

    def submit(self, result: StepResult) -> None:
        """Queue the figures of the step that was finished last, and write those of the step before it."""
        row, finding_scale = self._begin_row()
        values = {**result.losses, "grad_norm": result.grad_norm, **result.counters}
        asked_to_stop = self.signals.requested or self.run_log.failure is not None
        counts = {"images_read": self.images.read, "images_bad": self.images.bad, "asked_to_stop": asked_to_stop}
        own = torch.stack(list(values.values()))
        own = torch.cat([own, *(own.new_full((1,), count) for count in counts.values())])  # new_full: no copy
        means = HostCopy(self.accelerator.reduce(own, "mean"))
        first_sample = self.progress.samples_in_epoch - self.config.global_batch_size
        in_flight = InFlightStep(row, [*values, *counts], means, result, first_sample, finding_scale)
        self.flush()
        self._in_flight = in_flight
        self.signals.step_finished()

    def _begin_row(self) -> tuple[dict[str, Any], bool]:
        """What is known on the host of the step that was finished last."""
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
        return {**row, "skipped": True}, scale is not None and scale["scale"] >= 1  # below, it is not the scale

    def flush(self) -> None:
        """Write the row of the step that was submitted last. The same on every rank, but for the writing."""
        if self._in_flight is None:
            return
        step, self._in_flight = self._in_flight, None
        means = dict(zip(step.names, step.means.tolist(), strict=True))
        self._check_images(means.pop("images_read"), means.pop("images_bad"))
        if means.pop("asked_to_stop") > 0:
            self.signals.agree()
        norm = means.pop("grad_norm")
        row, losses = step.row, {name: means.pop(name) for name in step.result.losses}
        own_loss = step.result.losses[TOTAL]
        if self.nonfinite.skips(row, losses[TOTAL], norm, own_loss, step.first_sample, step.finding_scale):
            row["skipped"] = True
        else:
            self.progress.add_losses(losses)
        row["grad_norm"] = norm if math.isfinite(norm) and norm >= 0 else None
        finite = {name: value if math.isfinite(value) else None for name, value in losses.items()}
        self._write({"step": row.pop("step"), "epoch": row.pop("epoch"), **finite, **row, **means})

    def _write(self, row: dict[str, Any]) -> None:
        if row["step"] == self.progress.step and self.schedule.evaluation_due:
            self.progress.unevaluated = row  # written with its evaluation
        else:
            self.run_log.row(row)

    def _check_images(self, read: float, bad: float) -> None:
        """Compare the share of bad images with its limit; both counts are means over the ranks."""
        count, limit = read * self.accelerator.num_processes, self.config.max_bad_images
        if bad <= limit * read or count < min(100, len(self.images.image_status) // 2):  # of few, a share says nothing
            return
        problems = describe_image_status_of_all_ranks(self.images.image_status)
        raise UserError(
            f"{bad / read:.0%} of the image files seen are missing or incomplete ({problems}), more than "
            f"--max_bad_images {limit:g}; check --image_root and the files, or raise the limit"
        )
