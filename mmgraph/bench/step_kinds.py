"""The kinds of step that ``bench step`` compares: the original trainer's, live towers, and stored tokens."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.utils import send_to_device
from torch import nn

from mmgraph.config import Config
from mmgraph.data.batches import BatchCollator, EdgeCollator, EdgeRows
from mmgraph.data.content_hashes import ContentHashes, read_content_hashes
from mmgraph.data.graph import Graph
from mmgraph.data.input_rules import InputRules
from mmgraph.data.node_inputs import NodeInputs
from mmgraph.errors import UserError
from mmgraph.loader.multimodal_collator import MultimodalCollator
from mmgraph.losses.contrastive import contrastive_losses, info_nce_loss
from mmgraph.models.multimodal_graph_encoder import TrainedModule
from mmgraph.towers.cached import CachedTowers
from mmgraph.towers.clip import tower_state
from mmgraph.towers.fingerprint import towers_fingerprint
from mmgraph.towers.live import LiveTowers, run_towers
from mmgraph.towers.load import load_tokenizer_and_processor
from mmgraph.towers.store import TowerStore
from mmgraph.towers.store_builder import build
from mmgraph.towers.store_plan import cost, missing_shards, recipe, refusal
from mmgraph.towers.token_source import TokenSource
from mmgraph.towers.tokens import Tokens, Towers
from mmgraph.utils.files import cache_folder

VARIANTS = ("plain", "live", "stored")  # "plain" is the step of the original trainer
PHASES = ("data", "towers", "forward", "backward", "optimizer")


class PlainModule(nn.Module):
    """Computes fusion and heads as the original trainer does, with the parameters of a :class:`TrainedModule`.

    Attention is computed by ``nn.MultiheadAttention.forward``, and every layer is applied to every token.
    """

    def __init__(self, trained: TrainedModule):
        super().__init__()
        self.trained = trained

    def forward(self, text: torch.Tensor, mask: torch.Tensor, patches: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Embed N nodes.

        Args:
            text: (N, L, d_text), L text tokens per node.
            mask: (N, L), 1 for text tokens, 0 for padding.
            patches: (N, P, d_vis), P image tokens per node.

        Returns:
            ``z_graph``, ``z_text``, ``z_vis``, each (N, proj_dim).
        """
        fusion = self.trained.fusion
        text, patches = fusion.text_proj(text), fusion.vis_proj(patches)
        attend = nn.MultiheadAttention.forward
        to_vis, _ = attend(fusion.text2vis_attn, text, patches, patches, need_weights=False)
        to_text, _ = attend(fusion.vis2text_attn, patches, text, text, key_padding_mask=mask == 0, need_weights=False)
        text, vis = fusion.text_ffn(to_vis + text), fusion.vis_ffn(to_text + patches)
        weights = mask[:, :, None].to(text.dtype)
        text_pool = (text * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)
        vis_pool = vis.mean(dim=1)
        fused = fusion.fusion_mlp(torch.cat([text_pool, vis_pool], dim=-1))
        heads = (self.trained.graph_proj, self.trained.text_proj, self.trained.vis_proj)
        return tuple(
            F.normalize(head(x).float(), dim=-1) for head, x in zip(heads, (fused, text_pool, vis_pool), strict=True)
        )


def plain_loss(z_graph: torch.Tensor, z_text: torch.Tensor, z_vis: torch.Tensor, temperature: float) -> torch.Tensor:
    """Compute the loss as the original trainer does: from complete matrices of logits. All z are (2b, proj_dim)."""
    edges = len(z_graph) // 2
    loss = info_nce_loss(z_text @ z_vis.T / temperature)
    return loss + info_nce_loss(z_graph[:edges] @ z_graph[edges:].T / temperature)


class PlainCollator:
    """Collates edges into tower inputs as the original trainer does: both ends of each edge, also repeated nodes.

    Args:
        graph: the graph of the edges.
        collator: the original trainer's collator.
    """

    def __init__(self, graph: Graph, collator: MultimodalCollator):
        self.graph, self.collator = graph, collator

    def __call__(self, edges: Sequence[tuple[int, int, int]]) -> dict[str, torch.Tensor]:
        return self.collator([(self._node(source), self._node(destination)) for _, source, destination in edges])

    def _node(self, row: int) -> dict[str, Any]:
        node = self.graph.nodes[row]
        return {**node, "image_path": self.graph.images.locate(node)}


class Steps:
    """Runs the three variants of a step on the same batches, in one precision.

    Each variant has its own parameters and optimizer.

    Args:
        config: settings of a run.
        accelerator: the Accelerator of this launch.
        graph: the graph to train on.
        batches: indices of the edges in each batch.
        towers: towers of the live and the plain step. Several precisions may share them.
        dtype: dtype of the computation. A 16-bit dtype is applied by autocast.
    """

    def __init__(
        self,
        config: Config,
        accelerator: Accelerator,
        graph: Graph,
        batches: list[list[int]],
        towers: Towers,
        dtype: torch.dtype,
    ):
        self.config, self.accelerator, self.graph, self.dtype = config, accelerator, graph, dtype
        self.edges = [EdgeRows(graph.rows).__getitems__(batch) for batch in batches]
        tokenizer, processor = load_tokenizer_and_processor(config.model_name)
        self.inputs = NodeInputs(tokenizer, processor, config.cache_size, InputRules.of(config))
        self.plain_collator = PlainCollator(
            graph, MultimodalCollator(tokenizer, processor, config.cache_size, rules=self.inputs.rules)
        )
        self.live_collator = BatchCollator(graph.nodes, graph.images, self.inputs)
        self.live = LiveTowers(towers, self.inputs.preprocessing, accelerator.device, dtype)
        self.modules, self.optimizers = {}, {}
        for variant in VARIANTS:
            torch.manual_seed(config.seed)
            module = TrainedModule(*towers.widths, config.fused_dim, config.proj_dim).to(accelerator.device)
            self.modules[variant] = module
            self.optimizers[variant] = torch.optim.AdamW(
                module.parameters(), lr=config.learning_rate, weight_decay=config.weight_decay, fused=variant != "plain"
            )

    def prepare_store(self, folder: Path, precision: str) -> None:
        """Open the tower store that a run in this precision would use.

        If this store lacks a node, build another store in ``folder``, with the nodes of the batches.

        Args:
            folder: folder of the store to build, if necessary.
            precision: the precision in Accelerate's terms, such as ``no`` or ``bf16``.

        Raises:
            UserError: the store cannot be built in ``folder``.
        """
        config, graph, accelerator = self.config, self.graph, self.accelerator
        content_hashes = read_content_hashes(
            graph.nodes,
            graph.images,
            config.nodes,
            graph.nodes_fingerprint,
            self.inputs.rules,
            cache_folder(config.nodes),
            accelerator,
        )
        store_recipe = recipe(config, precision, self.inputs, towers_fingerprint(tower_state(self.live.towers)))
        # Number of texts and images in a store of all nodes.
        self.entries = sum(len(shard.rows) for shard in missing_shards(TowerStore(folder), content_hashes))
        store, self.build_seconds = TowerStore(store_recipe.folder), float("nan")
        shards = missing_shards(store, content_hashes)
        if shards:
            rows = np.unique([ends for batch in self.edges for _, *ends in batch])
            shards = missing_shards(TowerStore(folder), content_hashes, rows)
            store_recipe = store_recipe._replace(folder=folder)
            expected = cost(config, store_recipe, graph, self.inputs, shards)
            if (reason := refusal(folder, expected.bytes)) is not None:
                raise UserError(reason)
            start = time.perf_counter()
            build(config, accelerator, graph, self.inputs, store_recipe, shards, expected)
            self.build_seconds = (time.perf_counter() - start) * self.entries / sum(len(shard.rows) for shard in shards)
            store = TowerStore(folder)
            measured = np.isin(np.arange(len(graph.nodes)), rows)
            # The store lacks all other nodes. No step reads them, so they get the hashes of a node that the store has.
            content_hashes = ContentHashes(*(np.where(measured, hashes, hashes[rows[0]]) for hashes in content_hashes))
        self.stored = CachedTowers(
            store, content_hashes, accelerator.device, resident=accelerator.device.type == "cuda"
        )
        edges = EdgeCollator()
        self.stored_batches = self.stored.batches(self._to_device(edges(items)) for items in self._endless())

    def _endless(self) -> Iterator[list[Any]]:
        while True:
            yield from self.edges

    def _to_device(self, batch: Any) -> Any:
        return send_to_device(batch, self.accelerator.device)

    def step(self, variant: str, number: int) -> dict[str, float]:
        """Run and measure one step.

        Args:
            variant: one of :data:`VARIANTS`.
            number: index of the batch.

        Returns:
            Seconds of each phase. In the phase ``data``, the step waits for its batch.
        """
        clock = Clock(self.accelerator.device)
        embed = self._plain(number, clock) if variant == "plain" else self._unique(variant, number, clock)
        with self._autocast():
            z_graph, z_text, z_vis = embed()
        temperature = self.config.temperature
        if variant == "plain":
            loss = plain_loss(z_graph, z_text, z_vis, temperature)
        else:
            loss = contrastive_losses(z_graph, z_text, z_vis, temperature, 1.0).total
        clock.done("forward")
        self.optimizers[variant].zero_grad(set_to_none=True)
        loss.backward()
        clock.done("backward")
        self.optimizers[variant].step()
        clock.done("optimizer")
        return clock.seconds

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.accelerator.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _plain(self, number: int, clock: "Clock") -> Callable[[], tuple[torch.Tensor, ...]]:
        inputs = self._to_device(self.plain_collator(self._edges(number)))
        clock.done("data")
        with torch.no_grad(), self._autocast():
            tokens = run_towers(self.live.towers, **inputs)
        clock.done("towers")
        return lambda: PlainModule(self.modules["plain"])(*tokens[:3])

    def _unique(self, variant: str, number: int, clock: "Clock") -> Callable[[], tuple[torch.Tensor, ...]]:
        source: TokenSource = self.stored if variant == "stored" else self.live
        if variant == "stored":
            batch = next(self.stored_batches)
        else:
            batch = self._to_device(self.live_collator(self._edges(number)))
        clock.done("data")
        tokens: Tokens = source.tokens(batch)
        clock.done("towers")
        module = self.modules[variant]
        return lambda: tuple(z.index_select(0, batch.inverse) for z in module(tokens))

    def _edges(self, number: int) -> list[Any]:
        return self.edges[number % len(self.edges)]


class Clock:
    """Measures the seconds of each phase.

    At the end of a phase, the clock waits for the device, so that no work of this phase counts for the next one.
    """

    def __init__(self, device: torch.device):
        self.device, self.seconds = device, dict.fromkeys(PHASES, 0.0)
        self.last = self._now()

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def done(self, phase: str) -> None:
        """Add the time since the end of the previous phase to ``phase``. The first phase starts with the clock."""
        now = self._now()
        self.seconds[phase] += now - self.last
        self.last = now
