"""One optimizer step: tokens, embeddings, losses, backward, update."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from torch import nn

from mmgraph.checkpoints.progress import Progress
from mmgraph.data.batches import EdgeBatch
from mmgraph.losses.objective import TOTAL, Embeddings, Objective
from mmgraph.towers.token_source import TokenSource
from mmgraph.training.nonfinite import poison_if_nonfinite, skip_if_nonfinite

UNKNOWN_NORM = -1.0  # where the backend does not give it


class StepResult(NamedTuple):
    """What a step gives, on the device: scalars, float32. The device may still be working on them."""

    losses: dict[str, torch.Tensor]  # this rank's share, by their names in metrics.jsonl
    grad_norm: torch.Tensor  # L2, over all parameters and ranks, before clipping; or UNKNOWN_NORM
    counters: dict[str, torch.Tensor]  # further figures, by their names in metrics.jsonl


class TrainStep:
    """Trains on one batch, on this rank. Called by all ranks.

    Args:
        module, optimizer: prepared by Accelerate.
        objective: gives the losses.
        source: of the towers' tokens.
        accelerator: of the run.
        progress: of the run; each step is counted in it.
        edges: in a step, over all ranks.
        lr: the learning rate of an update, from 1.
        micro_batches: parts that the nodes are embedded in.
        max_grad_norm: L2 norm that gradients are clipped to; 0 does not clip.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: AcceleratedOptimizer,
        objective: Objective,
        source: TokenSource,
        accelerator: Accelerator,
        progress: Progress,
        edges: int,
        lr: Callable[[int], float],
        micro_batches: int,
        max_grad_norm: float,
    ):
        self.module, self.optimizer, self.objective, self.source = module, optimizer, objective, source
        self.accelerator, self.progress, self.edges, self.lr = accelerator, progress, edges, lr
        self.micro_batches, self.max_grad_norm = micro_batches, max_grad_norm

    def __call__(self, batch: EdgeBatch) -> StepResult:
        """Train on a batch. Nothing here waits for the device, but for what fp16's loss scaler does."""
        tokens = self.source.tokens(batch, self.micro_batches)
        unique = self.module(tokens, self.micro_batches)  # (U, proj_dim) three times
        embeddings = Embeddings(*(z.index_select(0, batch.inverse) for z in unique))  # (2b, proj_dim) each
        losses, counters = self.objective(embeddings, batch)

        self.progress.advance(self.edges)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(self.progress.step)
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(poison_if_nonfinite(losses[TOTAL]))  # under DeepSpeed also clips and updates
        norm = self._clip_gradients()
        self.optimizer.step()
        return StepResult({name: loss.detach() for name, loss in losses.items()}, norm.detach(), counters)

    def _clip_gradients(self) -> torch.Tensor:
        engine: Any = self.module
        if hasattr(engine, "get_global_grad_norm"):  # DeepSpeed; Accelerate's own call would wait for the device
            norm = engine.get_global_grad_norm()
            return torch.as_tensor(UNKNOWN_NORM if norm is None else norm, device=self.accelerator.device).float()
        # An infinite limit leaves the gradients as they are, and gives their norm.
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), self.max_grad_norm or math.inf)
        if self.accelerator.scaler is None:  # which skips such a step itself
            skip_if_nonfinite(self.optimizer.optimizer, norm)
        return norm
