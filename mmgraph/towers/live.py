"""Live towers: the token source that runs the towers on every batch."""

from collections.abc import Iterable

import torch

from mmgraph.data.batches import EdgeBatch
from mmgraph.data.preprocessing import Preprocessing
from mmgraph.towers.tokens import Tokens, Towers


class LiveTowers:
    """Token source that runs the towers on every batch.

    Args:
        towers: both towers, which are moved to ``device``.
        preprocessing: normalizes the images of a batch.
        device: device of the batches.
        dtype: dtype in which the towers compute. A 16-bit dtype is used through autocast.
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
        """Return the loader unchanged. Its batches already contain the tower inputs for :meth:`tokens`."""
        return loader

    @torch.no_grad()
    def tokens(self, batch: EdgeBatch, micro_batches: int = 1) -> Tokens:
        """Run the towers on the batch's U unique nodes, and return their tokens.

        Args:
            batch: a batch with tower inputs.
            micro_batches: number of parts that the nodes are split into. The towers process one part at a time.
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
    """Run both towers on N nodes.

    Args:
        towers: both towers, on the device of the inputs.
        input_ids: (N, L) int64, where L is the number of tokens of the longest text.
        attention_mask: (N, L) 1 at valid text tokens, 0 at padding.
        pixel_values: (N, 3, S, S) float32, normalized, where S is the side length of an image in pixels.

    Returns:
        The tokens and the pooled outputs.
    """
    text = towers.text.tokens(input_ids, attention_mask)
    image = towers.image.tokens(pixel_values)
    assert text.mask is not None
    return Tokens(text.sequence, text.mask, image.sequence, image.mask, text.pooled, image.pooled)
