"""What the towers give: the types."""

from typing import NamedTuple

import torch
from torch import nn


class Tokens(NamedTuple):
    """What the towers say about U nodes: all that the trained module needs."""

    text: torch.Tensor  # (U, L, d_text) last hidden states of the text tower
    mask: torch.Tensor  # (U, L) 1 at valid text tokens, 0 at padding
    patches: torch.Tensor  # (U, P, d_vis) last hidden states of the vision tower, without the class token


class Towers(NamedTuple):
    """Both towers, frozen, in eval mode."""

    text_model: nn.Module
    vision_model: nn.Module
