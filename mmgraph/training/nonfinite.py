"""Updates that are not finite: no rank makes one, its batch is written down, and the run ends or leaves a few out."""

import json
import math
import os
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from mmgraph.checkpoints.progress import Progress
from mmgraph.config import Config
from mmgraph.data.graph import Graph
from mmgraph.data.sampler import permuted
from mmgraph.distributed.collectives import write_on_main_process
from mmgraph.errors import RunError
from mmgraph.utils.log import log

FILE = "not_finite.jsonl"
REMEDY = "try a lower --learning_rate, --max_grad_norm 1, or bf16 instead of fp16"


def poison_if_nonfinite(loss: torch.Tensor) -> torch.Tensor:
    """The loss, with gradients that are all NaN where it is not finite itself.

    So a loss that is not finite on one rank is known to all of them by the gradients, which are reduced anyway. Else
    nothing changes: times 1 is exact.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def skip_if_nonfinite(optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> None:
    """Have a fused optimizer's next step change nothing, where the gradients' norm is not finite.

    The device decides, as under torch.amp.GradScaler, whose way of telling the optimizer this is: nothing waits for it.
    """
    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]


class NonfiniteSteps:
    """What becomes of the steps of a run that are not finite.

    Args:
        config: the run's settings; as many steps as ``max_skipped_steps`` may be left out.
        graph: the run's data; the ids of a batch's edges are written to ``not_finite.jsonl``.
        progress: the run's; such steps are counted in it.
    """

    def __init__(self, config: Config, accelerator: Accelerator, graph: Graph, progress: Progress):
        self.config, self.accelerator, self.graph, self.progress = config, accelerator, graph, progress

    def skips(
        self,
        row: dict[str, Any],
        loss: float,
        norm: float,
        own_loss: torch.Tensor,
        first_sample: int,
        finding_scale: bool,
    ) -> bool:
        """Whether a step was not finite, and so is left out. The same on every rank, which all call this.

        Args:
            row: of the step.
            loss: the weighted sum, in the mean over the ranks.
            norm: of the gradients, the same on every rank; negative where the backend does not tell it.
            own_loss: this rank's, ().
            first_sample: edges of the epoch before this batch.
            finding_scale: fp16 looks for its loss scale: gradients of no finite norm are its affair.

        Raises:
            RunError: there were ``--max_skipped_steps`` before.
        """
        if math.isfinite(loss) and (math.isfinite(norm) or finding_scale):
            return False
        finite = gather_object([math.isfinite(own_loss.item())])
        ranks = [rank for rank, is_finite in enumerate(finite) if not is_finite]
        what = "the loss is not finite" if ranks else "the gradient is not finite"
        where = f" on rank {', '.join(map(str, ranks))}" if 0 < len(ranks) < len(finite) else ""
        write_on_main_process(
            self.accelerator, self.config.output_folder, lambda: self._write(row, ranks, first_sample)
        )
        count = self.progress.nonfinite_steps + 1
        told = f"step {row['step']:,}: {what}{where}; no rank has made the update, and its edges are in {FILE}"
        if count > self.config.max_skipped_steps:
            raise RunError(
                f"{told}. The last state stands: {REMEDY}; or --max_skipped_steps {count} leaves such steps out"
            )
        self.progress.nonfinite_steps = count
        log(f"{told} ({count} of --max_skipped_steps {self.config.max_skipped_steps})")
        return True

    def _write(self, row: dict[str, Any], ranks: list[int], start: int) -> None:
        size, graph = self.config.global_batch_size, self.graph
        edges = permuted(np.arange(start, start + size), len(graph.rows), self.config.seed, row["epoch"])
        ids = graph.nodes.ids(graph.rows[edges].ravel())  # 2 * size
        told = {
            "step": row["step"],
            "epoch": row["epoch"],
            "ranks": ranks,
            "edges": list(zip(ids[::2], ids[1::2], strict=True)),
        }
        with (self.config.output_folder / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(told) + "\n")
            file.flush()
            os.fsync(file.fileno())
