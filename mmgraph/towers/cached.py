"""The token source that reads a tower store, and functions that open and build the store."""

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
from mmgraph.data.images import count_image_status, describe_image_status, image_remarks
from mmgraph.data.input_rules import InputRules
from mmgraph.data.node_inputs import NodeInputs
from mmgraph.data.node_table import NodeTable
from mmgraph.distributed.collectives import raise_on_all_ranks
from mmgraph.errors import UserError
from mmgraph.towers.fingerprint import check_same_towers, towers_fingerprint
from mmgraph.towers.load import load_tokenizer_and_processor, read_tower_state
from mmgraph.towers.remarks import lacks_remarks
from mmgraph.towers.resident import ResidentTokens
from mmgraph.towers.store import TowerStore
from mmgraph.towers.store_builder import build
from mmgraph.towers.store_plan import cost, missing_shards, recipe, refusal
from mmgraph.towers.tokens import Tokens
from mmgraph.utils.device_copies import to_device
from mmgraph.utils.error_text import explain_out_of_memory
from mmgraph.utils.files import cache_folder, create_once
from mmgraph.utils.log import log

VISIBLE_SECONDS = 120  # maximum wait for files that other hosts have written; a network file system may show them late
GPU_SHARE = 0.5  # --tower_cache_device auto: maximum size of a store in GPU memory, as a fraction of the free memory


class CachedTowers:
    """Token source that reads a tower store.

    Args:
        store: a store with an entry for each text and image in ``content_hashes``.
        content_hashes: hashes of the graph's texts and images.
        device: device of the returned tokens.
        resident: whether to load the tokens of all nodes to the device's memory in advance.

    Raises:
        UserError: the store lacks entries.
    """

    def __init__(self, store: TowerStore, content_hashes: ContentHashes, device: torch.device, resident: bool = False):
        self.store, self.device = store, device
        self.texts, self.images = (
            store.texts.find(content_hashes.texts),
            store.images.find(content_hashes.images),
        )  # (N,) int64, indices of the nodes' entries
        if min(self.texts.min(), self.images.min()) < 0:
            raise UserError(f"tower store: {store.folder} lacks entries; run the same command again to build them")
        self.store_indices = self.texts, self.images
        unique, inverse = np.unique(self.images, return_inverse=True)
        statuses = [shard["causes"][entries] for shard, entries in store.images.by_shard(unique)]
        self.image_status = torch.cat(statuses).numpy()[inverse]  # (N,) uint8, indices into IMAGE_STATUS
        self.resident: ResidentTokens | None = None
        if resident:  # from here, self.texts and self.images index the entries on the device
            texts, self.texts = np.unique(self.texts, return_inverse=True)
            images, self.images = np.unique(self.images, return_inverse=True)
            self.resident = ResidentTokens.load(store, texts, images, device)
            self.lengths = self.resident.offsets.diff().cpu().numpy()  # (N_text,) tokens per text

    def batches(self, loader: Iterable[EdgeBatch]) -> Iterator[EdgeBatch]:
        """Yield the loader's batches with tokens. While a step runs, a thread reads the tokens of the next batch."""
        # The current CUDA device belongs to a thread. A new thread would use the first GPU. Accelerate's device has no
        # index if there is one process, and set_device() needs an index.
        on_cuda = self.device.type == "cuda"
        select_device = partial(torch.cuda.set_device, torch.cuda.current_device()) if on_cuda else None
        with ThreadPoolExecutor(1, initializer=select_device) as reader:
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
        text, image = to_device(texts, self.device), to_device(images, self.device)
        return self.resident.tokens(text, image, length=int(self.lengths[texts].max()))

    def _finish(self, batch: EdgeBatch, tokens: "Future[Tokens]") -> EdgeBatch:
        return batch._replace(prefetched=tokens.result(), image_status=self.image_status[batch.unique])

    def tokens(self, batch: EdgeBatch, micro_batches: int = 1) -> Tokens:
        """Return the tokens of the batch's U unique nodes, on the device. ``micro_batches`` has no effect here."""
        tokens: Tokens = batch.prefetched
        return tokens.map(lambda tensor: tensor.to(self.device, non_blocking=True))

    def pooled_tokens(self, rows: np.ndarray, image_rows: np.ndarray) -> Tokens:
        """Return tokens and pooled outputs, on the device, like :func:`mmgraph.towers.live.run_towers`.

        Args:
            rows: (U,) rows of the nodes whose texts are used.
            image_rows: (U,) rows of the nodes whose images are used.
        """
        texts, images = self.store_indices
        tokens = self._read(rows, image_rows)._replace(
            text_pooled=self.store.texts.gather("pooled", texts[rows]),
            image_pooled=self.store.images.gather("pooled", images[image_rows]),
        )
        return tokens.map(lambda tensor: tensor.to(self.device))


def load_content_hashes(config: Config, accelerator: Accelerator, graph: Graph) -> ContentHashes:
    """Return the hashes of a graph's texts and images. Call on all ranks. See :func:`read_content_hashes`."""
    folder = cache_folder(config.nodes)
    return read_content_hashes(
        graph.nodes, graph.images, config.nodes, graph.nodes_fingerprint, InputRules.of(config), folder, accelerator
    )


def open_store(
    config: Config,
    accelerator: Accelerator,
    graph: Graph,
    content_hashes: ContentHashes,
    inputs: NodeInputs,
    towers: str,
    planned_nodes: int,
) -> CachedTowers | None:
    """Open the tower store of a run. If entries are missing, build them first. Call on all ranks.

    Args:
        config, accelerator, graph: settings, Accelerator and data of the run.
        content_hashes: hashes of the graph's texts and images.
        inputs: converts texts and images to tower inputs.
        towers: fingerprint of the towers' weights.
        planned_nodes: number of nodes that live towers would process in this run. Each repetition of a node counts.

    Returns:
        The token source; None if the towers must run live. This happens only with ``--tower_cache auto``, and the
        reason is logged.

    Raises:
        UserError: ``config.tower_cache`` is a folder in which the store cannot be built, or the store is damaged.
    """
    store_recipe = raise_on_all_ranks(accelerator, lambda: recipe(config, accelerator.mixed_precision, inputs, towers))
    store = raise_on_all_ranks(accelerator, lambda: TowerStore(store_recipe.folder))
    shards = missing_shards(store, content_hashes)
    if any(gather_object([bool(shards)])):  # ranks can differ, because each host may have a separate folder
        expected = cost(config, store_recipe, graph, inputs, shards)
        refused = None
        if config.tower_cache == "auto" and planned_nodes <= sum(len(shard.rows) for shard in shards) / 2:
            refused = f"live towers would process {planned_nodes:,} nodes, not more than the tower store lacks"
        # Ranks can differ, because each host may have a separate disk. One refusal counts for all ranks.
        refusals = gather_object([refused or refusal(store_recipe.folder, expected.bytes)])
        refused = next((reason for reason in refusals if reason is not None), None)
        if refused is not None and config.tower_cache == "auto":
            log(f"the towers run live: {refused}")
            return None
        if refused is not None:
            raise UserError(
                f"--tower_cache {config.tower_cache}: {refused}; set another folder, or off to run the towers live"
            )
        build(config, accelerator, graph, inputs, store_recipe, shards, expected)
        store = raise_on_all_ranks(accelerator, lambda: _reopen_after_build(store_recipe.folder, content_hashes))
    if config.tower_cache_local is not None:
        store = _stage(store, Path(config.tower_cache_local), accelerator)
    resident = raise_on_all_ranks(accelerator, lambda: _is_resident(config, store, accelerator.device))
    where = f"tokens in the memory of {accelerator.device}" if resident else "tokens are read from disk as needed"
    log(f"tower store: {store.folder}, {len(graph.nodes):,} nodes, {where}")
    cached = raise_on_all_ranks(accelerator, lambda: _load(store, content_hashes, accelerator.device, resident))
    for remark in image_remarks(count_image_status(cached.image_status), inputs.rules):
        log(remark)
    if accelerator.is_main_process and lacks_remarks(store.images.files):
        log("an older version built this store, so transparent and 16-bit grey images are not counted")
    return cached


def _load(store: TowerStore, content_hashes: ContentHashes, device: torch.device, resident: bool) -> CachedTowers:
    with explain_out_of_memory("set --tower_cache_device cpu to read the tokens from disk"):
        return CachedTowers(store, content_hashes, device, resident)


def _reopen_after_build(folder: Path, content_hashes: ContentHashes) -> TowerStore:
    """Open a store that was just built.

    A network file system may take a minute to show the files that other hosts have written. This function waits for
    these files.

    Raises:
        UserError: the store still lacks entries after :data:`VISIBLE_SECONDS`.
    """
    deadline = time.monotonic() + VISIBLE_SECONDS
    while missing_shards(store := TowerStore(folder), content_hashes):
        if time.monotonic() > deadline:
            raise UserError(f"tower store: {folder} still lacks entries after the build; run the same command again")
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
    """Open the tower store with float32 tokens. Build nothing. Call on all ranks.

    Args:
        config, accelerator: settings of the run, and the Accelerator of this launch.
        nodes, images: the graph's node table and image source.
        digest: fingerprint of the node table, from the time when the table was opened.
        inputs: contains the tokenizer and the preprocessing.
        towers: fingerprint of the towers' weights.

    Returns:
        The token source; None if the store does not exist, or lacks the text or image of a node.

    Raises:
        UserError: the store is damaged.
    """
    config = dataclasses.replace(config, tower_cache_dtype="float32")
    store_recipe = recipe(config, accelerator.mixed_precision, inputs, towers)
    if not all(gather_object([store_recipe.folder.is_dir()])):
        return None  # return before the nodes are hashed: only a store needs the hashes
    content_hashes = read_content_hashes(
        nodes, images, config.nodes, digest, inputs.rules, cache_folder(config.nodes), accelerator
    )
    store = raise_on_all_ranks(accelerator, lambda: TowerStore(store_recipe.folder))
    if any(gather_object([bool(missing_shards(store, content_hashes))])):
        return None
    return CachedTowers(store, content_hashes, accelerator.device)


def build_store(config: Config, accelerator: Accelerator, graph: Graph) -> None:
    """Build the tower store that a run with these settings would use, without training. Call on all ranks.

    Raises:
        UserError: the store cannot be built.
    """
    if config.tower_cache in ("auto", "off"):  # build the store even if a run would use live towers
        config = dataclasses.replace(config, tower_cache=str(cache_folder(config.nodes)))
    towers = raise_on_all_ranks(accelerator, lambda: towers_fingerprint(read_tower_state(config.model_name)))
    check_same_towers(towers)
    tokenizer, processor = raise_on_all_ranks(accelerator, lambda: load_tokenizer_and_processor(config.model_name))
    inputs = NodeInputs(tokenizer, processor, 0, InputRules.of(config))
    stored = open_store(config, accelerator, graph, load_content_hashes(config, accelerator, graph), inputs, towers, 0)
    if stored is not None:
        counts = describe_image_status(count_image_status(stored.image_status))
        log("the tower store is complete" + (f"; black or partial images: {counts}" if counts else ""))


def _stage(store: TowerStore, local: Path, accelerator: Accelerator) -> TowerStore:
    """Copy a store's shards to a local folder of each host, and open the copy.

    Each rank of a host copies a part of the shards. If a copy fails on any rank, all ranks use the original store, and
    the reason is logged.
    """
    target = local / store.folder.name
    files = [*store.texts.files, *store.images.files]
    failure = None
    try:
        target.mkdir(parents=True, exist_ok=True)
        size = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        for file in files[accelerator.local_process_index :: size]:
            with file.open("rb") as original:
                create_once(target / file.name, partial(shutil.copyfileobj, original))
    except OSError as error:
        failure = f"--tower_cache_local {local}: {error.strerror}"
    failures = [reason for reason in gather_object([failure]) if reason is not None]
    if failures:
        log(f"the tower store could not be copied, so it is read from its original folder: {failures[0]}")
        return store
    return raise_on_all_ranks(accelerator, lambda: TowerStore(target))


def _is_resident(config: Config, store: TowerStore, device: torch.device) -> bool:
    if config.tower_cache_device == "cuda" and device.type != "cuda":
        raise UserError("--tower_cache_device cuda: this run has no CUDA device; set --tower_cache_device auto or cpu")
    if config.tower_cache_device != "auto" or device.type != "cuda":
        return config.tower_cache_device == "cuda"
    size = sum(file.stat().st_size for file in (*store.texts.files, *store.images.files))
    return size <= GPU_SHARE * torch.cuda.mem_get_info(device)[0]
