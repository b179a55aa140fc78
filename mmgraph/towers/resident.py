"""Tokens in the memory of a device."""

from typing import NamedTuple

import numpy as np
import torch

from mmgraph.towers.store import TowerStore
from mmgraph.towers.tokens import Tokens


class ResidentTokens(NamedTuple):
    """All tokens of some nodes, in the memory of one device."""

    text: torch.Tensor  # (T, d_text) tokens of all texts, concatenated
    offsets: torch.Tensor  # (N_text + 1,) int64, the start of each text in ``text``, then T
    patches: torch.Tensor  # (N_image, P, d_vis) patches of all images

    @classmethod
    def load(cls, store: TowerStore, texts: np.ndarray, images: np.ndarray, device: torch.device) -> "ResidentTokens":
        """Load entries to a device, one shard at a time, so that host memory never contains all entries.

        Args:
            texts, images: (N_text,) and (N_image,) ascending indices of entries in ``store``.
        """
        lengths = torch.cat([shard["offsets"].diff()[entries] for shard, entries in store.texts.by_shard(texts)])
        offsets = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
        first, picture = store.texts.tensors[0]["tokens"], store.images.tensors[0]["patches"]
        text = torch.empty((int(offsets[-1]), first.shape[1]), dtype=first.dtype, device=device)
        begin = 0
        for shard, entries in store.texts.by_shard(texts):
            spans = zip(shard["offsets"][entries].tolist(), shard["offsets"][entries + 1].tolist(), strict=True)
            part = torch.cat([shard["tokens"][start:end] for start, end in spans])
            text[begin : begin + len(part)] = part.to(device)
            begin += len(part)
        patches = torch.empty((len(images), *picture.shape[1:]), dtype=picture.dtype, device=device)
        begin = 0
        for shard, entries in store.images.by_shard(images):
            patches[begin : begin + len(entries)] = shard["patches"][entries].to(device)
            begin += len(entries)
        return cls(text, offsets.to(device), patches)

    def tokens(self, texts: torch.Tensor, images: torch.Tensor, length: int) -> Tokens:
        """Return the tokens of U nodes, on the device. Text tokens are padded with zeros.

        Args:
            texts, images: (U,) positions of the nodes' texts and images among the loaded entries, on the device.
            length: number of tokens of the longest of these texts. The caller passes this number, because reading it
                from the device would block the host.
        """
        starts, ends = self.offsets[texts], self.offsets[texts + 1]  # (U,)
        token_rows = starts[:, None] + torch.arange(length, device=starts.device)  # (U, L)
        mask = token_rows < ends[:, None]
        text = self.text[token_rows.clamp(max=len(self.text) - 1)] * mask[:, :, None]  # (U, L, d_text)
        return Tokens(text, mask.long(), self.patches[images])
