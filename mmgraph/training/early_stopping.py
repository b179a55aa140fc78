"""The best evaluation of a run: whose weights are kept, and when it was too long ago."""

from mmgraph.checkpoints.progress import Progress
from mmgraph.config import Config
from mmgraph.utils.log import log

DEFAULT_METRIC = "z_graph/mrr"


class EarlyStopping:
    """The best value of ``--keep_best`` so far, and how many evaluations there were since.

    Args:
        config: the run's settings.
        progress: of the run; the value is kept in it.
        held_out: fingerprint of the held-out edges; values on others are not compared.
    """

    def __init__(self, config: Config, progress: Progress, held_out: str):
        self.patience, self.progress = config.early_stopping_patience, progress
        self.metric = config.keep_best or (DEFAULT_METRIC if self.patience else None)
        kind = {"metric": self.metric, "held_out": held_out}
        best = progress.best
        if best is not None and {name: best[name] for name in kind} != kind:
            log(f"--keep_best begins anew: the best so far was {best['metric']}, on held-out edges {best['held_out']}")
            best = None
        self.value = best or {**kind, "value": None, "step": None, "misses": 0}

    def improves(self, step: int, embeddings: dict[str, dict[str, float]]) -> bool:
        """Note an evaluation; whether it is the best so far."""
        if self.metric is None:
            return False
        kind, name = self.metric.split("/")
        value, best = embeddings[kind][name], self.value["value"]
        better = best is None or value > best
        self.value |= {"value": value, "step": step, "misses": 0} if better else {"misses": self.value["misses"] + 1}
        self.progress.best = self.value
        return better

    @property
    def found(self) -> bool:
        return self.value["step"] is not None

    @property
    def exhausted(self) -> bool:
        """Whether ``--early_stopping_patience`` evaluations went by without a better one."""
        return self.patience is not None and self.value["misses"] >= self.patience

    def __str__(self) -> str:
        return f"{self.metric} {self.value['value']:.4f} at step {self.value['step']:,}"
