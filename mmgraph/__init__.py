"""mmgraph trains multimodal graph node encoders at any scale; ``accelerate launch launch.py`` is where to begin."""

from importlib import import_module
from typing import Any

__version__ = "0.1.0"  # pyproject.toml reads it from here

_HOMES = {
    "CrossAttentionFusion": "mmgraph.models.cross_attention_fusion",
    "GraphEdgeDataset": "mmgraph.loader.graph_edge_dataset",
    "InferenceCollator": "mmgraph.loader.inference_collator",
    "MultimodalCollator": "mmgraph.loader.multimodal_collator",
    "MultimodalGraphEncoder": "mmgraph.models.multimodal_graph_encoder",
    "NodesDataset": "mmgraph.loader.nodes_dataset",
    "flush_log": "mmgraph.utils.log",
    "info_nce_loss": "mmgraph.losses.contrastive",
    "load_pretrained_encoder": "mmgraph.inference.pretrained",
    "log": "mmgraph.utils.log",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a public name from its module when it is asked for: a wrong flag is told before torch is loaded."""
    if name not in _HOMES:
        raise AttributeError(f"module 'mmgraph' has no attribute '{name}'")
    return getattr(import_module(_HOMES[name]), name)
