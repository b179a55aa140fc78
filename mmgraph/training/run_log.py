"""What a run tells: text log, ``metrics.jsonl``, tracker, progress bar. Files are the main process's alone."""

import json
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.utils import gather_object
from tqdm import tqdm

from mmgraph.checkpoints.files import final_file
from mmgraph.checkpoints.progress import Progress
from mmgraph.checkpoints.resume_state import newer_state
from mmgraph.config import Config
from mmgraph.data.graph import Graph
from mmgraph.data.images import describe_image_status
from mmgraph.distributed.collectives import on_main_process
from mmgraph.errors import UserError
from mmgraph.evaluation.evaluator import Table, metrics, one_line
from mmgraph.losses.objective import LABELS, TOTAL
from mmgraph.towers.clip import DEFAULT_MODEL, has_random_weights
from mmgraph.training.metrics_file import MetricsFile
from mmgraph.training.trackers import Trackers
from mmgraph.utils.environment import record_start
from mmgraph.utils.files import locked, sync, write_durably
from mmgraph.utils.log import flush_log, log, log_file


class RunLog:
    """Opens a run's files in its output folder, and writes to them; on other ranks it does nothing.

    Args:
        config: the run's settings.
        accelerator: of this rank.
        progress: where the run begins; the tracker's id is kept in it.
        start: the state that the run goes on from.
        total_steps: the step that the run ends with.
    """

    def __init__(
        self, config: Config, accelerator: Accelerator, progress: Progress, start: Path | None, total_steps: int
    ):
        self.config, self.accelerator, self.progress, self.total_steps = config, accelerator, progress, total_steps
        self.start = start
        self.output = config.output_folder
        self.failure: OSError | None = None  # of writing a row, on the main process

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Keep the files open while the block runs; flush and close them however it ends."""
        with ExitStack() as stack:
            on_main_process(self.accelerator, lambda: self._open(stack))
            yield

    def _open(self, stack: ExitStack) -> None:
        self.log_path, config = self.output / "training_log.txt", self.config
        try:
            (self.output / "checkpoints").mkdir(parents=True, exist_ok=True)
            if not locked(self.output, stack):  # two runs that write to one folder would damage each other
                raise UserError(f"{self.output}: another process is training in this folder")
            newer = newer_state(self.output / "state", self.start, self.progress)
            if newer is not None:  # it had the folder until now; its states and metrics would be lost
                raise UserError(f"{self.output}: another process has gone on to {newer.name} meanwhile; start again")
            write_durably(self.output / "config.yaml", config.save)
            record_start(self.output, self.accelerator, self.progress.step)
            self.metrics = MetricsFile(self.output / "metrics.jsonl", self.progress.metrics_bytes)
            self.log_path.touch()
        except OSError as error:
            raise UserError(f"--output_dir {self.output}: {error.strerror or error}") from None
        stack.callback(self.metrics.close)
        stack.enter_context(log_file(self.log_path, config.log_buffer_size))
        self.trackers = Trackers(config, self.output, self.progress.step, self.progress.wandb_id)
        stack.callback(self.trackers.close)
        self.progress.wandb_id = self.trackers.wandb_id
        self.bar = tqdm(
            total=self.total_steps, initial=self.progress.step, unit="step", disable=None, dynamic_ncols=True
        )
        stack.callback(self._close_bar)

    def _close_bar(self) -> None:
        with suppress(OSError):
            self.bar.close()

    def row(self, row: Mapping[str, Any]) -> None:
        """Note a finished step: a row of ``metrics.jsonl``, the bar, and every ``log_every`` steps a line."""
        if not self.accelerator.is_main_process:
            return
        try:
            self._write_row(row)
        except OSError as error:  # raised by sync(), where the other ranks learn of it
            self.failure = error
        with suppress(OSError):  # of a terminal that is gone
            self._show(row)

    def _write_row(self, row: Mapping[str, Any]) -> None:
        self.metrics.write(row)
        self.trackers.write(row)

    def _show(self, row: Mapping[str, Any]) -> None:
        self.bar.update()
        shown = f"loss {_figure(row[TOTAL])}"
        self.bar.set_postfix_str(f"{shown}, {row['edges_per_s']:,.0f} edges/s", refresh=False)
        if row["step"] % self.config.log_every == 0:
            log(
                f"step {row['step']:,}/{self.total_steps:,}, epoch {row['epoch']}: {shown} ({_parts(row)}), lr "
                f"{row['lr']:.3g}, {row['edges_per_s']:,.0f} edges/s"
            )

    def evaluation(self, step: int, row: Mapping[str, Any] | None, table: Table | None) -> None:
        """Log an evaluation, write all of it to ``evaluation.json``, and its metrics. Called on the main process alone.

        Args:
            row: of the step, which was not written yet; None before the first step.
            table: None where there was nothing to evaluate on any more.
        """
        if table is not None:
            log(f"evaluation at step {step:,}: {one_line(table)}")
            content = json.dumps({"step": step, **table}, indent=1)
            write_durably(self.output / "evaluation.json", lambda path: path.write_text(content, encoding="utf-8"))
        values = {} if table is None else metrics(table)
        if row is not None:
            self.row({**row, **values})
        elif values:
            self.metrics.write(first := {"step": step, "epoch": self.progress.epoch, **values})
            self.trackers.write(first)

    def epoch(self, epoch: int, means: Mapping[str, float], steps: int) -> None:
        """Sum an epoch up in the log, and flush it.

        Args:
            means: of the losses, over the steps.
        """
        log(
            f"epoch {epoch}/{self.config.epochs} done: mean loss {_figure(means[TOTAL])} ({_parts(means)}) over "
            f"{steps:,} steps"
        )
        flush_log()

    def sync(self) -> int:
        """Put log and metrics on the disk, for a state that is to follow. Returns the bytes of the metrics."""
        if self.failure is not None:
            raise self.failure
        flush_log()
        sync(self.log_path)
        return self.metrics.sync()

    def log_start(self, graph: Graph, trained: int, frozen: int) -> None:
        """Tell what begins; ``trained`` and ``frozen`` are numbers of parameters."""
        config, progress = self.config, self.progress
        if self.start is not None:
            log(f"resumed at step {progress.step:,} from {self.start}")
        elif config.init_from is not None:
            log(f"weights from {config.init_from}; begins at epoch {progress.epoch}")
        if has_random_weights(config.model_name):
            log(
                "the towers are untrained stand-ins with random weights, made with the demo graph; --model_name "
                f"{DEFAULT_MODEL} uses the real ones"
            )
        size = (config.epochs - progress.epoch + 1) * 4 * (frozen + 3 * trained) / 1e9
        log(
            f"{len(graph.nodes):,} nodes, {len(graph.rows):,} edges, {trained:,} trained and {frozen:,} frozen "
            f"parameters; steps {progress.step:,} to {self.total_steps:,}; the epoch files will take {size:.2f} GB in "
            f"{self.output / 'checkpoints'}"
        )

    def log_end(self, image_status: np.ndarray, done: bool, best: str) -> None:
        """Close the bar, and tell what ends, and how many nodes were seen without their whole picture, by cause.

        Called on every rank.

        Args:
            image_status: (N,) index into :data:`mmgraph.data.images.IMAGE_STATUS` of each node that this rank has
                seen, else 0.
            done: all steps; else the run was asked to stop.
            best: what is to be said of the best evaluation.
        """
        if self.accelerator.is_main_process:
            self._close_bar()  # before the last lines, or it would stand below them
        told = describe_image_status_of_all_ranks(image_status)
        if told:
            log(f"images that are black or in part: {told} (among the nodes seen since the start)")
        if best:
            log(best)
        if done:
            log(
                f"done: {final_file(self.output)}, with metrics.jsonl and training_log.txt in "
                f"{self.output}. Next: mmgraph encode {self.output} writes the embeddings"
            )
        else:
            log(f"stopped at step {self.progress.step:,}, state written; the same command goes on from there")
        with suppress(OSError):
            flush_log()  # closing a tracker may take longer than the launcher leaves


def _figure(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def _parts(losses: Mapping[str, Any]) -> str:
    """The losses of the weighted sum, such as ``text-image 4.1589, graph 4.1589``."""
    return ", ".join(f"{label} {_figure(losses[name])}" for name, label in LABELS.items())


def describe_image_status_of_all_ranks(image_status: np.ndarray) -> str:
    """How many nodes lack their whole picture, by cause; called on every rank with the (N,) causes that it knows of."""
    found: dict[int, int] = {}
    for of_rank in gather_object([{int(row): int(image_status[row]) for row in image_status.nonzero()[0]}]):
        found |= of_rank
    return describe_image_status(list(found.values()))
