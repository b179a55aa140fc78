"""How whatever works on a graph begins: the Accelerator of the launch, and the graph."""

from pathlib import Path

from accelerate import Accelerator

from mmgraph.config import Config
from mmgraph.data.graph import Graph, load_graph
from mmgraph.demo.graph import build_demo
from mmgraph.distributed.launch import build_accelerator, on_main_process, together


def open_graph(config: Config) -> tuple[Accelerator, Graph]:
    """Called by all ranks; with ``--demo`` the graph is built if it is not there.

    Raises:
        UserError: a launch or a graph that will not do.
    """
    accelerator = build_accelerator(config.collective_timeout)
    if config.demo:
        on_main_process(accelerator, lambda: build_demo(Path(config.nodes).parent))
    return accelerator, together(accelerator, lambda: load_graph(config))
