"""Launched by test_false_negatives.py. Rank 0 writes the losses and gradients of each case, over all ranks."""

import sys

import torch
import torch.distributed as dist

from mmgraph.cli import leave
from mmgraph.data.adjacency import Adjacency
from mmgraph.distributed.launch import build_accelerator
from mmgraph.losses import contrastive as losses
from mmgraph.losses.contrastive import BatchNodes, contrastive_losses
from mmgraph.losses.negative_mask import FalseNegatives

target, source = sys.argv[1:]
accelerator = build_accelerator()
inputs = torch.load(source)
rank, world_size = accelerator.process_index, accelerator.num_processes
edges = len(inputs["rows"]) // 2  # B, of the global batch; the rows are its B anchors, then its B positives


def local_rows(tensor: torch.Tensor) -> torch.Tensor:
    """Return the rows of this rank: its b anchors, then its b positives."""
    anchors_and_positives = tensor.unflatten(0, (2, edges))
    shard = slice(edges * rank // world_size, edges * (rank + 1) // world_size)
    return anchors_and_positives[:, shard].flatten(0, 1).clone()


results = {}
for chunk in (1 << 24, 30):  # the complete logit matrix, and chunks of it
    losses.LOGIT_CHUNK = chunk
    for same, linked, missing in inputs["cases"]:
        z = [local_rows(tensor).requires_grad_() for tensor in inputs["z"]]
        neighbors = Adjacency(inputs["keys"], inputs["num_nodes"]) if linked else None
        masks = FalseNegatives(inputs["pictures"], same, neighbors, missing)
        nodes = BatchNodes(local_rows(inputs["rows"]), local_rows(inputs["missing"]))
        result = contrastive_losses(*z, 0.2, 0.7, masks, nodes)
        result.total.backward()
        values = torch.stack([result.total, result.mm, result.graph, *result.masked_counts]).detach()
        gradients = torch.stack([tensor.grad for tensor in z])  # (3, 2b, d)
        all_gradients = [torch.empty_like(gradients) for _ in range(world_size)]
        if world_size > 1:
            dist.all_reduce(values)
            dist.all_gather(all_gradients, gradients)
        else:
            all_gradients = [gradients]
        total = torch.cat([part.unflatten(1, (2, -1)) for part in all_gradients], dim=2).flatten(1, 2)  # (3, 2B, d)
        results[chunk, same, linked, missing] = values / world_size, total / world_size
        if not (same or linked or missing):
            plain = contrastive_losses(*(tensor.detach() for tensor in z), 0.2, 0.7)
            assert torch.equal(torch.stack([*plain[:3]]), torch.stack([result.total, result.mm, result.graph]))
if accelerator.is_main_process:
    torch.save(results, target)
leave(0)
