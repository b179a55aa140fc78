"""Launched by test_micro_batches.py: a step's gradients with each number of micro batches, written by rank 0."""

import sys

import torch

from mmgraph.cli import leave
from mmgraph.data.graph import load_graph
from mmgraph.distributed.launch import build_accelerator
from mmgraph.flags import parse_config
from mmgraph.losses.contrastive import contrastive_losses
from mmgraph.training.trainer import Trainer

target, *arguments = sys.argv[1:]
config = parse_config(arguments)
accelerator = build_accelerator()
trainer = Trainer(config, accelerator, load_graph(config))
batch = next(trainer.batches())
for group in trainer.optimizer.param_groups:
    group["lr"] = 0.0  # a step changes nothing
gradients = []
for parts in (1, 2, 4, 8):
    z = trainer.trained(trainer.source.tokens(batch, parts), parts)
    own = (part.index_select(0, batch.inverse) for part in z)
    loss = contrastive_losses(*own, config.temperature, config.graph_loss_weight).total
    if hasattr(trainer.trained, "zero_optimization_stage"):
        from deepspeed.utils import safe_get_full_grad

        trainer.trained.backward(loss)
        gradients.append([safe_get_full_grad(p).clone() for p in trainer.trained.module.parameters()])
        trainer.trained.step()
    else:
        accelerator.backward(loss)
        gradients.append([p.grad.clone() for p in trainer.trained.parameters()])
        trainer.optimizer.zero_grad()
if accelerator.is_main_process:
    torch.save(gradients, target)
leave(0)
