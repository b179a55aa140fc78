"""The token source of a run: towers' tokens made once and read from then on, or the live towers."""

import dataclasses
import os
import shutil
import time
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import gather_object

from mmgraph.config import Config
from mmgraph.data.batches import EdgeBatch
from mmgraph.data.content_hashes import ContentHashes, read_content_hashes
from mmgraph.data.graph import Graph
from mmgraph.data.image_source import ImageSource
from mmgraph.data.images import describe_image_status
from mmgraph.data.node_inputs import NodeInputs
from mmgraph.data.node_table import NodeTable
from mmgraph.distributed.collectives import raise_on_all_ranks
from mmgraph.errors import UserError
from mmgraph.towers.fingerprint import check_same_towers, towers_fingerprint
from mmgraph.towers.load import load_tokenizer_and_processor, read_tower_state
from mmgraph.towers.store import ResidentTokens, TowerStore
from mmgraph.towers.store_builder import build
from mmgraph.towers.store_plan import cost, missing_shards, recipe, refusal
from mmgraph.towers.tokens import Tokens
from mmgraph.utils.files import cache_folder, make_once
from mmgraph.utils.log import log

VISIBLE_SECONDS = 120
GPU_SHARE = 0.5  # of a GPU's free memory: what a store may take there without being told to


class CachedTowers:
    """The token source that reads a store which holds every node.

    Args:
        store: holds all of ``content_hashes``.
        contents: of the graph's nodes.
        device: where tokens are wanted.
        resident: keep all of them in the device's memory.
    """

    def __init__(self, store: TowerStore, content_hashes: ContentHashes, device: torch.device, resident: bool = False):
        self.store, self.device = store, device
        self.texts, self.images = (
            store.texts.find(content_hashes.texts),
            store.images.find(content_hashes.images),
        )  # (N,) places
        if min(self.texts.min(), self.images.min()) < 0:
            raise UserError(f"tower store: {store.folder} lacks entries; start again, and they are made")
        self.places = self.texts, self.images
        distinct, inverse = np.unique(self.images, return_inverse=True)
        causes = [shard["causes"][entries] for shard, entries in store.images.by_shard(distinct)]
        self.image_status = torch.cat(causes).numpy()[inverse]  # (N,)
        self.resident: ResidentTokens | None = None
        if resident:  # from here, places are numbers of what lies on the device
            texts, self.texts = np.unique(self.texts, return_inverse=True)
            images, self.images = np.unique(self.images, return_inverse=True)
            self.resident = ResidentTokens.load(store, texts, images, device)
            self.lengths = self.resident.offsets.diff().cpu().numpy()  # of each text

    def batches(self, loader: Iterable[EdgeBatch]) -> Iterator[EdgeBatch]:
        """The loader's batches with their tokens prefetched; the next ones are read while a step runs."""
        with ThreadPoolExecutor(1) as reader:
            waiting = deque[tuple[EdgeBatch, Future[Tokens]]]()
            for batch in loader:
                waiting.append((batch, reader.submit(self._read, batch.unique)))
                if len(waiting) > 1:
                    yield self._finish(*waiting.popleft())
            while waiting:
                yield self._finish(*waiting.popleft())

    def _read(self, rows: np.ndarray, image_rows: np.ndarray | None = None) -> Tokens:
        texts, images = self.texts[rows], self.images[rows if image_rows is None else image_rows]
        if self.resident is None:
            return self.store.tokens(texts, images, pin=self.device.type == "cuda")
        text, image = (torch.from_numpy(places).to(self.device) for places in (texts, images))
        return self.resident.tokens(text, image, length=int(self.lengths[texts].max()))

    def _finish(self, batch: EdgeBatch, tokens: "Future[Tokens]") -> EdgeBatch:
        return batch._replace(prefetched=tokens.result(), image_status=self.image_status[batch.unique])

    def tokens(self, batch: EdgeBatch, micro_batches: int = 1) -> Tokens:
        """Tokens of the batch's U unique nodes, on the device."""
        tokens: Tokens = batch.prefetched
        return tokens.map(lambda tensor: tensor.to(self.device, non_blocking=True))

    def pooled_tokens(self, rows: np.ndarray, image_rows: np.ndarray) -> Tokens:
        """What :func:`mmgraph.towers.live.run_towers` gives: tokens with the pooled outputs, on the device.

        Args:
            rows, image_rows: (U,) the nodes whose texts, and those whose images are meant.
        """
        texts, images = self.places
        tokens = self._read(rows, image_rows)._replace(
            text_pooled=self.store.texts.gather("pooled", texts[rows]),
            image_pooled=self.store.images.gather("pooled", images[image_rows]),
        )
        return tokens.map(lambda tensor: tensor.to(self.device))


def load_content_hashes(config: Config, accelerator: Accelerator, graph: Graph) -> ContentHashes:
    """Hashes of a graph's texts and images. Called by all ranks; see :func:`read_content_hashes`."""
    folder = cache_folder(config.nodes)
    return read_content_hashes(graph.nodes, graph.images, config.nodes, graph.nodes_fingerprint, folder, accelerator)


def open_store(
    config: Config,
    accelerator: Accelerator,
    graph: Graph,
    content_hashes: ContentHashes,
    inputs: NodeInputs,
    towers: str,
    planned_nodes: int,
) -> CachedTowers | None:
    """Open the store of a run's tokens, after building what it lacks. Called by all ranks.

    Args:
        contents: of the graph's nodes.
        inputs: what live training would make tower inputs with.
        towers: the fingerprint of the towers' weights.
        planned_nodes: how many nodes the run would send through live towers.

    Returns:
        None where the towers are to run live: as asked for, or because of what a line of the log says.

    Raises:
        UserError: a store that was asked for by its folder cannot be built there.
    """
    made_by = raise_on_all_ranks(accelerator, lambda: recipe(config, accelerator.mixed_precision, inputs, towers))
    store = raise_on_all_ranks(accelerator, lambda: TowerStore(made_by.folder))
    shards = missing_shards(store, content_hashes)
    if any(gather_object([bool(shards)])):  # hosts may see different folders
        expected = cost(config, made_by, graph, inputs, shards)
        refused = None
        if config.tower_cache == "auto" and planned_nodes <= sum(len(shard.rows) for shard in shards) / 2:
            refused = f"the planned steps see {planned_nodes:,} nodes, fewer than a store of all would have to"
        refusals = gather_object([refused or refusal(made_by.folder, expected.bytes)])  # of each host's disk
        refused = next((reason for reason in refusals if reason is not None), None)
        if refused is not None and config.tower_cache == "auto":
            log(f"live towers: {refused}")
            return None
        if refused is not None:
            raise UserError(f"--tower_cache {config.tower_cache}: {refused}")
        build(config, accelerator, graph, inputs, made_by, shards, expected)
        store = raise_on_all_ranks(accelerator, lambda: _built(made_by.folder, content_hashes))
    if config.tower_cache_local is not None:
        store = _stage(store, Path(config.tower_cache_local), accelerator)
    resident = raise_on_all_ranks(accelerator, lambda: _is_resident(config, store, accelerator.device))
    where = f"in the memory of {accelerator.device}" if resident else "read as needed"
    log(f"tower store: {store.folder}, {len(graph.nodes):,} nodes, {where}")
    return raise_on_all_ranks(accelerator, lambda: CachedTowers(store, content_hashes, accelerator.device, resident))


def _built(folder: Path, content_hashes: ContentHashes) -> TowerStore:
    """The store after it was built. A network file system may take a minute to show what other hosts wrote."""
    deadline = time.monotonic() + VISIBLE_SECONDS
    while missing_shards(store := TowerStore(folder), content_hashes):
        if time.monotonic() > deadline:
            raise UserError(f"tower store: {folder} lacks entries after it was built; start again")
        time.sleep(1)
    return store


def existing_store(
    config: Config,
    accelerator: Accelerator,
    nodes: NodeTable,
    images: ImageSource,
    digest: str,
    inputs: NodeInputs,
    towers: str,
) -> CachedTowers | None:
    """The store of some nodes' exact tokens, if there is one and it has all of them. Called by all ranks.

    Args:
        digest: the node table's fingerprint when it was opened.
        towers: the fingerprint of the towers' weights.
    """
    config = dataclasses.replace(config, tower_cache_dtype="float32")
    made_by = recipe(config, accelerator.mixed_precision, inputs, towers)
    if not all(gather_object([made_by.folder.is_dir()])):
        return None  # and nothing is hashed for it
    content_hashes = read_content_hashes(nodes, images, config.nodes, digest, cache_folder(config.nodes), accelerator)
    store = raise_on_all_ranks(accelerator, lambda: TowerStore(made_by.folder))
    if any(gather_object([bool(missing_shards(store, content_hashes))])):
        return None
    return CachedTowers(store, content_hashes, accelerator.device)


def build_store(config: Config, accelerator: Accelerator, graph: Graph) -> None:
    """Build the store that a run with these settings would, and train nothing. Called by all ranks.

    Raises:
        UserError: it cannot be built.
    """
    if config.tower_cache in ("auto", "off"):  # whatever a run would decide
        config = dataclasses.replace(config, tower_cache=str(cache_folder(config.nodes)))
    towers = raise_on_all_ranks(accelerator, lambda: towers_fingerprint(read_tower_state(config.model_name)))
    check_same_towers(towers)
    tokenizer, processor = raise_on_all_ranks(accelerator, lambda: load_tokenizer_and_processor(config.model_name))
    inputs = NodeInputs(tokenizer, processor, 0, config.truncated_images)
    stored = open_store(config, accelerator, graph, load_content_hashes(config, accelerator, graph), inputs, towers, 0)
    if stored is not None:
        told = describe_image_status(stored.image_status.tolist())
        log("the store is whole" + (f"; images that are black or in part: {told}" if told else ""))


def _stage(store: TowerStore, local: Path, accelerator: Accelerator) -> TowerStore:
    """Copy a store's shards to a folder of each host, its ranks a share each; or use it as it is."""
    target = local / store.folder.name
    files = [*store.texts.files, *store.images.files]
    failure = None
    try:
        target.mkdir(parents=True, exist_ok=True)
        size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        for file in files[accelerator.local_process_index :: size]:
            with file.open("rb") as original:
                make_once(target / file.name, partial(shutil.copyfileobj, original))
    except OSError as error:
        failure = f"--tower_cache_local {local}: {error.strerror}"
    failures = [found for found in gather_object([failure]) if found is not None]
    if failures:
        log(f"the tower store is read where it is: {failures[0]}")
        return store
    return raise_on_all_ranks(accelerator, lambda: TowerStore(target))


def _is_resident(config: Config, store: TowerStore, device: torch.device) -> bool:
    if config.tower_cache_device == "cuda" and device.type != "cuda":
        raise UserError("--tower_cache_device cuda: there is no CUDA device")
    if config.tower_cache_device != "auto" or device.type != "cuda":
        return config.tower_cache_device == "cuda"
    size = sum(file.stat().st_size for file in (*store.texts.files, *store.images.files))
    return size <= GPU_SHARE * torch.cuda.mem_get_info(device)[0]
