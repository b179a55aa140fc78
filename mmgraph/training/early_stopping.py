"""Finds the best evaluation of a run, and decides when the run stops early."""

from mmgraph.checkpoints.progress import Progress
from mmgraph.config import Config
from mmgraph.utils.log import log

DEFAULT_METRIC = "z_graph/mrr"


class EarlyStopping:
    """Tracks the best value of the ``--keep_best`` metric, and counts the evaluations since this value.

    Args:
        config: the run's settings.
        progress: the run's progress; it stores the best value, so that a resumed run does not lose this value.
        held_out: fingerprint of the held-out edges. A best value measured on other held-out edges is dropped.
    """

    def __init__(self, config: Config, progress: Progress, held_out: str):
        self.patience, self.progress = config.early_stopping_patience, progress
        self.metric = config.keep_best or (DEFAULT_METRIC if self.patience else None)
        comparable = {"metric": self.metric, "held_out": held_out}
        best = progress.best
        if best is not None and {name: best[name] for name in comparable} != comparable:
            log(
                f"--keep_best: the previous best value is dropped: it has the metric {best['metric']} and the held-out "
                f"edges {best['held_out']}, and this run has another metric or other held-out edges"
            )
            best = None
        self.value = best or {**comparable, "value": None, "step": None, "misses": 0}

    def improves(self, step: int, embeddings: dict[str, dict[str, float]]) -> bool:
        """Record an evaluation. Return whether its metric is the best so far.

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
        """Whether an evaluation has been recorded."""
        return self.value["step"] is not None

    @property
    def exhausted(self) -> bool:
        """Whether the last ``--early_stopping_patience`` evaluations have not improved the best value."""
        return self.patience is not None and self.value["misses"] >= self.patience

    def __str__(self) -> str:
        return f"{self.metric} {self.value['value']:.4f} at step {self.value['step']:,}"
