"""The verdict on a run: whether its embeddings are better than before training, and than each baseline."""

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

from mmgraph.evaluation.evaluator import FIXED, Table

EMBEDDING = "z_graph"
BASELINES = (*FIXED, "random")
BEFORE = "before training"


class Verdict(NamedTuple):
    """Compares the MRR of ``z_graph`` after training with other MRRs on the same held-out edges."""

    mrr: float
    others: dict[str, float]  # MRR before training, if known, and of each baseline

    @property
    def not_beaten(self) -> list[str]:
        """Names of the values that ``mrr`` does not exceed."""
        return [name for name, value in self.others.items() if self.mrr <= value]

    def __str__(self) -> str:
        ratios = [f"{self.mrr / value:.2f} times {name} ({value:.4f})" for name, value in self.others.items() if value]
        result = f"not better than {', '.join(self.not_beaten)}" if self.not_beaten else "better than each of them"
        return f"MRR of {EMBEDDING} {self.mrr:.4f}: {', '.join(ratios)}; {result}"


def judge(table: Table, before: Mapping[str, float] | None) -> Verdict:
    """Return the verdict on an evaluation.

    Args:
        table: the evaluation at the end of the run.
        before: MRR by embedding in the evaluation at step 0; None if it is not known. It is not used if it was measured
            on other held-out edges, which the MRR of the embeddings that training does not change shows.
    """
    embeddings = {name: float(values["mrr"]) for name, values in table["embeddings"].items()}
    others = {name: embeddings[name] for name in BASELINES if name in embeddings}
    if before is not None and all(math.isclose(before.get(name, math.nan), others[name]) for name in others):
        others = {BEFORE: before[EMBEDDING], **others}
    return Verdict(embeddings[EMBEDDING], others)


def mrr_at_start(metrics: Path) -> dict[str, float] | None:
    """Return the MRR by embedding at step 0 from a run's ``metrics.jsonl``; None if the run was not evaluated then."""
    try:
        with metrics.open(encoding="utf-8") as file:
            row = json.loads(file.readline())
        if row["step"] != 0:
            return None
        baselines = {name: float(row[f"eval/{name}/mrr"]) for name in BASELINES if f"eval/{name}/mrr" in row}
        return {EMBEDDING: float(row[f"eval/{EMBEDDING}/mrr"]), **baselines}
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return None
