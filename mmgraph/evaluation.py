"""What embeddings are worth on held-out edges, and whether texts and images were aligned; over all ranks."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather, gather_object

from mmgraph.errors import UserError
from mmgraph.held_out import HeldOut
from mmgraph.images import is_black
from mmgraph.neighbors import Neighbors, pair_keys
from mmgraph.node_outputs import BATCH, NodeOutputs
from mmgraph.order import permuted
from mmgraph.ranking import filtered_ranks, matching_ranks, on_grid, sampled_ranks, summary
from mmgraph.text_log import log
from mmgraph.towers import Tokens

TRAINED = ("z_graph", "fused")
FIXED = ("text_only", "image_only", "concat")  # what training does not change
RANDOM_WIDTH = 128
MOST_TEXTS = 10_000  # queries of the retrieval, drawn by the seed
NO_WORDS = 2  # tokens of a text without any: its beginning and its end

Table = dict[str, Any]
Embeddings = Callable[[Tokens, torch.Tensor, torch.Tensor], dict[str, torch.Tensor]]


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

    def __init__(self, accelerator: Accelerator, trained: Neighbors, held_out: HeldOut, seed: int):
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
        others = Neighbors(torch.from_numpy(pair_keys(held_out.rows, self.num_nodes)), self.num_nodes)
        self.known = [neighbors.to(accelerator.device) for neighbors in (trained, others)]
        self.fixed: dict[str, Ranks] = {}  # once they are known

    def evaluate(self, embeddings: Embeddings, outputs: NodeOutputs) -> Table:
        """The whole table of a trained module, which is in float32 on the device.

        Args:
            embeddings: :meth:`mmgraph.models.multimodal_graph_encoder.TrainedModule.embeddings` of the module.
            outputs: of the graph's nodes.
        """
        own = self.embed(embeddings, outputs, TRAINED if self.fixed else (*TRAINED, *FIXED))
        retrieval = self._retrieval(own)
        ranks = {name: self.ranks(self._of_all(own.pop(name))) for name in TRAINED}
        if not self.fixed:
            self.fixed = {name: self.ranks(self._of_all(own.pop(name))) for name in FIXED}
            self.fixed["random"] = self.random_ranks()
        shuffled = self.embed(embeddings, outputs, (), partners=cycle(self.num_nodes, self.seed))
        return {
            **self.table({**ranks, **self.fixed}),
            "retrieval": retrieval,
            "retrieval_shuffled": self._retrieval(shuffled),
        }

    def share(self, count: int, multiple: int = 1) -> range:
        """This rank's of ``count`` things, in parts of ``multiple``."""
        rank, size = self.accelerator.process_index, self._share_size(count, multiple)
        return range(min(count, size * rank), min(count, size * (rank + 1)))

    def _share_size(self, count: int, multiple: int) -> int:
        return -(-count // (multiple * self.accelerator.num_processes)) * multiple

    @torch.no_grad()
    def embed(
        self, embeddings: Embeddings, outputs: NodeOutputs, kinds: tuple[str, ...], partners: np.ndarray | None = None
    ) -> dict[str, torch.Tensor]:
        """Embeddings of this rank's share of the nodes, on the CPU.

        Args:
            kinds: names of embeddings, besides ``z_text`` and ``z_vis``.
            partners: as :meth:`NodeOutputs.of`.

        Returns:
            (n, d) each, and ``whole`` (n,) uint8, 1 for nodes with words and a picture.
        """
        rows, parts = self.share(self.num_nodes, BATCH), dict[str, list[torch.Tensor]]()
        for found in outputs.of([rows or range(1)], partners):  # a rank without nodes has to know the widths
            embedded = embeddings(found.tokens, found.text_only, found.image_only)
            has_words = (found.tokens.mask.sum(1) > NO_WORDS).cpu()
            has_picture = torch.from_numpy(~is_black(found.causes, outputs.inputs.truncated_images))
            parts.setdefault("whole", []).append((has_words & has_picture).to(torch.uint8))
            for name in ("z_text", "z_vis", *kinds):
                parts.setdefault(name, []).append(embedded[name].float().cpu())
        return {name: torch.cat(tensors)[: len(rows)] for name, tensors in parts.items()}

    def _of_all(self, own: torch.Tensor) -> torch.Tensor:
        """The shares of all ranks, whole on each, on the device, in the order of the nodes."""
        own = own.to(self.accelerator.device)
        if self.accelerator.num_processes == 1:
            return own
        padded = own.new_zeros((self._share_size(self.num_nodes, BATCH), *own.shape[1:]))
        padded[: len(own)] = own
        return gather(padded)[: self.num_nodes]

    def ranks(self, vectors: torch.Tensor) -> Ranks:
        """Of the held-out edges, by (N, d) embeddings that every rank has."""
        vectors = on_grid(vectors.to(self.accelerator.device))
        mine = self.share(len(self.rows))
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
        z_text, z_vis = (on_grid(self._of_all(own.pop(name))) for name in ("z_text", "z_vis"))
        whole = self._of_all(own.pop("whole")).nonzero().flatten()  # (C,)
        if not len(whole):
            return {}
        drawn = np.sort(np.random.default_rng(self.seed).permutation(len(whole))[:MOST_TEXTS])
        mine = self.share(len(drawn))
        matches = torch.from_numpy(drawn[mine.start : mine.stop]).to(whole.device)
        ranks = matching_ranks(z_text[whole[matches]], z_vis[whole], matches)
        found = summary(np.concatenate(gather_object([ranks.cpu().numpy()])))
        return {"texts": len(drawn), "images": len(whole), "r@1": found["hits@1"], "r@10": found["hits@10"]}


def _of_relation(ranks: Mapping[str, Ranks], chosen: np.ndarray) -> Table:
    mrr = {name: summary(of_kind.filtered[:, chosen])["mrr"] for name, of_kind in ranks.items()}
    return {"edges": int(chosen.sum()), **mrr}


def cycle(count: int, seed: int) -> np.ndarray:
    """A permutation of 0..count-1 by the seed that leaves nothing in its place (where there are two or more)."""
    order = permuted(np.arange(count), count, seed, 0)
    partners = np.empty(count, dtype=np.int64)
    partners[order] = np.roll(order, 1)
    return partners


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
