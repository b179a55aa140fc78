"""Opens the token source of a run: a tower store, or live towers with an image cache."""

from accelerate import Accelerator

from mmgraph.config import Config
from mmgraph.data.batches import open_image_cache
from mmgraph.data.content_hashes import ContentHashes
from mmgraph.data.graph import Graph
from mmgraph.data.node_inputs import NodeInputs
from mmgraph.distributed.collectives import raise_on_all_ranks
from mmgraph.distributed.launch import compute_dtype
from mmgraph.towers.cached import CachedTowers, open_store
from mmgraph.towers.live import LiveTowers
from mmgraph.towers.load import load_towers
from mmgraph.utils.files import cache_folder

TokenSource = CachedTowers | LiveTowers  # both have the methods batches() and tokens()


def open_source(
    config: Config,
    accelerator: Accelerator,
    graph: Graph,
    content_hashes: ContentHashes | None,
    inputs: NodeInputs,
    towers: str,
    planned_nodes: int,
) -> TokenSource:
    """Open the token source of a run. Call on all ranks.

    Live towers read images through an image cache, if there is one. This function sets the cache in ``inputs``.

    Args:
        config, accelerator, graph: settings, Accelerator and data of the run.
        content_hashes: hashes of the graph's texts and images; None to use live towers.
        inputs, towers, planned_nodes: see :func:`mmgraph.towers.cached.open_store`.

    Raises:
        UserError: the towers cannot be loaded, the store is damaged, or ``config.tower_cache`` is a folder in which the
            store cannot be built.
    """
    if config.tower_cache != "off" and content_hashes is not None:
        stored = open_store(config, accelerator, graph, content_hashes, inputs, towers, planned_nodes)
        if stored is not None:
            return stored
    if config.image_cache_gb > 0:
        inputs.picture_file = open_image_cache(config, graph, inputs.preprocessing, cache_folder(config.nodes))
    loaded = raise_on_all_ranks(accelerator, lambda: load_towers(config.model_name))
    return LiveTowers(loaded, inputs.preprocessing, accelerator.device, compute_dtype(accelerator))
