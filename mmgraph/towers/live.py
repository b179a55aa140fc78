"""The token source that runs the towers on every batch."""

from collections.abc import Iterable

import torch

from mmgraph.data.batches import EdgeBatch
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
        self.towers = towers.to(device)
        self.preprocessing, self.device, self.dtype = preprocessing, device, dtype

    def batches(self, loader: Iterable[EdgeBatch]) -> Iterable[EdgeBatch]:
        """The loader's batches, which have all that :meth:`tokens` needs."""
        return loader

    @torch.no_grad()
    def tokens(self, batch: EdgeBatch, micro_batches: int = 1) -> Tokens:
        """Tokens of the batch's U unique nodes, from its tower inputs.

        Args:
            micro_batches: parts that the towers see one after the other.
        """
        assert batch.inputs is not None
        names = ("input_ids", "attention_mask", "pictures")
        parts = zip(*(batch.inputs[name].tensor_split(micro_batches) for name in names), strict=True)
        with torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
            tokens = [
                run_towers(self.towers, input_ids, mask, self.preprocessing.normalize(pictures))
                for input_ids, mask, pictures in parts
                if len(input_ids)
            ]
        return Tokens.cat(tokens)


def run_towers(
    towers: Towers, input_ids: torch.Tensor, attention_mask: torch.Tensor, pixel_values: torch.Tensor
) -> Tokens:
    """Run both towers on N nodes: their tokens, with the pooled outputs."""
    text = towers.text.tokens(input_ids, attention_mask)
    image = towers.image.tokens(pixel_values)
    assert text.mask is not None
    return Tokens(text.sequence, text.mask, image.sequence, image.mask, text.pooled, image.pooled)
