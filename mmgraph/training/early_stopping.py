"""The best evaluation of a run, and early stopping."""

from mmgraph.checkpoints.progress import Progress
from mmgraph.config import Config
from mmgraph.utils.log import log

DEFAULT_METRIC = "z_graph/mrr"


class EarlyStopping:
    """Tracks the best value of the ``--keep_best`` metric, and the number of evaluations since then.

    Args:
        config: the run's settings.
        progress: the run's progress; it stores the best value, so that a resumed run continues with it.
        held_out: fingerprint of the held-out edges. Values on other edges are not compared.
    """

    def __init__(self, config: Config, progress: Progress, held_out: str):
        self.patience, self.progress = config.early_stopping_patience, progress
        self.metric = config.keep_best or (DEFAULT_METRIC if self.patience else None)
        comparable = {"metric": self.metric, "held_out": held_out}
        best = progress.best
        if best is not None and {name: best[name] for name in comparable} != comparable:
            log(
                f"--keep_best: the previous best value is dropped; its metric is {best['metric']}, its held-out edges "
                f"are {best['held_out']}, and one of them differs in this run"
            )
            best = None
        self.value = best or {**comparable, "value": None, "step": None, "misses": 0}

    def improves(self, step: int, embeddings: dict[str, dict[str, float]]) -> bool:
        """Record an evaluation. Return whether it is the best so far.

        Args:
            step: step of the evaluation.
            embeddings: metrics by embedding, such as ``embeddings["z_graph"]["mrr"]``.
        """
        if self.metric is None:
            return False
        embedding, name = self.metric.split("/")
        value, best = embeddings[embedding][name], self.value["value"]
        better = best is None or value > best
        self.value |= {"value": value, "step": step, "misses": 0} if better else {"misses": self.value["misses"] + 1}
        self.progress.best = self.value
        return better

    @property
    def has_best(self) -> bool:
        """Whether there is a best evaluation."""
        return self.value["step"] is not None

    @property
    def exhausted(self) -> bool:
        """Whether ``--early_stopping_patience`` evaluations in a row did not improve the metric."""
        return self.patience is not None and self.value["misses"] >= self.patience

    def __str__(self) -> str:
        return f"{self.metric} {self.value['value']:.4f} at step {self.value['step']:,}"
