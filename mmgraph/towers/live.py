"""The token source that runs the towers on every batch."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch

from mmgraph.data.preprocessing import Preprocessing
from mmgraph.towers.tokens import Tokens, Towers


class LiveTowers:
    """The token source that runs the towers on every batch.

    Args:
        towers: moved to ``device``.
        preprocessing: of the towers' pictures.
        device: where batches are.
        dtype: what the towers compute in; 16-bit ones by autocast.
    """

    def __init__(
        self,
        towers: Towers,
        preprocessing: Preprocessing,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
    ):
        self.towers = Towers(*(tower.to(device) for tower in towers))
        self.preprocessing, self.device, self.dtype = preprocessing, device, dtype

    def batches(self, loader: Iterable[dict[str, Any]]) -> Iterable[dict[str, Any]]:
        """The loader's batches, which have all that :meth:`tokens` needs."""
        return loader

    @torch.no_grad()
    def tokens(self, batch: Mapping[str, torch.Tensor], micro_batches: int = 1) -> Tokens:
        """Tokens of the batch's U distinct nodes: reads ``input_ids``, ``attention_mask`` and ``pictures``.

        Args:
            micro_batches: parts that the towers see one after the other.
        """
        inputs = [batch[name].tensor_split(micro_batches) for name in ("input_ids", "attention_mask", "pictures")]
        parts = [part for part in zip(*inputs, strict=True) if len(part[0])]
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            tokens = [
                run_towers(self.towers, input_ids, mask, self.preprocessing.normalize(pictures))[0]
                for input_ids, mask, pictures in parts
            ]
        return tokens[0] if len(tokens) == 1 else Tokens(*map(torch.cat, zip(*tokens, strict=True)))


def run_towers(
    towers: Towers, input_ids: torch.Tensor, attention_mask: torch.Tensor, pixel_values: torch.Tensor
) -> tuple[Tokens, torch.Tensor, torch.Tensor]:
    """Run both towers on N nodes: their tokens, and the pooled outputs (N, d_text) and (N, d_vis)."""
    text = towers.text_model(input_ids=input_ids, attention_mask=attention_mask)
    vision = towers.vision_model(pixel_values=pixel_values)
    patches = vision.last_hidden_state[:, 1:]  # (N, 1 + P, d_vis) -> (N, P, d_vis)
    return Tokens(text.last_hidden_state, attention_mask, patches), text.pooler_output, vision.pooler_output
