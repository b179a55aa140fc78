"""The types of the towers: what they offer, and the tokens that they give."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

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


class TowerOutput(NamedTuple):
    """One tower's output for N texts or images."""

    sequence: torch.Tensor  # (N, L, d) last hidden states, without tokens that stand for no part of the input
    mask: torch.Tensor | None  # (N, L) 1 at valid tokens; None: all are valid
    pooled: torch.Tensor  # (N, d)


class TextTower(Protocol):
    """A frozen text tower. On torch's meta device it answers all but :meth:`tokens`."""

    def __init__(self, model: Any): ...

    @property
    def model(self) -> nn.Module:
        """The module, in eval mode and without gradients."""

    @property
    def width(self) -> int:
        """d_text, of the tokens and of the pooled output."""

    @property
    def length(self) -> int:
        """Tokens of the longest text."""

    def tokens(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> TowerOutput:
        """Run the tower on N texts: (N, L) int64, and (N, L), 1 at valid tokens. The output has a mask."""

    def flops(self, length: int) -> float:
        """Of a forward pass over one text of ``length`` tokens."""

    def description(self) -> dict[str, Any]:
        """Settings that tokens depend on beside the weights, for the recipe of a tower store; plain JSON values."""


class ImageTower(Protocol):
    """A frozen image tower. On torch's meta device it answers all but :meth:`tokens`."""

    def __init__(self, model: Any): ...

    @property
    def model(self) -> nn.Module:
        """The module, in eval mode and without gradients."""

    @property
    def width(self) -> int:
        """d_vis, of the patches and of the pooled output."""

    @property
    def patches(self) -> int:
        """P, of an image."""

    @property
    def image_size(self) -> int:
        """S, pixels a side."""

    def tokens(self, pixel_values: torch.Tensor) -> TowerOutput:
        """Run the tower on N images, (N, 3, S, S) float32, normalised."""

    def flops(self) -> float:
        """Of a forward pass over one image."""

    def description(self) -> dict[str, Any]:
        """As :meth:`TextTower.description`."""


class Towers(NamedTuple):
    """Both towers."""

    text: TextTower
    image: ImageTower

    @property
    def text_model(self) -> nn.Module:
        """The text tower's module, under the encoder's name for it."""
        return self.text.model

    @property
    def vision_model(self) -> nn.Module:
        """The image tower's module, under the encoder's name for it."""
        return self.image.model

    @property
    def widths(self) -> tuple[int, int]:
        """The widths of their tokens: d_text and d_vis."""
        return self.text.width, self.image.width

    def to(self, device: torch.device) -> "Towers":
        """Move the modules to a device, in place."""
        for tower in self:
            tower.model.to(device)
        return self
