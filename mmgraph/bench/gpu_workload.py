"""The data of ``bench gpu``: a generated graph, its towers and its tower store, and rows that may fail."""

import dataclasses
import gc
import os
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mmgraph.bench.graph import build_graph
from mmgraph.bench.report import shown
from mmgraph.config import Config
from mmgraph.data.content_hashes import ContentHashes
from mmgraph.data.graph import Graph, load_graph
from mmgraph.data.input_rules import InputRules
from mmgraph.data.node_inputs import NodeInputs
from mmgraph.distributed.launch import build_accelerator, compute_dtype
from mmgraph.errors import UserError
from mmgraph.towers.cached import CachedTowers, load_content_hashes, open_store
from mmgraph.towers.fingerprint import towers_fingerprint
from mmgraph.towers.load import load_tokenizer_and_processor, read_tower_state, tower_shapes
from mmgraph.towers.store import TowerStore
from mmgraph.training import estimate
from mmgraph.utils.environment import host_memory
from mmgraph.utils.error_text import describe_error, describe_out_of_memory
from mmgraph.utils.log import log

EDGES_PER_BATCH = 32  # the graph has this many edges per edge of the largest batch
NOT_MEASURED = "-"


@contextmanager
def parallel_tokenizer() -> Iterator[None]:
    """Let the tokenizer use several threads, as in a run, which builds its store before a loader forbids them."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "true"
    try:
        yield
    finally:
        os.environ["TOKENIZERS_PARALLELISM"] = before or "false"


class GraphSize(NamedTuple):
    """What the generated graph must suffice for."""

    largest_batch: int  # edges
    store_nodes: int  # nodes of the store that the part ``store`` builds
    real_towers: bool  # whether the towers have the size of ViT-B/32

    @property
    def nodes(self) -> int:
        return max(64, 3 * self.largest_batch // 2, self.store_nodes)


class Workload:
    """The generated graph and what a run makes of it. Each part of the benchmark opens what it needs.

    Args:
        config: settings of a run; tables and towers are replaced with those of the generated graph.
        size: size of the graph.
        folder: folder of the graph. If it contains a graph of this size, that graph is used.
        device: ``"cuda"`` or ``"cpu"``.
        precision: Accelerate's mixed precision, such as ``bf16``.

    Raises:
        UserError: the folder contains something else, or the precision does not fit the device.
    """

    def __init__(self, config: Config, size: GraphSize, folder: Path, device: str, precision: str):
        os.environ["ACCELERATE_MIXED_PRECISION"] = precision  # as ``accelerate launch --mixed_precision`` does
        if device == "cpu":
            os.environ["ACCELERATE_USE_CPU"] = "true"
        self.accelerator = build_accelerator(config.collective_timeout)
        self.device, self.dtype = self.accelerator.device, compute_dtype(self.accelerator)
        if self.device.type == "cuda":
            # Accelerate's device has no index if there is one process, and torch.cuda.set_device refuses such a device.
            self.device = torch.device("cuda", torch.cuda.current_device())
        if (self.device.type, self.accelerator.mixed_precision) != (device, precision):
            raise UserError(
                f"bench gpu: this process already uses {self.device.type} in {self.accelerator.mixed_precision}; start "
                f"it anew for {device} in {precision}"
            )
        self.size, self.folder = size, folder
        self.config = dataclasses.replace(
            config,
            nodes=str(folder / "graph/nodes.csv"),
            edges=str(folder / "graph/edges.parquet"),
            model_name=str(folder / "graph/towers"),
            tower_cache=str(folder / "store"),
        )

    @cached_property
    def graph(self) -> Graph:
        """The graph, which is generated if the folder lacks it."""
        folder, done = self.folder / "graph", self.folder / "graph.txt"
        if not done.exists():
            log(f"generating a graph of {self.size.nodes:,} nodes in {folder}")
            build_graph(
                folder,
                None,
                self.size.nodes,
                EDGES_PER_BATCH * self.size.largest_batch,
                None,
                self.size.real_towers,
            )
            done.write_text(repr(self.size))
        if done.read_text() != repr(self.size):
            raise UserError(f"--folder {self.folder}: has a graph of another size; give a new or empty folder")
        return load_graph(self.config)

    @cached_property
    def tokenizer_and_processor(self) -> tuple[Any, Any]:
        _ = self.graph  # it generates the towers' folder, which contains both
        return load_tokenizer_and_processor(self.config.model_name)

    @cached_property
    def inputs(self) -> NodeInputs:
        return NodeInputs(*self.tokenizer_and_processor, self.config.cache_size, InputRules.of(self.config))

    @cached_property
    def hashes(self) -> ContentHashes:
        return load_content_hashes(self.config, self.accelerator, self.graph)

    @cached_property
    def towers_fingerprint(self) -> str:
        _ = self.graph
        return towers_fingerprint(read_tower_state(self.config.model_name))

    @cached_property
    def store(self) -> TowerStore:
        """The tower store of all nodes, which is built if the folder lacks it."""
        config = dataclasses.replace(self.config, tower_cache_device="cpu")
        with parallel_tokenizer():
            opened = open_store(
                config, self.accelerator, self.graph, self.hashes, self.inputs, self.towers_fingerprint, 2**62
            )
        assert opened is not None  # None only with --tower_cache auto
        return opened.store

    def stored(self, resident: bool) -> CachedTowers:
        """Open the token source of the store. ``resident`` loads all tokens to the device."""
        return CachedTowers(self.store, self.hashes, self.device, resident)

    @cached_property
    def sizes(self) -> estimate.Sizes:
        _ = self.graph
        return estimate.model_sizes(tower_shapes(self.config.model_name), self.config)

    @property
    def free_memory_gb(self) -> float:
        """Free memory of the device, in GB (10^9 bytes)."""
        if self.device.type == "cuda":
            return torch.cuda.mem_get_info(self.device)[0] / 1e9
        return host_memory()[0] / 1e9

    def synchronize(self) -> None:
        """Wait for the device."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def free(self) -> None:
        """Free the memory of objects that are no longer used, also what Accelerate keeps of them."""
        self.accelerator.free_memory()
        gc.collect()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    def row(
        self, start: dict[str, Any], columns: Sequence[str], measure: Callable[[], dict[str, Any]]
    ) -> dict[str, Any]:
        """Return a row of a table, and log it. An error in one row does not stop the others.

        Args:
            start: what the row is about: the first cells.
            columns: names of the cells that ``measure`` returns.
            measure: returns the measured cells.

        Returns:
            The cells. After an error, the first measured cell says ``out of memory`` or ``failed``, and the others are
            ``-``. The text of another error than exhausted memory goes to the log.
        """
        failure = ""
        try:
            row = {**start, **measure()}
        except Exception as error:
            failure = _failure(error)
            if failure == "failed":
                log(f"bench gpu: {start}: {describe_error(error)}\n{traceback.format_exc()}")
        # Outside of the except block, where the error, and with it the tensors of the failed call, no longer exist.
        if failure:
            row = {**start, **dict.fromkeys(columns, NOT_MEASURED), columns[0]: failure}
        self.free()
        log("  " + ", ".join(f"{name} {shown(value)}" for name, value in row.items()))
        return row


def _failure(error: Exception) -> str:
    """Return what a row says after an error. TrainStep reports exhausted memory as a RunError with this context."""
    exhausted = any(cause and describe_out_of_memory(cause) for cause in (error, error.__context__))
    return "out of memory" if exhausted else "failed"
