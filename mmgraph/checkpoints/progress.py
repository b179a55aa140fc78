"""The progress of a run. A resume state stores it as JSON, besides the tensors."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any


@dataclasses.dataclass
class Progress:
    """The progress of a run. ``step`` counts finished optimizer steps; ``epoch`` is the current epoch, from 1."""

    step: int = 0
    epoch: int = 1
    samples_in_epoch: int = 0  # edges that the epoch's finished steps have used
    # Sum of each loss over the epoch's steps, without skipped steps. The key "steps" has the number of summed steps.
    epoch_sums: dict[str, float] = dataclasses.field(default_factory=dict)
    adam_step: int = 0  # number of steps that Adam has done
    loss_scale: dict[str, float] | None = None  # fp16: state of the loss scale, with GradScaler's keys
    metrics_bytes: int = 0  # size of metrics.jsonl in bytes
    wandb_id: str | None = None
    best: dict[str, Any] | None = None  # see mmgraph.training.early_stopping
    unevaluated: dict[str, Any] | None = None  # metrics row of a step whose evaluation has not finished
    nonfinite_steps: int = 0  # steps skipped because a loss or gradient was not finite
    final: dict[str, Any] | None = None  # position and time at which the final file was written

    def advance(self, edges: int) -> None:
        """Count a finished step and its edges."""
        self.step += 1
        self.samples_in_epoch += edges

    def add_losses(self, losses: Mapping[str, float]) -> None:
        """Add a step's losses to the sums of its epoch. A loss that the epoch's first step lacks is not summed."""
        first = not self.epoch_sums
        for name, value in {**losses, "steps": 1}.items():
            if first or name in self.epoch_sums:
                self.epoch_sums[name] = self.epoch_sums.get(name, 0) + value

    def begin_epoch(self) -> None:
        """Advance to the next epoch."""
        self.epoch, self.samples_in_epoch, self.epoch_sums = self.epoch + 1, 0, {}

    def leave_folder(self) -> None:
        """Reset the fields that describe the old output folder, because the run continues in another one."""
        self.metrics_bytes, self.nonfinite_steps = 0, 0
        self.wandb_id = self.best = self.unevaluated = self.final = None

    def record_final(self) -> None:
        """Record that the final file has the weights of this step."""
        self.final = {
            "step": self.step,
            "epoch": self.epoch,
            "samples_in_epoch": self.samples_in_epoch,
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        }

    def to_record(self) -> dict[str, Any]:
        """Return the entries of ``state.json`` that store the progress."""
        components: dict[str, Any] = {"wandb": self.wandb_id}
        if self.best is not None:
            components["best"] = self.best
        if self.unevaluated is not None:
            components["unevaluated"] = self.unevaluated
        if self.nonfinite_steps:
            components["not_finite_steps"] = self.nonfinite_steps
        if self.final is not None:
            components["final"] = self.final
        plain = ("step", "epoch", "samples_in_epoch", "epoch_sums", "adam_step", "loss_scale", "metrics_bytes")
        return {**{name: getattr(self, name) for name in plain}, "components": components}

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> "Progress":
        """Return the progress in a ``state.json`` record.

        Raises:
            ValueError, TypeError, KeyError: the record is not valid.
        """
        for name in ("step", "epoch", "samples_in_epoch", "adam_step", "metrics_bytes"):
            _check(name, record[name], type(record[name]) is int and record[name] >= (name == "epoch"))
        for name in ("components", "epoch_sums"):
            _check(name, record[name], isinstance(record[name], dict))
        sums, scale, components = record["epoch_sums"], record["loss_scale"], record["components"]
        _check("epoch_sums", sums, all(isinstance(value, int | float) for value in sums.values()))
        _check("loss_scale", scale, scale is None or isinstance(scale, dict))
        wandb_id, best, unevaluated = (components.get(name) for name in ("wandb", "best", "unevaluated"))
        _check("wandb", wandb_id, wandb_id is None or isinstance(wandb_id, str))
        final = components.get("final")
        for name, value in (("best", best), ("unevaluated", unevaluated), ("final", final)):
            _check(name, value, value is None or isinstance(value, dict))
        return cls(
            record["step"],
            record["epoch"],
            record["samples_in_epoch"],
            sums,
            record["adam_step"],
            scale,
            record["metrics_bytes"],
            wandb_id,
            best,
            unevaluated,
            int(components.get("not_finite_steps", 0)),
            final,
        )


def _check(name: str, value: object, is_valid: bool) -> None:
    if not is_valid:
        raise ValueError(f"invalid {name}: {value!r}")
