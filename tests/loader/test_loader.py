"""Datasets, collators and the image cache."""

import gc
import pkgutil
import threading
import tracemalloc
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import targets
import torch
from torch.utils.data import DataLoader

from mmgraph import GraphEdgeDataset, InferenceCollator, MultimodalCollator, NodesDataset
from mmgraph.bench.data import private_mb
from mmgraph.data.batches import start_worker
from mmgraph.data.input_rules import InputRules
from mmgraph.data.lru import ShardedLRU
from mmgraph.data.tables import read_edges, read_nodes
from mmgraph.towers.clip import load_tokenizer_and_processor


@pytest.fixture
def dataset(graph: Path, monkeypatch: pytest.MonkeyPatch) -> GraphEdgeDataset:
    monkeypatch.chdir(graph)  # the image paths are relative to this folder
    return GraphEdgeDataset(read_nodes("nodes.csv"), read_edges("edges.csv"))


@pytest.fixture
def collator(graph: Path) -> MultimodalCollator:
    return MultimodalCollator(*load_tokenizer_and_processor(str(graph / "towers")))


@pytest.mark.parametrize(
    ("node", "text"),
    [
        ({"summary": "one two three four", "short_name": "s"}, "one two three four"),
        ({"summary": "one two three", "short_name": "short name"}, "short name"),
        ({"summary": None, "short_name": "s"}, "s"),
        ({"summary": float("nan"), "short_name": float("nan")}, " "),
        ({"summary": "", "short_name": "  "}, " "),
        ({"summary": "nan", "short_name": "NA"}, "NA"),
    ],
)
def test_text_of_a_node(node: dict[str, Any], text: str) -> None:
    assert InputRules().text(node) == text


def test_collated_pairs(dataset: GraphEdgeDataset, collator: MultimodalCollator) -> None:
    pairs = [dataset[i] for i in range(5)]
    batch = collator(pairs)
    assert list(batch) == ["input_ids", "attention_mask", "pixel_values"]
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (10, 77)
    assert batch["input_ids"].dtype == batch["attention_mask"].dtype == torch.int64
    assert batch["pixel_values"].shape == (10, 3, 72, 72) and batch["pixel_values"].dtype == torch.float32
    single = InferenceCollator(collator.inputs.tokenizer, _Processor())
    alone = single([node for pair in zip(*pairs, strict=True) for node in pair])  # anchors, then positives
    assert all(torch.equal(batch[name], alone[name]) for name in batch)


class _Processor:
    """An image processor with only the attributes that a collator needs."""

    size, crop_size, resample = {"shortest_edge": 72}, {"height": 72, "width": 72}, 3
    image_mean, image_std = [0.48145466, 0.4578275, 0.40821073], [0.26862954, 0.26130258, 0.27577711]


def test_node_rows_are_dicts_without_the_id(dataset: GraphEdgeDataset) -> None:
    nodes = NodesDataset(read_nodes("nodes.csv"))
    assert len(nodes) == 40 and list(nodes[3]) == ["short_name", "summary", "image_path"]
    assert nodes[3]["short_name"] == "node 3" and nodes[-1]["short_name"] == "node 39"
    with pytest.raises(IndexError):
        nodes[40]


@pytest.mark.slow
def test_a_table_takes_less_than_half_of_a_dict_of_dicts(tmp_path: Path) -> None:
    count = 100_000
    rows = [(f"n{i}", f"name {i}", f"a summary of node {i} that has words", f"images/{i}.jpg") for i in range(count)]
    frame = pd.DataFrame(rows, columns=["node_id", "short_name", "summary", "image_path"])
    frame.to_csv(tmp_path / "nodes.csv", index=False)
    del rows, frame
    nodes = read_nodes(tmp_path / "nodes.csv")
    table = int(nodes.memory_usage(index=True, deep=True).sum())
    tracemalloc.start()
    dataset = NodesDataset(nodes)
    ours = table + tracemalloc.get_traced_memory()[1]
    copied = nodes.set_index("node_id").to_dict("index")  # the original trainer stored this and the table
    theirs = table + tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert len(copied) == len(dataset) == count
    print(f"{ours / 1e6:.1f} MB against {theirs / 1e6:.1f} MB: {1 - ours / theirs:.0%} less")
    assert ours < 0.5 * theirs


def count_reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    reads: list[str] = []
    read = pkgutil.resolve_name(targets.READ_FILE)
    monkeypatch.setattr(targets.READ_FILE, lambda path: reads.append(path) or read(path))
    return reads


def test_a_second_pass_over_a_graph_that_fits_reads_nothing(
    dataset: GraphEdgeDataset, collator: MultimodalCollator, monkeypatch: pytest.MonkeyPatch
) -> None:
    reads = count_reads(monkeypatch)
    passes = []
    for _ in range(2):
        first = len(reads)
        passes.append([collator([dataset[i] for i in range(start, start + 20)]) for start in range(0, 200, 20)])
        if not first:
            assert len(reads) == len(set(reads)) <= 40  # 400 requests, but each image is read once
            seen = len(reads)
    assert len(reads) == seen
    assert all(torch.equal(a["pixel_values"], b["pixel_values"]) for a, b in zip(*passes, strict=True))


def test_cache_size_limits_the_cache(graph: Path, dataset: GraphEdgeDataset, monkeypatch: pytest.MonkeyPatch) -> None:
    reads = count_reads(monkeypatch)
    tokenizer, processor = load_tokenizer_and_processor(str(graph / "towers"))
    for size in (0, 1, 5):
        collator = MultimodalCollator(tokenizer, processor, cache_size=size)
        reads.clear()
        for _ in range(2):
            collator([dataset[i] for i in range(50)])
        assert len(collator.inputs.cache) == size and len(reads) > 50
    assert MultimodalCollator(tokenizer, processor).inputs.cache.capacity == 128


def test_the_cache_drops_the_least_recently_used_entry() -> None:
    """Random lookups agree with a plain list as cache, for capacities below and above the number of cache shards."""
    for capacity in (1, 3, 7, 20, 60):
        cache: ShardedLRU[int] = ShardedLRU(capacity)
        entries: list[int] = []
        generator = torch.Generator().manual_seed(capacity)
        for key in torch.randint(3 * capacity, (2000,), generator=generator).tolist():
            missed: list[int] = []
            assert cache.get(f"path/{key}", lambda key=key, missed=missed: missed.append(key) or key) == key
            assert bool(missed) == (key not in entries)
            if key in entries:
                entries.remove(key)
            entries = [*entries, key][-capacity:]
            assert len(cache) == len(entries)


def test_the_cache_is_safe_under_threads() -> None:
    cache: ShardedLRU[str] = ShardedLRU(50)
    wrong: list[str] = []
    barrier = threading.Barrier(8)

    def work(seed: int) -> None:
        barrier.wait()
        keys = torch.randint(200, (3000,), generator=torch.Generator().manual_seed(seed)).tolist()
        wrong.extend(str(key) for key in keys if cache.get(key, lambda key=key: f"value {key}") != f"value {key}")

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(work, range(8)))
    assert not wrong and 40 <= len(cache) <= 50


@pytest.mark.parametrize(
    "method", ["fork", *(pytest.param(name, marks=pytest.mark.slow) for name in ("forkserver", "spawn"))]
)
def test_workers_with_every_start_method(dataset: GraphEdgeDataset, collator: MultimodalCollator, method: str) -> None:
    expected = [collator([dataset[i] for i in range(start, start + 50)]) for start in range(0, 200, 50)]
    loader = DataLoader(dataset, 50, collate_fn=collator, num_workers=1, multiprocessing_context=method)
    for batch, other in zip(loader, expected, strict=True):
        assert all(torch.equal(batch[name], other[name]) for name in other)


def _collected(_: Any) -> float:
    gc.collect()
    return private_mb()


def test_a_worker_copies_nothing_of_its_parent() -> None:
    """After a garbage collection, a worker has less than half of the private memory that it has without gc.freeze.

    Without it, the collector writes to every object that it visits, which copies the pages shared with the parent.
    """

    def private_memory(**settings: Any) -> float:
        [after] = DataLoader(range(1), num_workers=1, collate_fn=_collected, **settings)
        return float(after)

    unfrozen, frozen = private_memory(), private_memory(worker_init_fn=start_worker)
    print(f"private memory of a worker after garbage collection: {frozen:.1f} MB; {unfrozen:.1f} MB without gc.freeze")
    assert frozen < unfrozen / 2
