"""The best evaluation of a run: whose weights are kept, and when it was too long ago."""

from typing import Any

from mmgraph.config import Config
from mmgraph.utils.log import log

DEFAULT_METRIC = "z_graph/mrr"


class Best:
    """The best value of ``--keep_best`` so far, kept in the ``components`` of the run's state.

    Args:
        config: the run's settings.
        components: of the run's progress.
        held_out: fingerprint of the held-out edges; values on others are not compared.
    """

    def __init__(self, config: Config, components: dict[str, Any], held_out: str):
        self.patience, self.components = config.early_stopping_patience, components
        self.metric = config.keep_best or (DEFAULT_METRIC if self.patience else None)
        kind = {"metric": self.metric, "held_out": held_out}
        best = components.get("best")
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
        self.components["best"] = self.value
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
