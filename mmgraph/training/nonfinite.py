"""Handles steps with a non-finite loss or gradient.

No rank applies the update of such a step. The node ids of its edges are written to a file. The run skips the step or
ends.
"""

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
    """Return the loss. If the loss is not finite, its backward pass gives only NaN gradients.

    The backend averages the gradients over the ranks. If the loss of any rank is not finite, all ranks therefore get
    NaN gradients, and detect this without an additional collective. A finite loss is multiplied by 1, so it does not
    change.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def skip_if_nonfinite(optimizer: torch.optim.Optimizer, norm: torch.Tensor) -> None:
    """Make the next step of a fused optimizer a no-op if the norm of the gradients is not finite.

    This function sets ``found_inf`` on the optimizer, as ``torch.amp.GradScaler`` does. The optimizer reads
    ``found_inf`` on the device, so the host does not wait.
    """
    optimizer.found_inf = (~norm.isfinite()).float()  # type: ignore[attr-defined]


class NonfiniteSteps:
    """Skips the non-finite steps of a run, or ends the run if there are too many.

    Args:
        config: the run's settings. At most ``max_skipped_steps`` steps of a run are skipped.
        accelerator: the run's accelerator.
        graph: the run's data. The node ids of a non-finite step's edges are written to ``not_finite.jsonl``.
        progress: the run's progress, which counts the skipped steps.
    """

    def __init__(self, config: Config, accelerator: Accelerator, graph: Graph, progress: Progress):
        self.config, self.accelerator, self.graph, self.progress = config, accelerator, graph, progress

    def handle(
        self,
        row: dict[str, Any],
        loss: float,
        norm: float,
        local_loss: torch.Tensor,
        first_sample: int,
        scaler_skipped: bool,
    ) -> bool:
        """Record a step that is not finite. Return whether the step is skipped because it is not finite.

        All ranks must call this method, and all get the same result.

        Args:
            row: row of the step in ``metrics.jsonl``.
            loss: weighted sum of the losses, averaged over the ranks.
            norm: L2 norm of the gradients, which is equal on all ranks; negative if the backend does not report a norm.
            local_loss: this rank's weighted sum of the losses, ().
            first_sample: number of edges that earlier steps of this epoch used.
            scaler_skipped: whether the fp16 loss scaler skipped this step because the loss scale was too large. In this
                case, a non-finite gradient is expected and not recorded.

        Raises:
            RunError: the step is not finite, and ``--max_skipped_steps`` steps have already been skipped.
        """
        if math.isfinite(loss) and (math.isfinite(norm) or scaler_skipped):
            return False
        finite = gather_object([math.isfinite(local_loss.item())])
        ranks = [rank for rank, is_finite in enumerate(finite) if not is_finite]
        problem = "the loss is not finite" if ranks else "the gradient is not finite"
        where = f" on rank {', '.join(map(str, ranks))}" if 0 < len(ranks) < len(finite) else ""
        write_on_main_process(
            self.accelerator, self.config.output_folder, lambda: self._write(row, ranks, first_sample)
        )
        count = self.progress.nonfinite_steps + 1
        message = f"step {row['step']:,}: {problem}{where}, so no rank applied the update; its edges are in {FILE}"
        if count > self.config.max_skipped_steps:
            raise RunError(
                f"{message}. The last state is intact; {REMEDY}, or set --max_skipped_steps {count} to skip this step"
            )
        self.progress.nonfinite_steps = count
        log(f"{message} ({count} of --max_skipped_steps {self.config.max_skipped_steps})")
        return True

    def _write(self, row: dict[str, Any], ranks: list[int], start: int) -> None:
        size, graph = self.config.global_batch_size, self.graph
        edges = permuted(np.arange(start, start + size), len(graph.rows), self.config.seed, row["epoch"])
        ids = graph.nodes.ids(graph.rows[edges].ravel())  # 2 * size
        entry = {
            "step": row["step"],
            "epoch": row["epoch"],
            "ranks": ranks,
            "edges": list(zip(ids[::2], ids[1::2], strict=True)),
        }
        with (self.config.output_folder / FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")
            file.flush()
            os.fsync(file.fileno())
