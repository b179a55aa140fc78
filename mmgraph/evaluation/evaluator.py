"""Evaluates embeddings: ranks held-out edges, and measures how well texts retrieve their images.

A rank is always the position of an edge or an image. The ranks of torch.distributed are called processes here.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from mmgraph.data.adjacency import Adjacency, pair_keys
from mmgraph.data.sampler import permuted
from mmgraph.data.split import HeldOut
from mmgraph.errors import UserError
from mmgraph.evaluation.ranking import filtered_ranks, matching_ranks, round_to_grid, sampled_ranks, summary
from mmgraph.inference.node_outputs import NodeOutputs
from mmgraph.inference.node_sharding import Embeddings, embed_shard, gather_shards, rank_range
from mmgraph.utils.log import log

TRAINED = ("z_graph", "fused")
ALIGNED = ("z_text", "z_vis")  # the text-image loss compares these two
FIXED = ("text_only", "image_only", "concat")  # training does not change these
RANDOM_WIDTH = 128
MAX_TEXTS = 10_000  # maximum number of texts in the text-image retrieval; they are drawn with the seed

Table = dict[str, Any]


class Ranks(NamedTuple):
    """The ranks of M held-out edges, computed from one embedding."""

    filtered: np.ndarray  # (2, M): row 0 has the ranks of the destinations, row 1 those of the sources
    sampled: np.ndarray  # (M,): ranks of the destinations among 100 random nodes


class Evaluation:
    """Ranks held-out edges by the nodes' embeddings. All processes must call each method.

    Each held-out edge gives two queries. The first ranks the destination among all nodes, by similarity to the source.
    The second ranks the source, by similarity to the destination. The query node and its other neighbors are not
    candidates. A neighbor is any node that a training, held-out or otherwise known edge links with the query node, in
    any relation and direction. Self-loops are skipped. An edge that occurs several times in the table is ranked once.

    Each process holds one or two embeddings of all nodes at a time, in O(nodes x dim) memory, and computes the ranks
    of its shard of the queries.

    Args:
        accelerator: the run's accelerator.
        trained: adjacency of the training edges.
        held_out: the edges to rank.
        seed: seed of the random embeddings, the sampled negatives, the retrieval queries and the shuffled images.
        known: adjacency of all known edges, if it contains more than the training edges; it may contain held-out edges.

    Raises:
        UserError: all held-out edges are self-loops.
    """

    def __init__(
        self, accelerator: Accelerator, trained: Adjacency, held_out: HeldOut, seed: int, known: Adjacency | None = None
    ):
        self.accelerator, self.num_nodes, self.seed = accelerator, trained.num_nodes, seed
        self.names, self.held_out = held_out.names, held_out.fingerprint
        relations = np.zeros(len(held_out.rows), np.int64) if held_out.relations is None else held_out.relations
        edges = np.unique(np.column_stack([held_out.rows, relations]), axis=0)
        edges = edges[edges[:, 0] != edges[:, 1]]
        if not len(edges):
            raise UserError(
                "no held-out edge links two different nodes, so there is nothing to rank; set another --eval_edges"
            )
        self.rows, self.relations = torch.from_numpy(edges[:, :2]), edges[:, 2]  # (M, 2), (M,)
        leaked = trained.count(self.rows.to(trained.keys.device))
        if leaked:
            log(
                f"warning: {leaked:,} of {len(edges):,} held-out edges link nodes that a training edge also links; "
                "this inflates all metrics"
            )
        held_out_pairs = Adjacency(torch.from_numpy(pair_keys(held_out.rows, self.num_nodes)), self.num_nodes)
        self.known = [neighbors.to(accelerator.device) for neighbors in (known or trained, held_out_pairs)]
        self.fixed: dict[str, Ranks] = {}  # ranks by embedding, for FIXED and random; filled in once

    def evaluate(self, embeddings: Embeddings, outputs: NodeOutputs) -> Table:
        """Return the evaluation table of a trained module.

        Args:
            embeddings: :meth:`mmgraph.models.multimodal_graph_encoder.TrainedModule.embeddings` of the module. The
                module must be in float32, on this process's device.
            outputs: tower outputs of the graph's nodes.
        """
        names = (*ALIGNED, *TRAINED, *(() if self.fixed else FIXED))
        shard = embed_shard(self.accelerator, embeddings, outputs, names)
        retrieval = self._retrieval(shard)
        ranks = {name: self.ranks(self._gathered(shard.pop(name))) for name in TRAINED}
        if not self.fixed:
            self.fixed = {name: self.ranks(self._gathered(shard.pop(name))) for name in FIXED}
            self.fixed["random"] = self.random_ranks()
        shuffled = embed_shard(
            self.accelerator, embeddings, outputs, ALIGNED, image_rows=derangement(self.num_nodes, self.seed)
        )
        return {
            **self.table({**ranks, **self.fixed}),
            "retrieval": retrieval,
            "retrieval_shuffled": self._retrieval(shuffled),
        }

    def _gathered(self, shard: torch.Tensor) -> torch.Tensor:
        return gather_shards(self.accelerator, shard, self.num_nodes)

    def ranks(self, vectors: torch.Tensor) -> Ranks:
        """Rank the held-out edges by the embeddings of all nodes, (N, d). Every process must pass all of them."""
        vectors = round_to_grid(vectors.to(self.accelerator.device))
        mine = rank_range(self.accelerator, len(self.rows))
        source, destination = self.rows[mine.start : mine.stop].to(vectors.device).T  # (m,) each
        ranks = [
            filtered_ranks(vectors, source, destination, self.known),
            filtered_ranks(vectors, destination, source, self.known),
            sampled_ranks(vectors, source, destination, mine.start, self.seed),
        ]
        gathered = np.concatenate(gather_object([torch.stack(ranks).cpu().numpy()]), axis=1)  # (3, M)
        return Ranks(gathered[:2], gathered[2])

    def random_ranks(self) -> Ranks:
        """Rank the held-out edges by random embeddings, as a baseline."""
        generator = torch.Generator().manual_seed(self.seed)
        return self.ranks(torch.randn(self.num_nodes, RANDOM_WIDTH, generator=generator))

    def table(self, ranks: Mapping[str, Ranks]) -> Table:
        """Return MRR and Hits of each embedding. If the held-out edges have relations, add the MRR of each relation."""
        present = np.unique(self.relations).tolist() if self.names else []
        return {
            "held_out": self.held_out,
            "nodes": self.num_nodes,
            "edges": len(self.rows),
            "embeddings": {name: summary(result.filtered) for name, result in ranks.items()},
            "sampled": {name: summary(result.sampled) for name, result in ranks.items()},
            "relations": {self.names[number]: _of_relation(ranks, self.relations == number) for number in present},
        }

    def _retrieval(self, shard: dict[str, torch.Tensor]) -> Table:
        """Measure how often a text retrieves the image that it was fused with.

        The texts and images are from all nodes that have both words and an image. Without such nodes, the result is
        empty.
        """
        z_text, z_vis = (round_to_grid(self._gathered(shard.pop(name))) for name in ALIGNED)
        rows = self._gathered(shard.pop("complete")).nonzero().flatten()  # (C,)
        if not len(rows):
            return {}
        drawn = np.sort(np.random.default_rng(self.seed).permutation(len(rows))[:MAX_TEXTS])
        mine = rank_range(self.accelerator, len(drawn))
        matches = torch.from_numpy(drawn[mine.start : mine.stop]).to(rows.device)
        ranks = matching_ranks(z_text[rows[matches]], z_vis[rows], matches)
        result = summary(np.concatenate(gather_object([ranks.cpu().numpy()])))
        return {"texts": len(drawn), "images": len(rows), "r@1": result["hits@1"], "r@10": result["hits@10"]}


def _of_relation(ranks: Mapping[str, Ranks], chosen: np.ndarray) -> Table:
    mrr = {name: summary(result.filtered[:, chosen])["mrr"] for name, result in ranks.items()}
    return {"edges": int(chosen.sum()), **mrr}


def derangement(count: int, seed: int) -> np.ndarray:
    """Return a random permutation of 0..count-1, without fixed points if ``count`` > 1. It depends only on the seed."""
    order = permuted(np.arange(count), count, seed, 0)
    image_rows = np.empty(count, dtype=np.int64)
    image_rows[order] = np.roll(order, 1)
    return image_rows


def one_line(table: Table) -> str:
    """Return the main figures of an evaluation as one line for the log."""
    embeddings = table["embeddings"]
    z_graph = embeddings["z_graph"]
    others = ", ".join(f"{name} {values['mrr']:.4f}" for name, values in embeddings.items() if name != "z_graph")
    line = f"MRR of z_graph {z_graph['mrr']:.4f} ({others}), Hits@10 {z_graph['hits@10']:.3f}"
    for name, text in (("retrieval", "text-to-image R@1"), ("retrieval_shuffled", "with shuffled images")):
        if table[name]:
            line += f", {text} {table[name]['r@1']:.0%}"
    return line


def metrics(table: Table) -> dict[str, float]:
    """Return an evaluation as metrics of a step, such as ``eval/z_graph/mrr``. The metrics by relation are left out."""
    values_by_name: dict[str, float] = {}
    for group, prefix in (("embeddings", "eval"), ("sampled", "eval_sampled")):
        for name, values in table[group].items():
            values_by_name |= {f"{prefix}/{name}/{metric}": value for metric, value in values.items()}
    for group in ("retrieval", "retrieval_shuffled"):
        values_by_name |= {f"eval/{group}/{metric}": table[group][metric] for metric in ("r@1", "r@10") if table[group]}
    return values_by_name
