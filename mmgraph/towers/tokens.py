"""What the towers give: the types."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn


class Tokens(NamedTuple):
    """The towers' outputs for U nodes."""

    text: torch.Tensor  # (U, L, d_text) last hidden states of the text tower
    text_mask: torch.Tensor  # (U, L) 1 at valid text tokens, 0 at padding
    patches: torch.Tensor  # (U, P, d_vis) last hidden states of the image tower, without the class token
    image_mask: torch.Tensor | None = None  # (U, P) 1 at valid patches; None: all are valid
    text_pooled: torch.Tensor | None = None  # (U, d_text) the towers' pooled outputs, where they were asked for
    image_pooled: torch.Tensor | None = None  # (U, d_vis)

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Tokens":
        """The tokens with ``function`` applied to each tensor that is there."""
        return Tokens(*(None if tensor is None else function(tensor) for tensor in self))  # type: ignore[arg-type]

    @staticmethod
    def cat(parts: Sequence["Tokens"]) -> "Tokens":
        """Tokens of parts of the nodes, joined in order."""
        if len(parts) == 1:
            return parts[0]
        columns = zip(*parts, strict=True)
        return Tokens(*(None if tensors[0] is None else torch.cat(tensors) for tensors in columns))  # type: ignore[arg-type]


class Towers(NamedTuple):
    """Both towers, frozen, in eval mode."""

    text_model: nn.Module
    vision_model: nn.Module
