"""Collator of training pairs."""

from collections.abc import Sequence
from typing import Any

import torch

from mmgraph.data.input_rules import InputRules
from mmgraph.data.node_inputs import NodeInputs


class MultimodalCollator:
    """Collates B (anchor, positive) pairs into tower inputs: the B anchors first, then the B positives.

    Returns exactly ``input_ids`` (2B, 77) int64, ``attention_mask`` (2B, 77) int64 and ``pixel_values``
    (2B, 3, S, S) float32, where S is the processor's crop size (224 for ViT-B/32). Works in DataLoader workers with
    every start method (such as fork or spawn). Each worker has a separate cache.

    Args:
        tokenizer: a Hugging Face tokenizer.
        processor: a Hugging Face CLIP processor or CLIP image processor.
        cache_size: maximum number of decoded images in the least-recently-used cache.
        rules: how columns become text and pixels. The defaults are those of the original trainer.

    Raises:
        UserError: in a call, if a node's image or text has a type that is not accepted, or a key is misspelt. See
            :func:`mmgraph.data.given_images.given_image`.
    """

    def __init__(self, tokenizer: Any, processor: Any, cache_size: int = 128, *, rules: InputRules | None = None):
        self.inputs = NodeInputs(tokenizer, processor, cache_size, rules)

    def __call__(self, pairs: Sequence[tuple[dict[str, Any], dict[str, Any]]]) -> dict[str, torch.Tensor]:
        anchors, positives = zip(*pairs, strict=True)
        return self.inputs([*anchors, *positives])
