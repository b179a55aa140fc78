"""Types of the towers and of their outputs."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import nn


class Tokens(NamedTuple):
    """The towers' outputs for U nodes: L tokens per text with padding, and P patches per image.

    The text tower has width d_text, the image tower d_vis.
    """

    text: torch.Tensor  # (U, L, d_text) last hidden states of the text tower
    text_mask: torch.Tensor  # (U, L) 1 at valid text tokens, 0 at padding
    patches: torch.Tensor  # (U, P, d_vis) last hidden states of the image tower, without the class token
    image_mask: torch.Tensor | None = None  # (U, P) 1 at valid patches; None: all are valid
    text_pooled: torch.Tensor | None = None  # (U, d_text) pooled output of the text tower; None: not requested
    image_pooled: torch.Tensor | None = None  # (U, d_vis) pooled output of the image tower; None: not requested

    def map(self, function: Callable[[torch.Tensor], torch.Tensor]) -> "Tokens":
        """Return the tokens with ``function`` applied to each tensor that is not None."""
        return Tokens(*(None if tensor is None else function(tensor) for tensor in self))  # type: ignore[arg-type]

    @staticmethod
    def cat(parts: Sequence["Tokens"]) -> "Tokens":
        """Concatenate the tokens of several groups of nodes, in order."""
        if len(parts) == 1:
            return parts[0]
        columns = zip(*parts, strict=True)
        return Tokens(*(None if tensors[0] is None else torch.cat(tensors) for tensors in columns))  # type: ignore[arg-type]


class TowerOutput(NamedTuple):
    """One tower's output for N texts or images."""

    # (N, L, d) last hidden states. Tokens that represent no part of the input, such as a class token, are removed.
    sequence: torch.Tensor
    mask: torch.Tensor | None  # (N, L) 1 at valid tokens; None: all are valid
    pooled: torch.Tensor  # (N, d) pooled output


class TextTower(Protocol):
    """A frozen text tower. On torch's meta device, everything except :meth:`tokens` works."""

    def __init__(self, model: Any): ...

    @property
    def model(self) -> nn.Module:
        """The module, in eval mode and without gradients."""

    @property
    def width(self) -> int:
        """d_text, the width of the tokens and of the pooled output."""

    @property
    def length(self) -> int:
        """Maximum number of tokens of a text."""

    def tokens(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> TowerOutput:
        """Run the tower on N texts.

        Args:
            input_ids: (N, L) int64.
            attention_mask: (N, L) 1 at valid tokens, 0 at padding.

        Returns:
            The output. Its mask is never None.
        """

    def flops(self, length: int) -> float:
        """Return the FLOPs of a forward pass over one text of ``length`` tokens."""

    def description(self) -> dict[str, Any]:
        """Return the settings that, with the weights, determine the tokens. A store's recipe contains these settings.

        All values are plain JSON values.
        """


class ImageTower(Protocol):
    """A frozen image tower. On torch's meta device, everything except :meth:`tokens` works."""

    def __init__(self, model: Any): ...

    @property
    def model(self) -> nn.Module:
        """The module, in eval mode and without gradients."""

    @property
    def width(self) -> int:
        """d_vis, the width of the patches and of the pooled output."""

    @property
    def patches(self) -> int:
        """P, the number of patches of an image."""

    @property
    def image_size(self) -> int:
        """S, the side length of an image in pixels."""

    def tokens(self, pixel_values: torch.Tensor) -> TowerOutput:
        """Run the tower on N images: (N, 3, S, S) float32, normalized."""

    def flops(self) -> float:
        """Return the FLOPs of a forward pass over one image."""

    def description(self) -> dict[str, Any]:
        """Return the settings that determine the tokens; see :meth:`TextTower.description`."""


class Towers(NamedTuple):
    """The text tower and the image tower of a model."""

    text: TextTower
    image: ImageTower

    @property
    def text_model(self) -> nn.Module:
        """The text tower's module. The encoder has the module under the same name."""
        return self.text.model

    @property
    def vision_model(self) -> nn.Module:
        """The image tower's module. The encoder has the module under the same name."""
        return self.image.model

    @property
    def widths(self) -> tuple[int, int]:
        """Widths of the tokens: d_text and d_vis."""
        return self.text.width, self.image.width

    def to(self, device: torch.device) -> "Towers":
        """Move both modules to a device, in place."""
        for tower in self:
            tower.model.to(device)
        return self
