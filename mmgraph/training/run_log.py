"""Text log, ``metrics.jsonl``, trackers and progress bar of a run. Only the main process writes files."""

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
from mmgraph.utils.files import lock_folder, sync, write_durably
from mmgraph.utils.log import flush_log, log, log_file


class RunLog:
    """Opens the files in a run's output folder, and writes to them. Only the main process opens and writes files.

    Args:
        config: the run's settings.
        accelerator: the run's accelerator.
        progress: the run's progress. It stores the ID of the wandb run.
        start: the resume state that the run continues from; None for a new run.
        total_steps: last step of the run.

    Attributes:
        failure: the error if a row could not be written, on the main process.
    """

    def __init__(
        self, config: Config, accelerator: Accelerator, progress: Progress, start: Path | None, total_steps: int
    ):
        self.config, self.accelerator, self.progress, self.total_steps = config, accelerator, progress, total_steps
        self.start = start
        self.output = config.output_folder
        self.failure: OSError | None = None

    @contextmanager
    def opened(self) -> Iterator[None]:
        """Keep the files open while the block runs. Flush and close them when it ends or fails. Called by all ranks.

        Raises:
            UserError: the output folder is not writable, another process is training in it, or another process has
                written a newer state since this run read its state.
        """
        with ExitStack() as stack:
            on_main_process(self.accelerator, lambda: self._open(stack))
            yield

    def _open(self, stack: ExitStack) -> None:
        self.log_path, config = self.output / "training_log.txt", self.config
        try:
            (self.output / "checkpoints").mkdir(parents=True, exist_ok=True)
            if not lock_folder(self.output, stack):  # two runs would damage each other's files
                raise UserError(
                    f"{self.output}: another process is training in this folder; set another --output_dir or --run_name"
                )
            newer = newer_state(self.output / "state", self.start, self.progress)
            if newer is not None:  # the other process has ended; this run would discard its states and metrics
                raise UserError(
                    f"{self.output}: another process has continued this run up to {newer.name}; run the same command "
                    "again"
                )
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
        """Write the row of a finished step, advance the bar, and log a line every ``log_every`` steps.

        The row goes to ``metrics.jsonl`` and the trackers. Does nothing on ranks other than the main process.
        """
        if not self.accelerator.is_main_process:
            return
        try:
            self._write_row(row)
        except OSError as error:  # StepLog then stops the run, and sync() fails on all ranks
            self.failure = error
        with suppress(OSError):  # the terminal may be closed
            self._show(row)

    def _write_row(self, row: Mapping[str, Any]) -> None:
        self.metrics.write(row)
        self.trackers.write(row)

    def _show(self, row: Mapping[str, Any]) -> None:
        self.bar.update()
        loss = f"loss {_figure(row[TOTAL])}"
        self.bar.set_postfix_str(f"{loss}, {row['edges_per_s']:,.0f} edges/s", refresh=False)
        if row["step"] % self.config.log_every == 0:
            log(
                f"step {row['step']:,}/{self.total_steps:,}, epoch {row['epoch']}: {loss} ({_parts(row)}), lr "
                f"{row['lr']:.3g}, {row['edges_per_s']:,.0f} edges/s"
            )

    def evaluation(self, step: int, row: Mapping[str, Any] | None, table: Table | None) -> None:
        """Log an evaluation, write it to ``evaluation.json``, and write the step's row with its metrics.

        Called on the main process only.

        Args:
            step: step of the evaluation.
            row: row of the step, which has not been written yet; None before the first step.
            table: the evaluation; None if the run has no held-out edges any more, so that only the row is written.
        """
        if table is not None:
            log(f"evaluation at step {step:,}: {one_line(table)}")
            content = json.dumps({"step": step, **table}, indent=1)
            write_durably(self.output / "evaluation.json", lambda path: path.write_text(content, encoding="utf-8"))
        values = {} if table is None else metrics(table)
        if row is not None:
            self.row({**row, **values})
        elif values:
            self.metrics.write(metrics_row := {"step": step, "epoch": self.progress.epoch, **values})
            self.trackers.write(metrics_row)

    def epoch(self, epoch: int, means: Mapping[str, float], steps: int) -> None:
        """Log a summary of a finished epoch, and flush the log.

        Args:
            epoch: the epoch, from 1.
            means: mean losses over the steps of the epoch, by name.
            steps: number of these steps; those with a non-finite loss or gradient are not counted.
        """
        log(
            f"epoch {epoch}/{self.config.epochs} done: mean loss {_figure(means[TOTAL])} ({_parts(means)}) over "
            f"{steps:,} steps"
        )
        flush_log()

    def sync(self) -> int:
        """Sync the text log and ``metrics.jsonl`` to disk, before the state that refers to them is written.

        Returns:
            The size of ``metrics.jsonl`` in bytes.

        Raises:
            OSError: a file cannot be written, or an earlier row could not be written.
        """
        if self.failure is not None:
            raise self.failure
        flush_log()
        sync(self.log_path)
        return self.metrics.sync()

    def log_start(self, graph: Graph, trained: int, frozen: int) -> None:
        """Log where the run starts, and its size.

        Args:
            graph: the run's data.
            trained, frozen: number of trained and of frozen parameters.
        """
        config, progress = self.config, self.progress
        if self.start is not None:
            log(f"resumed at step {progress.step:,} from {self.start}")
        elif config.init_from is not None:
            log(f"loaded the weights of {config.init_from}; training starts at epoch {progress.epoch}")
        if has_random_weights(config.model_name):
            log(
                "the towers have random weights, because they were built with the demo graph; set --model_name "
                f"{DEFAULT_MODEL} to use pretrained towers"
            )
        size = (config.epochs - progress.epoch + 1) * 4 * (frozen + 3 * trained) / 1e9
        log(
            f"{len(graph.nodes):,} nodes, {len(graph.rows):,} edges, {trained:,} trained and {frozen:,} frozen "
            f"parameters; steps {progress.step:,} to {self.total_steps:,}; the epoch files will take {size:.2f} GB in "
            f"{self.output / 'checkpoints'}"
        )

    def log_end(self, image_status: np.ndarray, done: bool, best: str) -> None:
        """Close the bar, and log how the run ends and how many nodes had no complete image, by image status.

        Called by all ranks.

        Args:
            image_status: (N,) index into :data:`mmgraph.data.images.IMAGE_STATUS` of each node; 0 if this rank has not
                seen the node.
            done: whether the run is finished; False if a stop signal ended it.
            best: line about the best evaluation, or an empty string.
        """
        if self.accelerator.is_main_process:
            self._close_bar()  # before the last lines are logged, or the bar would be printed below them
        problems = describe_image_status_of_all_ranks(image_status)
        if problems:
            log(f"nodes without a complete image: {problems} (of the nodes seen since this start)")
        if best:
            log(best)
        if done:
            log(
                f"done: wrote {final_file(self.output)}; metrics.jsonl and training_log.txt are in {self.output}. "
                f"To write the embeddings, run: mmgraph encode {self.output}"
            )
        else:
            log(f"stopped at step {self.progress.step:,}, state written; run the same command to resume")
        with suppress(OSError):
            flush_log()  # flush now: the launcher may kill this process while a tracker closes


def _figure(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def _parts(losses: Mapping[str, Any]) -> str:
    """Format the losses of the weighted sum, such as ``text-image 4.1589, graph 4.1589``."""
    return ", ".join(f"{label} {_figure(losses[name])}" for name, label in LABELS.items())


def describe_image_status_of_all_ranks(image_status: np.ndarray) -> str:
    """Describe how many nodes of all ranks have no complete image, by image status. Called by all ranks.

    Args:
        image_status: (N,) index into :data:`mmgraph.data.images.IMAGE_STATUS` of each node; 0 if this rank has not seen
            the node.

    Returns:
        The counts, such as ``3 file not found, 1 truncated``. A node that several ranks have seen is counted once.
    """
    status_by_row: dict[int, int] = {}
    for rank_status in gather_object([{int(row): int(image_status[row]) for row in image_status.nonzero()[0]}]):
        status_by_row |= rank_status
    return describe_image_status(list(status_by_row.values()))
