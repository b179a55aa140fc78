"""Bidirectional cross-attention between a node's text tokens and image patches."""

import torch
import torch.nn.functional as F
from torch import nn


class CrossAttention(nn.MultiheadAttention):
    """Multi-head attention from one sequence to another, without dropout.

    The parameters and their names are those of ``nn.MultiheadAttention``. The three projections are separate matrix
    products, because slices of a joint product would cost copies in the backward pass.
    """

    def __init__(self, d_model: int, n_heads: int):
        super().__init__(d_model, n_heads, batch_first=True)

    def forward(  # type: ignore[override]
        self, query: torch.Tensor, context: torch.Tensor, mask: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Attend from ``query`` to ``context``.

        Args:
            query: (B, Q, d_model).
            context: (B, K, d_model).
            mask: (B, K) bool, true at positions of ``context`` that may be attended to. None: all positions.

        Returns:
            (B, Q, d_model).
        """
        weights, biases = self.in_proj_weight.chunk(3), self.in_proj_bias.chunk(3)
        q, k, v = (
            F.linear(x, weight, bias).unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (B, heads, Q or K, width)
            for x, weight, bias in zip((query, context, context), weights, biases, strict=True)
        )
        mask = mask[:, None, None, :] if mask is not None else None  # (B, 1, 1, K)
        attended = _attend(q, k, v, mask)
        return self.out_proj(attended.transpose(1, 2).flatten(2))  # (B, heads, Q, width) -> (B, Q, d_model)


def _attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
    if q.device.type != "cpu" or q.dtype.itemsize > 2:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    with torch.autocast("cpu", enabled=False):  # the CPU's backward kernel takes twice as long in bf16 as in float32
        return F.scaled_dot_product_attention(q.float(), k.float(), v.float(), attn_mask=mask).to(q.dtype)


class CrossAttentionFusion(nn.Module):
    """Fuses text tokens and image patches into one vector per node.

    Text attends to the image and the image to the text, each with a residual connection and a feed-forward layer.
    Padding in the text is masked. An MLP fuses the means of both sequences. There is no dropout. Parameters have the
    names and the order of the original trainer.

    Args:
        d_text: width of the text tokens.
        d_vis: width of the image patches.
        d_model: width of the hidden layers and of the output.
        n_heads: number of attention heads; must divide ``d_model``.
    """

    def __init__(self, d_text: int, d_vis: int, d_model: int = 512, n_heads: int = 8):
        super().__init__()
        self.text_proj = nn.Linear(d_text, d_model)
        self.vis_proj = nn.Linear(d_vis, d_model)
        self.text2vis_attn = CrossAttention(d_model, n_heads)
        self.vis2text_attn = CrossAttention(d_model, n_heads)
        self.text_ffn = _feed_forward(d_model)
        self.vis_ffn = _feed_forward(d_model)
        self.fusion_mlp = nn.Sequential(
            nn.Linear(2 * d_model, d_model), nn.LayerNorm(d_model), nn.GELU(), nn.Linear(d_model, d_model)
        )

    def forward(
        self, text_tokens: torch.Tensor, text_mask: torch.Tensor, img_patches: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Fuse the tokens of B nodes.

        Args:
            text_tokens: (B, L, d_text).
            text_mask: (B, L), nonzero at valid tokens. If a node has no valid tokens, its ``text_pool`` is 0, and the
                attention from the image to the text returns only the bias of the output projection.
            img_patches: (B, P, d_vis), without the class token.

        Returns:
            ``fused``, ``text_pool``, ``vis_pool``, each (B, d_model).
        """
        valid = text_mask != 0  # (B, L)
        has_text = valid.any(dim=1)  # (B,)
        text = self.text_proj(text_tokens)  # (B, L, d_model)
        vis = self.vis_proj(img_patches)  # (B, P, d_model)

        # A softmax over zero keys is NaN in some kernels. So unmask all keys of nodes without text and drop the result.
        attended = self.vis2text_attn(vis, text, valid | ~has_text[:, None])
        bias = self.vis2text_attn.out_proj.bias.to(attended.dtype)  # under autocast, float32 would make both float32
        attended = torch.where(has_text[:, None, None], attended, bias)
        vis_pool = _pool(self.vis_ffn, attended + vis)  # (B, d_model)

        text_pool = _pool(self.text_ffn, self.text2vis_attn(text, vis) + text, valid)  # (B, d_model)
        text_pool = torch.where(has_text[:, None], text_pool, 0.0)
        return self.fusion_mlp(torch.cat([text_pool, vis_pool], dim=-1)), text_pool, vis_pool


def _pool(feed_forward: nn.Sequential, tokens: torch.Tensor, valid: torch.Tensor | None = None) -> torch.Tensor:
    """Return the mean of ``feed_forward(tokens)`` over the valid tokens: (B, L, d) -> (B, d).

    The last layer of ``feed_forward`` is linear, so it is applied to the mean instead of to each token. This saves a
    fifth of the fusion's computation.

    Args:
        feed_forward: from :func:`_feed_forward`.
        tokens: (B, L, d).
        valid: (B, L) bool; None: all tokens are valid.
    """
    first, activation, last = feed_forward
    hidden = activation(first(tokens))  # (B, L, 2d)
    if valid is None:
        return last(hidden.mean(dim=1))
    weights = valid.to(hidden.dtype)[:, None, :]  # (B, 1, L)
    return last((weights @ hidden).squeeze(1) / weights.sum(dim=2).clamp(min=1.0))


def _feed_forward(d_model: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d_model, 2 * d_model), nn.GELU(), nn.Linear(2 * d_model, d_model))
