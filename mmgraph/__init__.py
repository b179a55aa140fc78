"""mmgraph trains multimodal graph node encoders; start with ``accelerate launch launch.py``."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"  # read by pyproject.toml

_MODULES = {
    "CrossAttentionFusion": "mmgraph.models.cross_attention_fusion",
    "GraphEdgeDataset": "mmgraph.loader.graph_edge_dataset",
    "InferenceCollator": "mmgraph.loader.inference_collator",
    "InputRules": "mmgraph.data.input_rules",
    "MultimodalCollator": "mmgraph.loader.multimodal_collator",
    "MultimodalGraphEncoder": "mmgraph.models.multimodal_graph_encoder",
    "NodesDataset": "mmgraph.loader.nodes_dataset",
    "flush_log": "mmgraph.utils.log",
    "info_nce_loss": "mmgraph.losses.contrastive",
    "load_pretrained_encoder": "mmgraph.inference.pretrained",
    "log": "mmgraph.utils.log",
}
__all__ = sorted(_MODULES)


def __getattr__(name: str) -> Any:
    """Import a public name when it is accessed, so that ``import mmgraph`` alone does not load torch."""
    if name not in _MODULES:
        raise AttributeError(f"module 'mmgraph' has no attribute '{name}'")
    return getattr(import_module(_MODULES[name]), name)
