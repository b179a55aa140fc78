"""Launched by test_topologies.py. Rank 0 writes the gradients of a step for each number of micro batches."""

import sys

import torch

from mmgraph.arguments import parse_config
from mmgraph.cli import leave
from mmgraph.data.graph import load_graph
from mmgraph.distributed.launch import build_accelerator
from mmgraph.losses.contrastive import contrastive_losses
from mmgraph.training.build import build_run

target, *arguments = sys.argv[1:]
config = parse_config(arguments)
accelerator = build_accelerator()
step = (run := build_run(config, accelerator, load_graph(config))).train_step
batch = next(iter(run.stream))
for group in step.optimizer.param_groups:
    group["lr"] = 0.0  # steps then do not change the weights
gradients = []
for parts in (1, 2, 4, 8):
    z = step.module(step.source.tokens(batch, parts), parts)
    embeddings = (part.index_select(0, batch.inverse) for part in z)
    loss = contrastive_losses(*embeddings, config.temperature, config.graph_loss_weight).total
    if hasattr(step.module, "zero_optimization_stage"):
        from deepspeed.utils import safe_get_full_grad

        step.module.backward(loss)
        gradients.append([safe_get_full_grad(p).clone() for p in step.module.module.parameters()])
        step.module.step()
    else:
        accelerator.backward(loss)
        gradients.append([p.grad.clone() for p in step.module.parameters()])
        step.optimizer.zero_grad()
if accelerator.is_main_process:
    torch.save(gradients, target)
leave(0)
