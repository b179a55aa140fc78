"""Public names are importable from ``mmgraph``, and from the module paths of the original trainer below it."""

import inspect
import subprocess
import sys
from importlib import import_module

import pytest

import mmgraph

PATHS = {  # modules of the original trainer
    "mmgraph.loader.graph_edge_dataset": ["GraphEdgeDataset"],
    "mmgraph.loader.nodes_dataset": ["NodesDataset"],
    "mmgraph.loader.multimodal_collator": ["MultimodalCollator"],
    "mmgraph.loader.inference_collator": ["InferenceCollator"],
    "mmgraph.models.cross_attention_fusion": ["CrossAttentionFusion"],
    "mmgraph.models.multimodal_graph_encoder": ["MultimodalGraphEncoder"],
}
SIGNATURES = {
    "GraphEdgeDataset": ["nodes_df", "edges_df"],
    "NodesDataset": ["nodes_df"],
    "MultimodalCollator": ["tokenizer", "processor", "cache_size", "rules"],
    "InferenceCollator": ["tokenizer", "processor", "rules"],
    "InputRules": ["truncated_images", "background", "sixteen_bit_images", "text_columns"],
    "CrossAttentionFusion": ["d_text", "d_vis", "d_model", "n_heads"],
    "MultimodalGraphEncoder": ["clip_name", "fused_dim", "proj_dim"],
    "load_pretrained_encoder": ["checkpoint_path", "device", "model_name"],
    "info_nce_loss": ["logits"],
    "log": ["args", "kwargs"],
    "flush_log": [],
}


@pytest.mark.parametrize("module", PATHS)
def test_a_module_path_of_the_original_trainer(module: str) -> None:
    for name in PATHS[module]:
        assert getattr(import_module(module), name) is getattr(mmgraph, name)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature_of_a_public_name(name: str) -> None:
    assert list(inspect.signature(getattr(mmgraph, name)).parameters) == SIGNATURES[name]


def test_there_are_no_other_public_names() -> None:
    assert set(mmgraph.__all__) == set(SIGNATURES)
    with pytest.raises(AttributeError):
        _ = mmgraph.nothing


def test_the_package_is_imported_without_torch() -> None:
    """A wrong flag is reported immediately, because the import of torch takes about a second."""
    code = "import sys, mmgraph; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
