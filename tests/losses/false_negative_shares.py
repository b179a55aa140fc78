"""Launched by test_false_negatives.py: each case's loss and gradients over all ranks, written by rank 0."""

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
given = torch.load(source)
rank, world_size = accelerator.process_index, accelerator.num_processes
edges = len(given["rows"]) // 2  # of the global batch; anchors first


def own(tensor: torch.Tensor) -> torch.Tensor:
    """This rank's anchors, then its positives."""
    both = tensor.unflatten(0, (2, edges))
    part = slice(edges * rank // world_size, edges * (rank + 1) // world_size)
    return both[:, part].flatten(0, 1).clone()


results = {}
for at_once in (1 << 24, 30):  # whole, and in parts
    losses.LOGIT_CHUNK = at_once
    for same, linked, missing in given["cases"]:
        z = [own(tensor).requires_grad_() for tensor in given["z"]]
        neighbors = Adjacency(given["keys"], given["num_nodes"]) if linked else None
        masks = FalseNegatives(given["pictures"], same, neighbors, missing)
        nodes = BatchNodes(own(given["rows"]), own(given["missing"]))
        found = contrastive_losses(*z, 0.2, 0.7, masks, nodes)
        found.total.backward()
        shares = torch.stack([found.total, found.mm, found.graph, *found.left_out]).detach()
        gradients = torch.stack([tensor.grad for tensor in z])  # (3, 2b, d)
        everyones = [torch.empty_like(gradients) for _ in range(world_size)]
        if world_size > 1:
            dist.all_reduce(shares)
            dist.all_gather(everyones, gradients)
        else:
            everyones = [gradients]
        whole = torch.cat([part.unflatten(1, (2, -1)) for part in everyones], dim=2).flatten(1, 2)  # (3, 2B, d)
        results[at_once, same, linked, missing] = shares / world_size, whole / world_size
        if not (same or linked or missing):
            plain = contrastive_losses(*(tensor.detach() for tensor in z), 0.2, 0.7)
            assert torch.equal(torch.stack([*plain[:3]]), torch.stack([found.total, found.mm, found.graph]))
if accelerator.is_main_process:
    torch.save(results, target)
leave(0)
