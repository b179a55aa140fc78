"""Collator of single nodes."""

from collections.abc import Sequence
from typing import Any

import torch

from mmgraph.data.input_rules import InputRules
from mmgraph.data.node_inputs import NodeInputs


class InferenceCollator:
    """Collates N node dicts into the three tower inputs that :class:`MultimodalCollator` returns, with N rows each.

    Images are not cached, because inference reads each node once.

    Args:
        tokenizer: a Hugging Face tokenizer.
        processor: a Hugging Face CLIP processor or CLIP image processor.
        rules: how columns become text and pixels; those of the run whose encoder gets the inputs.
    """

    def __init__(self, tokenizer: Any, processor: Any, *, rules: InputRules | None = None):
        self.inputs = NodeInputs(tokenizer, processor, 0, rules)

    def __call__(self, nodes: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        return self.inputs(nodes)
