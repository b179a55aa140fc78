"""Bidirectional cross-attention between a node's text tokens and image patches."""

import torch
from torch import nn


class CrossAttentionFusion(nn.Module):
    """Fuses text tokens and image patches into one vector a node.

    Text attends to the image and the image to the text (padding masked), each with a residual and a feed-forward
    layer; the two means are joined by an MLP. No dropout. Parameters have the original's names and order.

    Args:
        d_text: width of the text tokens.
        d_vis: width of the image patches.
        d_model: width inside and out.
        n_heads: attention heads; divides ``d_model``.
    """

    def __init__(self, d_text: int, d_vis: int, d_model: int = 512, n_heads: int = 8):
        super().__init__()
        self.text_proj = nn.Linear(d_text, d_model)
        self.vis_proj = nn.Linear(d_vis, d_model)
        self.text2vis_attn = nn.MultiheadAttention(d_model, n_heads, batch_first=True)
        self.vis2text_attn = nn.MultiheadAttention(d_model, n_heads, batch_first=True)
        self.text_ffn = _feed_forward(d_model)
        self.vis_ffn = _feed_forward(d_model)
        self.fusion_mlp = nn.Sequential(
            nn.Linear(2 * d_model, d_model), nn.LayerNorm(d_model), nn.GELU(), nn.Linear(d_model, d_model)
        )

    def forward(
        self, text_tokens: torch.Tensor, text_mask: torch.Tensor, img_patches: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Fuse B nodes.

        Args:
            text_tokens: (B, L, d_text).
            text_mask: (B, L), nonzero at valid tokens. Where none is valid, the text adds only the attention's bias to
                the image, and ``text_pool`` is 0.
            img_patches: (B, P, d_vis), without the class token.

        Returns:
            ``fused``, ``text_pool``, ``vis_pool``, each (B, d_model).
        """
        valid = text_mask != 0  # (B, L)
        has_text = valid.any(dim=1)  # (B,)
        text = self.text_proj(text_tokens)  # (B, L, d_model)
        vis = self.vis_proj(img_patches)  # (B, P, d_model)

        attended, _ = self.text2vis_attn(text, vis, vis, need_weights=False)
        text_fused = self.text_ffn(attended + text)  # (B, L, d_model)

        # A softmax over no key at all is NaN in some kernels: open the keys where there is none, drop what comes out.
        padding = ~valid & has_text[:, None]
        attended, _ = self.vis2text_attn(vis, text, text, key_padding_mask=padding, need_weights=False)
        attended = torch.where(has_text[:, None, None], attended, self.vis2text_attn.out_proj.bias)
        vis_fused = self.vis_ffn(attended + vis)  # (B, P, d_model)

        weights = valid.to(text_fused.dtype)[:, :, None]  # (B, L, 1)
        text_pool = (text_fused * weights).sum(dim=1) / weights.sum(dim=1).clamp(min=1.0)  # (B, d_model)
        vis_pool = vis_fused.mean(dim=1)  # (B, d_model)
        return self.fusion_mlp(torch.cat([text_pool, vis_pool], dim=-1)), text_pool, vis_pool


def _feed_forward(d_model: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(d_model, 2 * d_model), nn.GELU(), nn.Linear(2 * d_model, d_model))
