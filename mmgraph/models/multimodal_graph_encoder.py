"""The encoder (towers, fusion and heads), and its trained part (fusion and heads)."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from mmgraph.models.cross_attention_fusion import CrossAttentionFusion
from mmgraph.towers.clip import TOWER_NAMES, file_key
from mmgraph.towers.live import run_towers
from mmgraph.towers.load import load_towers
from mmgraph.towers.tokens import Tokens, Towers


class TrainedModule(nn.Module):
    """The fusion and the projection heads, which are the only trained parameters.

    The optimizer updates this module, Accelerate wraps it, and resume states contain its weights. Its 32 parameter
    tensors are in the order of the original trainer's optimizer.

    Args:
        d_text, d_vis: widths of the towers' tokens.
        fused_dim: width of the fusion.
        proj_dim: width of the projections.
    """

    def __init__(self, d_text: int, d_vis: int, fused_dim: int, proj_dim: int):
        super().__init__()
        self._build(d_text, d_vis, fused_dim, proj_dim)

    @classmethod
    def from_weights(cls, weights: Mapping[str, torch.Tensor]) -> "TrainedModule":
        """Build a frozen module in eval mode that uses the given tensors without copies. Tower tensors are ignored."""
        widths = weights["fusion.text_proj.weight"].shape[1], weights["fusion.vis_proj.weight"].shape[1]
        with torch.device("meta"):
            module = TrainedModule(*widths, *weights["graph_proj.weight"].shape[::-1])
        module.load_state_dict({name: weights[name] for name in module.state_dict()}, assign=True)
        return module.requires_grad_(False).eval()

    def _build(self, d_text: int, d_vis: int, fused_dim: int, proj_dim: int) -> None:
        self.fusion = CrossAttentionFusion(d_text, d_vis, fused_dim)
        self.graph_proj = nn.Linear(fused_dim, proj_dim)
        self.text_proj = nn.Linear(fused_dim, proj_dim)
        self.vis_proj = nn.Linear(fused_dim, proj_dim)

    def forward(self, tokens: Tokens, micro_batches: int = 1) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embed nodes.

        Args:
            tokens: tokens of U nodes; in training, the unique nodes of a batch.
            micro_batches: number of parts in which the nodes are embedded. With more than one part, the activations
                of each part are dropped and recomputed in the backward pass (Chen et al., 2016). Memory then contains
                the activations of only one part at a time, while the loss is over all nodes. The effect is that of
                GradCache (Gao et al., 2021), but with a single backward pass and one reduction of gradients. The
                argument is the number of parts, not their size: under ZeRO-3 each part runs collectives, so all ranks
                must run an equal number of parts, although U differs between ranks.

        Returns:
            ``z_graph``, ``z_text``, ``z_vis``, each (U, proj_dim), float32, rows of unit length.
        """
        dtype = self.graph_proj.weight.dtype  # bf16 or fp16 under DeepSpeed
        if torch.is_autocast_enabled(tokens.text.device.type):
            # Cast to autocast's dtype directly, not through float32.
            dtype = torch.get_autocast_dtype(tokens.text.device.type)
        inputs = (tokens.text.to(dtype), tokens.text_mask, tokens.patches.to(dtype))
        if micro_batches == 1:
            return self._embed(*inputs)
        nodes = len(tokens.text)
        if nodes < micro_batches:  # attention does not accept an empty part, so repeat the last node
            indices = torch.arange(micro_batches, device=tokens.text.device).clamp(max=nodes - 1)
            inputs = (inputs[0][indices], inputs[1][indices], inputs[2][indices])
        parts = zip(*(tensor.tensor_split(micro_batches) for tensor in inputs), strict=True)
        embedded = [checkpoint(self._embed, *part, use_reentrant=False, preserve_rng_state=False) for part in parts]
        return tuple(torch.cat(z)[:nodes] for z in zip(*embedded, strict=True))  # type: ignore[return-value]

    def _embed(
        self, text: torch.Tensor, mask: torch.Tensor, patches: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return self._project(*self.fusion(text, mask, patches))

    def _project(
        self, fused: torch.Tensor, text_pool: torch.Tensor, vis_pool: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return (
            F.normalize(self.graph_proj(fused).float(), dim=-1),  # (U, fused_dim) -> (U, proj_dim)
            F.normalize(self.text_proj(text_pool).float(), dim=-1),
            F.normalize(self.vis_proj(vis_pool).float(), dim=-1),
        )

    def embeddings(self, tokens: Tokens) -> dict[str, torch.Tensor]:
        """Return all embeddings of U nodes, by name.

        Args:
            tokens: tokens of the U nodes, with the towers' pooled outputs.

        Returns:
            ``z_graph``, ``z_text``, ``z_vis``, as in :meth:`forward`; ``fused`` (U, fused_dim); ``text_only``
            (U, d_text) and ``image_only`` (U, d_vis), the towers' pooled outputs; ``concat`` (U, d_text + d_vis), these
            two concatenated.
        """
        assert tokens.text_pooled is not None and tokens.image_pooled is not None
        dtype = self.graph_proj.weight.dtype  # cast, because a tower store may have 16-bit tokens
        pooled = self.fusion(tokens.text.to(dtype), tokens.text_mask, tokens.patches.to(dtype))
        return {
            **dict(zip(("z_graph", "z_text", "z_vis"), self._project(*pooled), strict=True)),
            "fused": pooled[0],
            "text_only": tokens.text_pooled,
            "image_only": tokens.image_pooled,
            "concat": torch.cat([tokens.text_pooled, tokens.image_pooled], dim=-1),
        }


class MultimodalGraphEncoder(TrainedModule):
    """The complete encoder (frozen towers, fusion and heads), for users and inference.

    With any version of transformers, its ``state_dict`` has the keys and the order of the original trainer:
    ``text_model.text_model.…``, ``vision_model.vision_model.…``, then fusion and heads. ``load_state_dict`` also
    accepts tower keys that start with the tower's name once (``text_model.…``), and ignores ``position_ids``, which old
    versions of transformers store.

    Args:
        clip_name: CLIP model of the towers, a hub name or a folder. The towers are frozen.
        fused_dim: width of the fusion.
        proj_dim: width of the projections.
    """

    def __init__(self, clip_name: str, fused_dim: int, proj_dim: int):
        nn.Module.__init__(self)
        self._assemble(load_towers(clip_name), fused_dim, proj_dim)

    @classmethod
    def from_towers(cls, towers: Towers, fused_dim: int, proj_dim: int) -> "MultimodalGraphEncoder":
        """Build an encoder from towers that are already in memory."""
        encoder = cls.__new__(cls)
        nn.Module.__init__(encoder)
        encoder._assemble(towers, fused_dim, proj_dim)
        return encoder

    def _assemble(self, towers: Towers, fused_dim: int, proj_dim: int) -> None:
        self.text_model, self.vision_model = towers.text_model, towers.vision_model
        self._tower_types = type(towers.text), type(towers.image)
        self._build(*towers.widths, fused_dim, proj_dim)
        self.register_state_dict_post_hook(_use_file_keys)
        self.register_load_state_dict_pre_hook(_use_module_keys)

    def forward(  # type: ignore[override]
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pixel_values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embed B nodes.

        Args:
            input_ids: (B, L) int64.
            attention_mask: (B, L), 1 at valid tokens.
            pixel_values: (B, 3, S, S) float32, normalized.

        Returns:
            ``z_graph``, ``z_text``, ``z_vis``, each (B, proj_dim), rows of unit length.
        """
        with torch.no_grad():
            tokens = run_towers(self.towers, input_ids, attention_mask, pixel_values)
        return super().forward(tokens)

    @torch.no_grad()
    def encode(
        self, input_ids: torch.Tensor, attention_mask: torch.Tensor, pixel_values: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """Return features of B nodes. The arguments are those of :meth:`forward`.

        Returns:
            ``fused`` (B, fused_dim); ``text_only`` (B, d_text) and ``image_only`` (B, d_vis), the towers' pooled
            outputs; ``concat`` (B, d_text + d_vis), these two concatenated.
        """
        embeddings = self.embeddings(run_towers(self.towers, input_ids, attention_mask, pixel_values))
        return {name: embeddings[name] for name in ("fused", "text_only", "image_only", "concat")}

    def get_trainable_parameters(self) -> list[nn.Parameter]:
        """Return the 32 parameter tensors of fusion and heads, in the order of the optimizer."""
        return [p for name, p in self.named_parameters() if not name.startswith(TOWER_NAMES)]

    def train(self, mode: bool = True) -> "MultimodalGraphEncoder":
        """Set training or eval mode. The towers stay in eval mode."""
        super().train(mode)
        for tower in self.towers:
            tower.model.eval()
        return self

    @property
    def towers(self) -> Towers:
        """Both towers. Created at each access, because replicas of ``nn.DataParallel`` have other modules."""
        text, image = self._tower_types
        return Towers(text(self.text_model), image(self.vision_model))


def uncompiled_name(name: str) -> str:
    """Return the name of a parameter without the prefix that ``torch.compile`` adds to names."""
    return name.replace("_orig_mod.", "")


def file_keys(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return an encoder's tensors under the original trainer's keys, without ``position_ids``.

    Args:
        state: tensors of a complete encoder. Tower keys may start with the tower's name once or twice. Other keys may
            have the prefix of ``torch.compile``, as in files of older versions of mmgraph.
    """
    return {file_key(uncompiled_name(key)): tensor for key, tensor in state.items() if not key.endswith("position_ids")}


def _use_file_keys(module: nn.Module, state: dict[str, Any], prefix: str, _: Any) -> None:
    """State dict hook: rename the keys of a ``state_dict`` to the keys of the original trainer."""
    tensors = {key: state.pop(key) for key in [key for key in state if key.startswith(prefix)]}
    for key, tensor in tensors.items():
        state[prefix + file_key(key.removeprefix(prefix))] = tensor


def _use_module_keys(module: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Load hook: rename the keys of a state dict to the keys of the module, and remove ``position_ids``."""
    nested = {name: _is_nested(getattr(module, name).state_dict().keys(), name) for name in TOWER_NAMES}
    for key in [key for key in state if key.startswith(prefix)]:
        tensor = state.pop(key)
        name = file_key(key.removeprefix(prefix))
        tower = name.partition(".")[0]
        if name.endswith("position_ids") and tower in TOWER_NAMES:
            continue
        if tower in TOWER_NAMES and not nested[tower]:
            name = name.removeprefix(f"{tower}.")
        state[prefix + name] = tensor


def _is_nested(keys: Iterable[str], name: str) -> bool:
    """Return whether the keys of a tower's module start with the tower's name, as in some versions of transformers."""
    return next(iter(keys)).startswith(f"{name}.")
