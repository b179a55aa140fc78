"""What embeddings are worth on held-out edges, and whether texts and images were aligned; over all ranks."""

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
ALIGNED = ("z_text", "z_vis")  # what the text-image loss compares
FIXED = ("text_only", "image_only", "concat")  # what training does not change
RANDOM_WIDTH = 128
MAX_TEXTS = 10_000  # queries of the retrieval, drawn by the seed

Table = dict[str, Any]


class Ranks(NamedTuple):
    """Of one kind of embeddings, for M held-out edges."""

    filtered: np.ndarray  # (2, M): of destinations by similarity to their sources, and of sources to destinations
    sampled: np.ndarray  # (M,): of destinations among 100 random nodes


class Evaluation:
    """Ranks held-out edges by the nodes' embeddings. Everything is called by all ranks.

    Each held-out edge asks twice: for its destination among all nodes, by similarity to its source, and the other way.
    The query and its other neighbours, of any relation and direction, in training or held out, are no candidates. A
    self-loop asks nothing, and what the table has twice asks once. Every rank has all embeddings of one kind at a time,
    O(nodes x dim), and ranks its share of the queries.

    Args:
        accelerator: of the run.
        trained: the edges that are trained on.
        held_out: edges to rank.
        seed: of random embeddings, drawn negatives, and the shuffled images.

    Raises:
        UserError: nothing is held out but self-loops.
    """

    def __init__(self, accelerator: Accelerator, trained: Adjacency, held_out: HeldOut, seed: int):
        self.accelerator, self.num_nodes, self.seed = accelerator, trained.num_nodes, seed
        self.names, self.held_out = held_out.names, held_out.fingerprint
        relations = np.zeros(len(held_out.rows), np.int64) if held_out.relations is None else held_out.relations
        asking = np.unique(np.column_stack([held_out.rows, relations]), axis=0)
        asking = asking[asking[:, 0] != asking[:, 1]]
        if not len(asking):
            raise UserError("no held-out edge links two nodes: there is nothing to evaluate on")
        self.rows, self.relations = torch.from_numpy(asking[:, :2]), asking[:, 2]  # (M, 2), (M,)
        leaked = trained.count(self.rows.to(trained.keys.device))
        if leaked:
            log(
                f"warning: {leaked:,} of {len(asking):,} held-out edges link nodes that are also linked in training, "
                "which flatters every figure"
            )
        others = Adjacency(torch.from_numpy(pair_keys(held_out.rows, self.num_nodes)), self.num_nodes)
        self.known = [neighbors.to(accelerator.device) for neighbors in (trained, others)]
        self.fixed: dict[str, Ranks] = {}  # once they are known

    def evaluate(self, embeddings: Embeddings, outputs: NodeOutputs) -> Table:
        """The whole table of a trained module, which is in float32 on the device.

        Args:
            embeddings: :meth:`mmgraph.models.multimodal_graph_encoder.TrainedModule.embeddings` of the module.
            outputs: of the graph's nodes.
        """
        kinds = (*ALIGNED, *TRAINED, *(() if self.fixed else FIXED))
        own = embed_shard(self.accelerator, embeddings, outputs, kinds)
        retrieval = self._retrieval(own)
        ranks = {name: self.ranks(self._gathered(own.pop(name))) for name in TRAINED}
        if not self.fixed:
            self.fixed = {name: self.ranks(self._gathered(own.pop(name))) for name in FIXED}
            self.fixed["random"] = self.random_ranks()
        shuffled = embed_shard(
            self.accelerator, embeddings, outputs, ALIGNED, image_rows=derangement(self.num_nodes, self.seed)
        )
        return {
            **self.table({**ranks, **self.fixed}),
            "retrieval": retrieval,
            "retrieval_shuffled": self._retrieval(shuffled),
        }

    def _gathered(self, own: torch.Tensor) -> torch.Tensor:
        return gather_shards(self.accelerator, own, self.num_nodes)

    def ranks(self, vectors: torch.Tensor) -> Ranks:
        """Of the held-out edges, by (N, d) embeddings that every rank has."""
        vectors = round_to_grid(vectors.to(self.accelerator.device))
        mine = rank_range(self.accelerator, len(self.rows))
        source, destination = self.rows[mine.start : mine.stop].to(vectors.device).T  # (m,) each
        found = [
            filtered_ranks(vectors, source, destination, self.known),
            filtered_ranks(vectors, destination, source, self.known),
            sampled_ranks(vectors, source, destination, mine.start, self.seed),
        ]
        whole = np.concatenate(gather_object([torch.stack(found).cpu().numpy()]), axis=1)  # (3, M)
        return Ranks(whole[:2], whole[2])

    def random_ranks(self) -> Ranks:
        """Of random embeddings: the floor."""
        generator = torch.Generator().manual_seed(self.seed)
        return self.ranks(torch.randn(self.num_nodes, RANDOM_WIDTH, generator=generator))

    def table(self, ranks: Mapping[str, Ranks]) -> Table:
        """MRR and Hits of kinds of embeddings; the MRR by relation where the held-out edges have some."""
        present = np.unique(self.relations).tolist() if self.names else []
        return {
            "held_out": self.held_out,
            "nodes": self.num_nodes,
            "edges": len(self.rows),
            "embeddings": {name: summary(of_kind.filtered) for name, of_kind in ranks.items()},
            "sampled": {name: summary(of_kind.sampled) for name, of_kind in ranks.items()},
            "relations": {self.names[number]: _of_relation(ranks, self.relations == number) for number in present},
        }

    def _retrieval(self, own: dict[str, torch.Tensor]) -> Table:
        """How often a text finds, among the images of all nodes that have both, the one that it was fused with."""
        z_text, z_vis = (round_to_grid(self._gathered(own.pop(name))) for name in ALIGNED)
        whole = self._gathered(own.pop("whole")).nonzero().flatten()  # (C,)
        if not len(whole):
            return {}
        drawn = np.sort(np.random.default_rng(self.seed).permutation(len(whole))[:MAX_TEXTS])
        mine = rank_range(self.accelerator, len(drawn))
        matches = torch.from_numpy(drawn[mine.start : mine.stop]).to(whole.device)
        ranks = matching_ranks(z_text[whole[matches]], z_vis[whole], matches)
        found = summary(np.concatenate(gather_object([ranks.cpu().numpy()])))
        return {"texts": len(drawn), "images": len(whole), "r@1": found["hits@1"], "r@10": found["hits@10"]}


def _of_relation(ranks: Mapping[str, Ranks], chosen: np.ndarray) -> Table:
    mrr = {name: summary(of_kind.filtered[:, chosen])["mrr"] for name, of_kind in ranks.items()}
    return {"edges": int(chosen.sum()), **mrr}


def derangement(count: int, seed: int) -> np.ndarray:
    """A permutation of 0..count-1 by the seed that leaves nothing in its place (where there are two or more)."""
    order = permuted(np.arange(count), count, seed, 0)
    image_rows = np.empty(count, dtype=np.int64)
    image_rows[order] = np.roll(order, 1)
    return image_rows


def one_line(table: Table) -> str:
    """An evaluation in short, for the log."""
    embeddings = table["embeddings"]
    z_graph = embeddings["z_graph"]
    others = ", ".join(f"{name} {values['mrr']:.4f}" for name, values in embeddings.items() if name != "z_graph")
    line = f"MRR of z_graph {z_graph['mrr']:.4f} ({others}), Hits@10 {z_graph['hits@10']:.3f}"
    for name, text in (
        ("retrieval", "; a text finds the image it was fused with"),
        ("retrieval_shuffled", ", if that is another node's"),
    ):
        if table[name]:
            line += f"{text} {table[name]['r@1']:.0%}"
    return line


def metrics(table: Table) -> dict[str, float]:
    """An evaluation as a step's metrics: ``eval/z_graph/mrr`` and the like, without relations."""
    found: dict[str, float] = {}
    for group, prefix in (("embeddings", "eval"), ("sampled", "eval_sampled")):
        for name, values in table[group].items():
            found |= {f"{prefix}/{name}/{metric}": value for metric, value in values.items()}
    for group in ("retrieval", "retrieval_shuffled"):
        found |= {f"eval/{group}/{metric}": table[group][metric] for metric in ("r@1", "r@10") if table[group]}
    return found
