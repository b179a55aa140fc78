"""Runs one optimizer step: tokens, embeddings, losses, backward pass, update."""

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
from mmgraph.utils.error_text import explain_out_of_memory

UNKNOWN_NORM = -1.0  # stands for a gradient norm that the backend does not report


class StepResult(NamedTuple):
    """Results of a step: float32 scalars on the device. The device may still be computing them."""

    losses: dict[str, torch.Tensor]  # this rank's losses, by their names in metrics.jsonl
    grad_norm: torch.Tensor  # L2 norm of the reduced gradients of all parameters, before clipping; or UNKNOWN_NORM
    counters: dict[str, torch.Tensor]  # other metrics of the step, by their names in metrics.jsonl


class TrainStep:
    """Trains on one batch. All ranks must call it.

    Args:
        module, optimizer: the trained module and its optimizer, prepared by Accelerate.
        objective: computes the losses.
        source: returns the towers' tokens of a batch.
        accelerator: the run's accelerator.
        progress: the run's progress. Each call adds one step to it.
        edges: number of edges per step, over all ranks.
        lr: returns the learning rate of a step; the first step is 1.
        micro_batches: number of parts in which a rank embeds the nodes of its batch.
        max_grad_norm: L2 norm to which gradients are clipped; 0 disables clipping.
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
        self._memory_remedy = self._find_memory_remedy()

    def __call__(self, batch: EdgeBatch) -> StepResult:
        """Train on this rank's batch.

        The host does not wait for the device, except in fp16, where the loss scaler waits.

        Raises:
            RunError: the memory of the device does not suffice.
        """
        with explain_out_of_memory(self._memory_remedy):
            return self._train(batch)

    def _train(self, batch: EdgeBatch) -> StepResult:
        tokens = self.source.tokens(batch, self.micro_batches)
        # The module embeds each of the batch's U unique nodes once. index_select then returns the embeddings of both
        # ends of this rank's b edges.
        unique = self.module(tokens, self.micro_batches)  # z_graph, z_text and z_vis, (U, proj_dim) each
        embeddings = Embeddings(*(z.index_select(0, batch.inverse) for z in unique))  # (2b, proj_dim) each
        losses, counters = self.objective(embeddings, batch)

        self.progress.advance(self.edges)
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr(self.progress.step)
        self.optimizer.zero_grad(set_to_none=True)
        self.accelerator.backward(poison_if_nonfinite(losses[TOTAL]))  # DeepSpeed also clips and updates here
        norm = self._clip_gradients()
        self.optimizer.step()
        return StepResult({name: loss.detach() for name, loss in losses.items()}, norm.detach(), counters)

    def _find_memory_remedy(self) -> str:
        edges = math.ceil(self.edges / self.accelerator.num_processes / self.micro_batches)
        if edges == 1:
            return "set a smaller --global_batch_size"
        return f"set --micro_batch_size {edges // 2} (now {edges} edges at a time), with the same result"

    def _clip_gradients(self) -> torch.Tensor:
        """Clip the gradients, unless DeepSpeed has clipped them. Return their norm before clipping, in float32."""
        engine: Any = self.module
        if hasattr(engine, "get_global_grad_norm"):  # DeepSpeed; clip_grad_norm_ would wait for the device
            norm = engine.get_global_grad_norm()
            norm = UNKNOWN_NORM if norm is None else norm
            if isinstance(norm, torch.Tensor):
                return norm.to(self.accelerator.device, torch.float32)
            # full() creates the value on the device, without a copy from the host.
            return torch.full((), norm, dtype=torch.float32, device=self.accelerator.device)
        # An infinite limit does not change the gradients, but the call still returns their norm.
        norm = self.accelerator.clip_grad_norm_(self.module.parameters(), self.max_grad_norm or math.inf)
        if self.accelerator.scaler is None:  # a loss scaler, if any, skips such a step itself
            skip_if_nonfinite(self.optimizer.optimizer, norm)
        return norm
