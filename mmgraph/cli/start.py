"""Build the Accelerator and load the graph."""

from pathlib import Path

from accelerate import Accelerator

from mmgraph.config import Config
from mmgraph.data.graph import Graph, load_graph
from mmgraph.demo.graph import build_demo
from mmgraph.distributed.collectives import on_main_process, raise_on_all_ranks
from mmgraph.distributed.launch import build_accelerator


def open_graph(config: Config) -> tuple[Accelerator, Graph]:
    """Build the Accelerator of the launch and load the graph. Called by all ranks.

    With ``--demo``, the demo graph is built first if it does not exist.

    Raises:
        UserError: the launch or the graph is not valid.
    """
    accelerator = build_accelerator(config.collective_timeout)
    if config.demo:
        on_main_process(accelerator, lambda: build_demo(Path(config.nodes).parent))
    return accelerator, raise_on_all_ranks(accelerator, lambda: load_graph(config))
