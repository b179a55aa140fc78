"""The training run: evaluate -> for batch -> step -> log -> save -> stop."""

import dataclasses
from collections.abc import Callable

from accelerate import Accelerator
from accelerate.utils import gather_object

from mmgraph.checkpoints.files import best_file
from mmgraph.checkpoints.progress import Progress
from mmgraph.config import Config
from mmgraph.data.graph import Graph
from mmgraph.data.images import ImageCounter
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
    """One run, on this rank; from :func:`mmgraph.training.build.build_run`."""

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
    images: ImageCounter  # image files seen on this rank
    outputs: NodeOutputs  # of all nodes, for the evaluation
    evaluation: Evaluation | None  # of held-out edges
    parameters: tuple[int, int]  # how many are trained, and how many are frozen

    def train(self, at_end: Callable[["Run"], object] | None = None) -> int:
        """Train to the end, or until asked to stop. Called by all ranks.

        Args:
            at_end: called when all steps are done and saved, while log and trackers are open.

        Returns:
            The exit code.
        """
        progress, schedule = self.progress, self.schedule
        if schedule.finished and progress.unevaluated is None:
            limit = "--early_stopping_patience" if self.early_stopping.exhausted else "--epochs or --max_steps"
            log(f"finished: {self.config.output_folder} is at step {progress.step:,}; raise {limit} to go on")
            return 0
        with self.signals.listening(), self.run_log.opened():  # not to be cut off in writing its last lines
            self.run_log.log_start(self.graph, *self.parameters)
            if progress.step == 0 or progress.unevaluated is not None:
                self.evaluate()
            for batch in self.stream:
                self.step_log.submit(self.train_step(batch))
                due = schedule.due
                if due.evaluation:
                    self.checkpointer.save()  # first: an evaluation that does not end costs no step
                    self.evaluate()
                if schedule.finished or self.signals.stop_agreed:
                    break
                if due.save:
                    self.checkpointer.save()
            self.checkpointer.save()
            self.run_log.log_end(self.images.image_status, schedule.finished, self._best())
            if at_end is not None and schedule.finished and not any(gather_object([self.signals.requested])):
                at_end(self)
        return EXIT_CODE if self.signals.stop_agreed and not schedule.finished else 0

    def evaluate(self) -> None:
        """Rank the held-out edges, if there are any: a line, metrics of the step's row, ``evaluation.json``."""
        if self.signals.stop_agreed:
            return  # the same command begins with it
        progress, table = self.progress, None
        row, progress.unevaluated = progress.unevaluated, None
        if self.evaluation is not None:
            with self.signals.exclude_from_timing():
                module = self.checkpointer.whole_module()
                table = self._rank(self.evaluation, module)
        self.checkpointer.write(lambda: self.run_log.evaluation(progress.step, row, table))
        if table is not None and self.early_stopping.improves(progress.step, table["embeddings"]):
            self.checkpointer.save_best(module)
        self.step_log.restart_clock()

    def _rank(self, evaluation: Evaluation, module: TrainedModule) -> Table:
        try:
            return evaluation.evaluate(module.embeddings, self.outputs)
        except UserError as error:
            remedy = "try a lower --learning_rate, or --max_grad_norm 1"
            raise UserError(f"evaluation at step {self.progress.step}: {error}; {remedy}") from None

    def _best(self) -> str:
        """What is to be said of the best evaluation."""
        best = self.early_stopping
        line = f"best: {best}, {best_file(self.config.output_folder)}" if best.found else ""
        if best.exhausted:
            return f"no better one in {best.patience} evaluations: stopped early; {line}"
        return line
