"""Writes the text log and ``metrics.jsonl`` of a run, logs to its trackers, and shows its progress bar.

Only the main process writes files.
"""

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
from mmgraph.data.images import count_image_status, describe_image_status, image_remarks
from mmgraph.data.input_rules import InputRules
from mmgraph.distributed.collectives import on_main_process
from mmgraph.errors import UserError
from mmgraph.evaluation.evaluator import Table, metrics, one_line
from mmgraph.evaluation.verdict import judge, mrr_at_start
from mmgraph.losses.objective import LABELS, TOTAL
from mmgraph.towers.clip import DEFAULT_MODEL, has_random_weights
from mmgraph.training.metrics_file import MetricsFile
from mmgraph.training.trackers import Trackers
from mmgraph.utils.environment import record_start
from mmgraph.utils.files import lock_folder, sync, write_durably
from mmgraph.utils.log import flush_log, log, log_file

CHANCE_MARGIN = 0.02  # the graph loss of an epoch is at chance if it is less than this fraction below chance
CHANCE_ADVICE = (
    "this is normal in the first 100 steps of a run; if it stays there, start a new run with --warmup_steps 100, or "
    "with a lower --learning_rate"
)
WORSE_ADVICE = (
    "train for more epochs, or try another --learning_rate and --warmup_steps, before you use these embeddings"
)


class RunLog:
    """Opens the files in a run's output folder, and writes to them. Only the main process opens and writes files.

    Args:
        config: the run's settings.
        accelerator: the run's accelerator.
        progress: the run's progress. It stores the ID of the wandb run.
        start: the resume state that the run continues from; None for a new run.
        total_steps: number of the last step of the run.

    Attributes:
        failure: the error if the main process could not write a row; otherwise None.
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
        """Keep the files open while the block runs. Flush and close them when the block ends or fails.

        All ranks must enter this context.

        Raises:
            UserError: the output folder is not writable, another process is training in it, or another process has
                written a newer state there since this process chose ``start``.
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
            if newer is not None:  # to go on from the older state would discard the newer states and metrics
                raise UserError(
                    f"{self.output}: another process has continued this run up to {newer.name}; run the same command "
                    "again to resume from there"
                )
            write_durably(self.output / "config.yaml", config.save)
            record_start(self.output, self.accelerator, self.progress.step)
            self.metrics = MetricsFile(self.output / "metrics.jsonl", self.progress.metrics_bytes)
            self.log_path.touch()
        except OSError as error:
            raise UserError(f"--output_dir {self.output}: cannot write: {error.strerror or error}") from None
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

        The row is written to ``metrics.jsonl`` and the trackers. On other ranks than the main process, nothing happens.
        """
        if not self.accelerator.is_main_process:
            return
        try:
            self._write_row(row)
        except OSError as error:  # StepLog then requests a stop of the run, and saving a state fails on all ranks
            self.failure = error
        with suppress(OSError):  # the terminal may have been closed
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
        """Log an evaluation, write it to ``evaluation.json``, and write the step's row with the evaluation's metrics.

        Only the main process may call this method.

        Args:
            step: step of the evaluation.
            row: row of the step, which has not been written yet; None before the first step.
            table: the evaluation; None if a resumed run no longer has held-out edges. Then only the row is written.
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

    def epoch(self, epoch: int, means: Mapping[str, float], steps: int, chance: float) -> None:
        """Log a summary of a finished epoch, with a warning if its graph loss is at chance, and flush the log.

        Args:
            epoch: the finished epoch; the first is 1.
            means: losses by name, averaged over ``steps``.
            steps: number of steps of the epoch, without those that had a non-finite loss or gradient.
            chance: mean graph loss of embeddings that are all equal.
        """
        log(
            f"epoch {epoch}/{self.config.epochs} done: mean loss {_figure(means[TOTAL])} ({_parts(means)}) over "
            f"{steps:,} steps"
        )
        if self.config.graph_loss_weight and 0 < (1 - CHANCE_MARGIN) * chance <= means["loss_graph"]:
            log(
                f"warning: the mean graph loss of epoch {epoch}, {means['loss_graph']:.4f}, is within 2 % of chance, "
                f"{chance:.4f}, or above it (the loss of embeddings that are all equal); {CHANCE_ADVICE}"
            )
        flush_log()

    def sync(self) -> int:
        """Sync the text log and ``metrics.jsonl`` to disk. Call this before a resume state is written.

        Returns:
            The size of ``metrics.jsonl`` in bytes.

        Raises:
            OSError: a file cannot be written, or writing an earlier row has failed.
        """
        if self.failure is not None:
            raise self.failure
        flush_log()
        sync(self.log_path)
        return self.metrics.sync()

    def log_start(self, graph: Graph, trained: int, frozen: int) -> None:
        """Log where the run starts, and the size of its graph, module and epoch files.

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
                "the towers have random weights, because they were built for the demo or a benchmark; set --model_name "
                f"{DEFAULT_MODEL} to use pretrained towers"
            )
        size = (config.epochs - progress.epoch + 1) * 4 * (frozen + 3 * trained) / 1e9
        log(
            f"{len(graph.nodes):,} nodes, {len(graph.rows):,} edges, {trained:,} trained and {frozen:,} frozen "
            f"parameters; steps {progress.step:,} to {self.total_steps:,}; the epoch files will take {size:.2f} GB in "
            f"{self.output / 'checkpoints'}"
        )

    def log_end(self, image_status: np.ndarray, done: bool, best: str, table: Table | None) -> None:
        """Close the bar. Log how the run ends, and how many nodes had no complete image, by image status.

        All ranks must call this method.

        Args:
            image_status: (N,) index into :data:`mmgraph.data.images.IMAGE_STATUS` of each node; 0 if this rank has not
                seen the node.
            done: whether the run is finished. False means that a stop signal ended the run early.
            best: line about the best evaluation, or an empty string.
            table: the last evaluation; None if the run was not evaluated.
        """
        if self.accelerator.is_main_process:
            self._close_bar()  # now, because an open bar would be printed below the last log lines
        counts = count_image_status_of_all_ranks(image_status)
        problems = describe_image_status(counts)
        if problems:
            log(f"nodes without a complete image, among those seen since this start: {problems}")
        for remark in image_remarks(counts, InputRules.of(self.config)):
            log(f"{remark} (among the nodes seen since this start)")
        if best:
            log(best)
        verdict = None if table is None or not done else judge(table, mrr_at_start(self.output / "metrics.jsonl"))
        if verdict is not None:
            advice = f"; {WORSE_ADVICE}" if verdict.not_beaten else ""
            log(f"{'warning: ' if advice else ''}verdict: {verdict}{advice}")
        if done:
            hint = "" if verdict and verdict.not_beaten else f". To write the embeddings: mmgraph encode {self.output}"
            log(f"done: wrote {final_file(self.output)}; metrics.jsonl and training_log.txt are in {self.output}{hint}")
        else:
            log(f"stopped at step {self.progress.step:,}; the state is written; run the same command to resume")
        with suppress(OSError):
            flush_log()  # now, because the launcher may kill this process while a tracker closes


def _figure(loss: float | None) -> str:
    return "not finite" if loss is None else f"{loss:.4f}"


def _parts(losses: Mapping[str, Any]) -> str:
    """Format the losses that are summed to the total, such as ``text-image 4.1589, graph 4.1589``."""
    return ", ".join(f"{label} {_figure(losses[name])}" for name, label in LABELS.items())


def count_image_status_of_all_ranks(image_status: np.ndarray) -> list[int]:
    """Count the nodes with each image status over all ranks. All ranks must call this function.

    Args:
        image_status: (N,) index into :data:`mmgraph.data.images.IMAGE_STATUS` of each node; 0 if this rank has not seen
            the node.

    Returns:
        The number of nodes with each image status except 0. A node that several ranks have seen is counted once.
    """
    seen = image_status.nonzero()[0]
    rows, codes = (np.concatenate(parts) for parts in zip(*gather_object([(seen, image_status[seen])]), strict=True))
    _, first = np.unique(rows, return_index=True)
    return count_image_status(codes[first])
