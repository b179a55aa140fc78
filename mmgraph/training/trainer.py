"""The training loop. It trains on a batch, logs the step, and saves and evaluates when due, until the run ends."""

import dataclasses
from collections.abc import Callable

from accelerate import Accelerator
from accelerate.utils import gather_object

from mmgraph.checkpoints.files import best_file
from mmgraph.checkpoints.progress import Progress
from mmgraph.config import Config
from mmgraph.data.graph import Graph
from mmgraph.data.images import ImageCounter
from mmgraph.data.run_split import write_split
from mmgraph.distributed.signals import EXIT_CODE, StopRequest
from mmgraph.errors import UserError
from mmgraph.evaluation.evaluator import Evaluation, Table
from mmgraph.inference.node_outputs import NodeOutputs
from mmgraph.models.multimodal_graph_encoder import TrainedModule
from mmgraph.training.batch_stream import BatchStream
from mmgraph.training.checkpointer import Checkpointer
from mmgraph.training.early_stopping import EarlyStopping
from mmgraph.training.run_log import RunLog
from mmgraph.training.schedule import Schedule
from mmgraph.training.step_log import StepLog
from mmgraph.training.train_step import TrainStep
from mmgraph.utils.log import log


@dataclasses.dataclass
class Run:
    """A run, as this rank sees it. :func:`mmgraph.training.build.build_run` builds it."""

    config: Config
    accelerator: Accelerator
    graph: Graph
    progress: Progress
    schedule: Schedule
    early_stopping: EarlyStopping
    stream: BatchStream
    train_step: TrainStep
    step_log: StepLog
    checkpointer: Checkpointer
    run_log: RunLog
    signals: StopRequest
    images: ImageCounter  # counts the image files that this rank has read
    outputs: NodeOutputs  # tower outputs of all nodes, for evaluation and report
    evaluation: Evaluation | None  # None if there are no held-out edges
    parameters: tuple[int, int]  # number of trained and of frozen parameters
    last_table: Table | None = None  # the last evaluation since this start

    def train(self, at_end: Callable[["Run"], object] | None = None) -> int:
        """Train until the run is finished or a stop signal arrives. All ranks must call this method.

        Args:
            at_end: called with this run after the last step is saved, while the log and the trackers are still open.
                It is not called if any rank has received a stop signal.

        Returns:
            The exit code: 0, or 143 if a stop signal ended the run before its last step.

        Raises:
            UserError: the output folder cannot be used, too many images are bad, an evaluation fails, or another rank
                raises a user error.
            RunError: the disk is full or fails, too many steps are not finite, or another rank fails.
        """
        progress, schedule = self.progress, self.schedule
        if schedule.finished and progress.unevaluated is None:
            limit = "--early_stopping_patience" if self.early_stopping.exhausted else "--epochs or --max_steps"
            log(f"finished: {self.config.output_folder} is at step {progress.step:,}; raise {limit} to continue")
            return 0
        # The run log is the inner context, so that no signal interrupts it while it writes its last lines.
        with self.signals.listening(), self.run_log.opened():
            self.run_log.log_start(self.graph, *self.parameters)
            self.checkpointer.write(lambda: write_split(self.config.output_folder, self.config, self.graph))
            if progress.step == 0 or progress.unevaluated is not None:
                self.evaluate()
            for batch in self.stream:
                self.step_log.submit(self.train_step(batch))
                due = schedule.due
                if due.evaluation:
                    self.checkpointer.save()  # before the evaluation, so that no step is lost if it fails
                    self.evaluate()
                if schedule.finished or self.signals.stop_agreed:
                    break
                if due.save:
                    self.checkpointer.save()
            self.checkpointer.save()
            self.run_log.log_end(self.images.image_status, schedule.finished, self._best(), self.last_table)
            if at_end is not None and schedule.finished and not any(gather_object([self.signals.requested])):
                at_end(self)
        return EXIT_CODE if self.signals.stop_agreed and not schedule.finished else 0

    def evaluate(self) -> None:
        """Rank the held-out edges, and write the last step's row, which was held back, with the evaluation metrics.

        The evaluation is also logged and written to ``evaluation.json``. If it is the best so far, the best file is
        saved. If the run has no held-out edges any more, only the row is written.
        """
        if self.signals.stop_agreed:
            return  # the resumed run will start with this evaluation
        progress, table = self.progress, None
        row, progress.unevaluated = progress.unevaluated, None
        if self.evaluation is not None:
            with self.signals.exclude_from_timing():
                module = self.checkpointer.full_module()
                table = self.last_table = self._rank(self.evaluation, module)
        self.checkpointer.write(lambda: self.run_log.evaluation(progress.step, row, table))
        if table is not None and self.early_stopping.improves(progress.step, table["embeddings"]):
            self.checkpointer.save_best(module)
        self.step_log.restart_clock()

    def _rank(self, evaluation: Evaluation, module: TrainedModule) -> Table:
        try:
            return evaluation.evaluate(module.embeddings, self.outputs)
        except UserError as error:
            remedy = "try a lower --learning_rate, or set --max_grad_norm 1"
            raise UserError(f"evaluation at step {self.progress.step}: {error}; {remedy}") from None

    def _best(self) -> str:
        """Return the log line about the best evaluation and early stopping, or an empty string."""
        best = self.early_stopping
        line = f"best evaluation: {best}, saved as {best_file(self.config.output_folder)}" if best.has_best else ""
        if best.exhausted:
            return f"stopped early: the last {best.patience} evaluations brought no improvement; {line}"
        return line
