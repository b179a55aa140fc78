"""Baselines of ``bench study``: MLPs on one text and one image vector per node, and a DistMult."""

import dataclasses
import warnings
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from mmgraph.config import Config
from mmgraph.data.adjacency import Adjacency, pair_keys
from mmgraph.data.graph import Graph, load_graph
from mmgraph.data.input_rules import InputRules
from mmgraph.data.node_inputs import NodeInputs
from mmgraph.data.sampler import GlobalBatchSampler
from mmgraph.distributed.launch import build_accelerator
from mmgraph.errors import UserError
from mmgraph.evaluation.evaluator import Evaluation, Ranks, Table
from mmgraph.evaluation.ranking import filtered_ranks
from mmgraph.inference.node_outputs import NodeOutputs
from mmgraph.losses.contrastive import BatchNodes, contrastive_losses
from mmgraph.losses.negative_mask import build_false_negatives
from mmgraph.towers.cached import load_content_hashes, open_store
from mmgraph.towers.fingerprint import towers_fingerprint
from mmgraph.towers.load import load_tokenizer_and_processor, read_tower_state
from mmgraph.training.lr_schedule import lr_at

DISTMULT_WIDTH, DISTMULT_EPOCHS, DISTMULT_BATCH, DISTMULT_RATE = 256, 100, 1024, 0.01


def check_baselines(config: Config, graph: Graph) -> None:
    """Check that the baselines can be trained. ``bench study`` calls this before its first run.

    Raises:
        UserError: PyTorch Geometric is not installed, an edge table has no relations, or a held-out relation does not
            occur in training.
    """
    _distmult()
    held_out = graph.held_out
    if graph.relations is None or held_out is None or held_out.relations is None:
        raise UserError(
            "bench study trains a DistMult on relations, so --edges and --eval_edges both need a rel_id column"
        )
    unknown = sorted({*held_out.names} - {*graph.relation_names})
    if unknown:
        raise UserError(
            f"{config.eval_edges}: relation '{unknown[0]}' is not in {config.edges}, so DistMult cannot learn it"
        )


def _distmult() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            from torch_geometric.nn.kge import DistMult
        except ImportError:
            raise UserError("bench study needs PyTorch Geometric; run pip install 'mmgraph[study]'") from None
    return DistMult


class ConcatMLP(nn.Module):
    """The encoder without cross-attention: an MLP on one text vector and one image vector per node.

    It has the same heads as the encoder. In total, it has about as many parameters as the encoder's fusion and heads.

    Args:
        d_text: width of a text vector.
        d_vis: width of an image vector.
        fused_dim: width of ``fused``.
        proj_dim: width of the ``z_`` embeddings.
    """

    def __init__(self, d_text: int, d_vis: int, fused_dim: int, proj_dim: int):
        super().__init__()
        hidden = 4 * fused_dim
        self.text, self.vis = nn.Linear(d_text, fused_dim), nn.Linear(d_vis, fused_dim)
        self.mlp = nn.Sequential(
            nn.Linear(d_text + d_vis, hidden), nn.LayerNorm(hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU(),
            nn.Linear(hidden, fused_dim),
        )  # fmt: skip
        self.graph_proj, self.text_proj, self.vis_proj = (nn.Linear(fused_dim, proj_dim) for _ in range(3))

    def forward(self, text: torch.Tensor, vis: torch.Tensor) -> dict[str, torch.Tensor]:
        """Embed n nodes.

        Args:
            text: (n, d_text) text vectors.
            vis: (n, d_vis) image vectors.

        Returns:
            ``z_graph``, ``z_text`` and ``z_vis``, (n, proj_dim) each, and ``fused``, (n, fused_dim).
        """
        fused = self.mlp(torch.cat([text, vis], dim=1))
        return {
            "z_graph": F.normalize(self.graph_proj(fused), dim=1),
            "z_text": F.normalize(self.text_proj(self.text(text)), dim=1),
            "z_vis": F.normalize(self.vis_proj(self.vis(vis)), dim=1),
            "fused": fused,
        }


class Baselines:
    """Trains and evaluates the baselines in this process. The tower outputs are read from a tower store.

    Args:
        config: settings of the runs that the baselines are compared with.

    Raises:
        UserError: the graph or the towers cannot be loaded, or the held-out edges or the tower store are missing.
    """

    def __init__(self, config: Config):
        self.config = config
        self.accelerator, self.graph = build_accelerator(config.collective_timeout), load_graph(config)
        graph, held_out = self.graph, self.graph.held_out
        inputs = NodeInputs(*load_tokenizer_and_processor(config.model_name), 0, InputRules.of(config))
        self.content_hashes = load_content_hashes(config, self.accelerator, graph)
        towers = towers_fingerprint(read_tower_state(config.model_name))
        source = open_store(config, self.accelerator, graph, self.content_hashes, inputs, towers, planned_nodes=2**62)
        if source is None or held_out is None:
            raise UserError("bench study needs held-out edges (--eval_edges) and a tower store (--tower_cache)")
        self.neighbors = Adjacency(torch.from_numpy(pair_keys(graph.rows, len(graph.nodes))), len(graph.nodes))
        self.evaluation = Evaluation(self.accelerator, self.neighbors, held_out, config.seed)
        outputs = NodeOutputs(graph.nodes, graph.images, inputs, source, 0, config.collective_timeout)
        pooled = [(o.tokens.text_pooled, o.tokens.image_pooled) for o in outputs.of([range(len(graph.nodes))])]
        self.text_only, self.image_only = map(torch.cat, zip(*pooled, strict=True))  # (N, d_text), (N, d_vis)

    def mlp(self, source: str, batch_size: int, false_negatives: Any, seed: int) -> Table:
        """Train a :class:`ConcatMLP` with the losses, the edge order and the optimizer of a run, and evaluate it.

        Args:
            source: the vectors of the nodes. ``concat``: the pooled outputs of both towers. ``text_only`` or
                ``image_only``: the pooled outputs of one tower, and zeros for the other. ``random``: random numbers,
                which only tell the nodes apart.
            batch_size: edges per step.
            false_negatives: value of ``--false_negatives``.
            seed: seed of the weights, the random vectors and the edge order.
        """
        config, device = self.config, self.accelerator.device
        chosen = dataclasses.replace(config, false_negatives=false_negatives, missing_image="black")
        masks = build_false_negatives(chosen, len(self.graph.nodes), self.content_hashes, self.neighbors, device)
        torch.manual_seed(seed)
        text, vis = self._vectors(source)
        model = ConcatMLP(text.shape[1], vis.shape[1], config.fused_dim, config.proj_dim).to(device)
        optimizer = torch.optim.AdamW(model.parameters(), config.learning_rate, weight_decay=config.weight_decay)
        sampler = GlobalBatchSampler(len(self.graph.rows), batch_size, seed)
        step, total_steps = 0, config.epochs * len(sampler)
        for epoch in range(1, config.epochs + 1):
            sampler.begin(epoch)
            for edges in sampler:
                rows = torch.from_numpy(self.graph.rows[np.array(edges)].T.reshape(-1)).to(device)  # (2B,)
                z = model(text[rows], vis[rows])
                nodes = BatchNodes(rows, torch.zeros(len(rows), dtype=torch.bool, device=device))
                losses = contrastive_losses(
                    z["z_graph"], z["z_text"], z["z_vis"], config.temperature, config.graph_loss_weight, masks, nodes
                )
                step += 1
                optimizer.param_groups[0]["lr"] = lr_at(step, config, total_steps)
                optimizer.zero_grad(set_to_none=True)
                losses.total.backward()
                optimizer.step()
        with torch.no_grad():
            embeddings = model(text, vis)
        return self.evaluation.table({name: self.evaluation.ranks(embeddings[name]) for name in ("z_graph", "fused")})

    def _vectors(self, source: str) -> tuple[torch.Tensor, torch.Tensor]:
        text, vis = self.text_only, self.image_only
        if source == "random":
            return torch.randn_like(text), torch.randn_like(vis)
        zeros = {"text_only": (text, torch.zeros_like(vis)), "image_only": (torch.zeros_like(text), vis)}
        return zeros.get(source, (text, vis))

    def distmult(self, seed: int) -> Table:
        """Train PyTorch Geometric's DistMult (Yang et al., 2015) on the training edges, and evaluate it.

        The held-out edges are ranked by DistMult's scores instead of cosine similarities. Unlike the encoder, DistMult
        gets the relation of each edge in training and in ranking, but no texts or images.
        """
        distmult = _distmult()
        triples, names = self._triples()
        torch.manual_seed(seed)
        model = distmult(len(self.graph.nodes), len(names), DISTMULT_WIDTH)
        optimizer = torch.optim.Adam(model.parameters(), DISTMULT_RATE)
        for _ in range(DISTMULT_EPOCHS):
            for batch in torch.randperm(len(triples)).split(DISTMULT_BATCH):
                optimizer.zero_grad(set_to_none=True)
                model.loss(*triples[batch].T).backward()
                optimizer.step()
        return self._rank_distmult(model, names)

    def _triples(self) -> tuple[torch.Tensor, list[str]]:
        """Return source, relation and destination of each training edge, (E, 3), and the names of the relations."""
        graph, indices = self.graph, np.arange(len(self.graph.rows))
        assert graph.relations is not None
        ends, relations = graph.rows[indices], graph.relations[indices]
        return torch.from_numpy(np.stack([ends[:, 0], relations, ends[:, 1]], axis=1)), list(graph.relation_names)

    def _rank_distmult(self, model: Any, names: list[str]) -> Table:
        numbers = {name: number for number, name in enumerate(names)}
        edge_relations = [numbers[self.evaluation.names[number]] for number in self.evaluation.relations]
        device = self.accelerator.device
        nodes, relations = (layer.weight.detach().to(device) for layer in (model.node_emb, model.rel_emb))
        relations, ends = relations[edge_relations], self.evaluation.rows.T.to(device)
        ranks = [
            filtered_ranks(nodes, ends[a], ends[b], self.evaluation.known, nodes[ends[a]] * relations)
            for a, b in ((0, 1), (1, 0))
        ]
        filtered = torch.stack(ranks).cpu().numpy()
        return self.evaluation.table({"z_graph": Ranks(filtered, filtered[0])})
