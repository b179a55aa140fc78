"""The shared image cache: entries equal decoded images.

This holds while several processes write the file, after a writer was killed, and when the file is damaged.
"""

import errno
import multiprocessing
import os
import random
import re
import shutil
import signal
import time
from collections import Counter, namedtuple
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import targets
import torch
from accelerate.data_loader import BatchSamplerShard
from conftest import read_metrics, settings
from PIL import Image
from torch.utils.data import DataLoader

from mmgraph.arguments import parse_config
from mmgraph.cli import train_main
from mmgraph.data import image_cache
from mmgraph.data.batches import BatchCollator, EdgeBatch, EdgeRows, open_image_cache
from mmgraph.data.graph import load_graph
from mmgraph.data.image_cache import TICK_NS, ImageCache, missing_disk_space, slot_bytes, slots_by_frequency
from mmgraph.data.image_paths import ImagePaths
from mmgraph.data.image_source import UNRESOLVED_FILES, ImageFiles
from mmgraph.data.images import IMAGE_STATUS
from mmgraph.data.node_inputs import NodeInputs
from mmgraph.data.preprocessing import Preprocessing
from mmgraph.data.sampler import GlobalBatchSampler
from mmgraph.distributed.launch import build_accelerator
from mmgraph.loader.nodes_dataset import NodesDataset
from mmgraph.towers.clip import load_tokenizer_and_processor
from mmgraph.training.build import build_run
from mmgraph.utils.files import cache_folder, file_signature

SHAPE = (3, 32, 32)
FORK = multiprocessing.get_context("fork")


class Processor:
    size, crop_size, resample = {"shortest_edge": 32}, {"height": 32, "width": 32}, 3
    image_mean, image_std = [0.5] * 3, [0.25] * 3


def tokenize(texts: list[str], **_: Any) -> dict[str, torch.Tensor]:
    """Return constant tokens: these tests check only the images."""
    return dict.fromkeys(("input_ids", "attention_mask"), torch.ones(len(texts), 1, dtype=torch.int64))


def source_signature(path: str) -> bytes | None:
    return file_signature(path, image_cache.TICK_NS)


def wait_until_cacheable() -> None:
    """Wait until the files just written are old enough to be cached."""
    time.sleep(2 * TICK_NS / 1e9)


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """Twelve image files; number 3 is truncated."""
    generator = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(12)]
    for path in paths:
        Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    paths[3].write_bytes(paths[3].read_bytes()[:3000])
    wait_until_cacheable()
    return [str(path) for path in paths]


@pytest.fixture
def inputs(tmp_path: Path) -> NodeInputs:
    """Node inputs with a picture file for 12 rows, and no cache in memory."""
    file = ImageCache(tmp_path / "cache/pictures", np.arange(12, dtype=np.int32), SHAPE)
    return NodeInputs(tokenize, Processor(), 0, picture_file=file)


def count_decoded(inputs: NodeInputs, paths: list[Any]) -> int:
    """Read all images, compare them with decoded images, and return the number of decodes."""
    expected, expected_causes = NodeInputs(tokenize, Processor(), 0).read_images(paths)
    before = inputs.decoded
    pictures, causes = inputs.read_images(paths, range(len(paths)))
    assert torch.equal(pictures, expected) and causes == expected_causes
    return inputs.decoded - before


def test_cached_images_equal_decoded_images(inputs: NodeInputs, images: list[str], tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    paths = [*images[:8], None, str(tmp_path / "missing.png"), str(tmp_path / "broken.png"), str(tmp_path)]
    wait_until_cacheable()
    assert count_decoded(inputs, paths) == 9  # 8 and broken.png: missing files are not decoded
    assert count_decoded(inputs, paths) == 1  # broken.png is not cached: the error may be temporary
    reopened = ImageCache(inputs.picture_file.path, inputs.picture_file.slots, SHAPE)
    assert count_decoded(NodeInputs(tokenize, Processor(), 0, picture_file=reopened), paths) == 1
    causes = inputs.read_images(paths, range(12))[1]
    assert IMAGE_STATUS[causes[3]] == "truncated" and sum(cause > 0 for cause in causes) == 5


def test_images_without_a_slot_are_not_cached(images: list[str], tmp_path: Path) -> None:
    slots = np.array([0, -1, 1, *[-1] * 9], dtype=np.int32)
    inputs = NodeInputs(tokenize, Processor(), 0, picture_file=ImageCache(tmp_path / "file", slots, SHAPE))
    for _ in range(2):
        inputs.read_images(images)
    assert inputs.decoded == 24
    assert [count_decoded(inputs, images) for _ in range(3)] == [12, 10, 10]
    assert (tmp_path / "file").stat().st_size == 2 * slot_bytes(SHAPE)


@pytest.mark.parametrize("way", ["in place", "renamed", "touched"])
def test_changed_image_is_decoded_again(inputs: NodeInputs, images: list[str], way: str) -> None:
    count_decoded(inputs, images)
    first, second = Path(images[0]), Path(images[1])
    before = first.stat()
    content = second.read_bytes() if way != "touched" else first.read_bytes()
    target = first if way == "in place" else first.with_name("new.png")
    target.write_bytes(content.ljust(before.st_size, b"\0")[: before.st_size])  # same size
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))  # same time
    target.replace(first)
    wait_until_cacheable()
    assert [count_decoded(inputs, images) for _ in range(2)] == [1, 0]


def test_image_that_changes_while_decoded_is_not_cached(
    inputs: NodeInputs, images: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, before = inputs.picture_file, source_signature(images[0])

    def decode() -> tuple[torch.Tensor, int]:
        Path(images[0]).write_bytes(Path(images[1]).read_bytes())
        return torch.zeros(SHAPE, dtype=torch.uint8), 0

    assert file.read(0, UNRESOLVED_FILES, images[0], decode)[1] == 0 and file.get(0, before) is None
    wait_until_cacheable()
    assert count_decoded(inputs, images[:1]) == 1 and count_decoded(inputs, images[:1]) == 0
    monkeypatch.setattr(targets.IMAGE_CACHE_TICK_NS, 3600 * 10**9)  # all files changed more recently than this
    assert count_decoded(inputs, images[:1]) == 1 and source_signature(images[0]) is None


def test_damaged_entry_is_never_returned(inputs: NodeInputs, images: list[str]) -> None:
    file = inputs.picture_file
    count_decoded(inputs, images)
    content = file.path.read_bytes()
    signatures = [source_signature(path) for path in images]
    stored = [file.get(row, signatures[row])[0] for row in range(12)]
    generator = random.Random(0)
    for i in range(150):
        start = generator.randrange(len(content))
        length = generator.choice((1, 20, 5000))
        junk = bytes(length) if i % 2 else generator.randbytes(length)
        damaged = (content[:start] + junk + content[start + length :])[: len(content)] if i % 5 else content[:start]
        file.path.write_bytes(damaged)
        for row in range(12):
            slot = slice(row * file.slot_bytes, (row + 1) * file.slot_bytes)
            entry = file.get(row, signatures[row])
            assert (entry is not None) == (damaged[slot] == content[slot])
            assert entry is None or torch.equal(entry[0], stored[row])
    count_decoded(inputs, images)
    assert count_decoded(inputs, images) == 0 and file.path.read_bytes() == content


def test_entry_of_another_image_file_is_not_returned(inputs: NodeInputs, images: list[str]) -> None:
    signatures = {source_signature(path) for path in images}
    assert len(signatures) == 12 and all(len(signature or b"") == 16 for signature in signatures)
    assert source_signature(os.path.relpath(images[0])) == source_signature(images[0])
    count_decoded(inputs, images)
    assert inputs.picture_file.get(0, source_signature(images[1])) is None


LARGE = (3, 224, 224)
VERSIONS = {name * 16: torch.full(LARGE, name[0], dtype=torch.uint8) for name in (b"a", b"b")}


def write_forever(path: Path, started: Any) -> None:
    """Write two versions of three images, alternating, until the process is killed."""
    file = ImageCache(path, np.arange(3, dtype=np.int32), LARGE)
    started.set()
    while True:
        for row in range(3):
            for signature, picture in VERSIONS.items():
                file.put(row, signature, picture, 0)


def test_concurrent_and_killed_writers(tmp_path: Path) -> None:
    """Two processes that write different images to the same slots, until they are killed, never mix entries."""
    path = tmp_path / "file"
    file = ImageCache(path, np.arange(3, dtype=np.int32), LARGE)
    hits: Counter[bool] = Counter()

    def check_entries() -> None:
        for row in range(3):
            for signature, picture in VERSIONS.items():
                entry = file.get(row, signature)
                hits[entry is not None] += 1
                assert entry is None or torch.equal(entry[0], picture)

    generator = random.Random(0)
    for _ in range(10):
        started = [FORK.Event() for _ in range(2)]
        writers = [FORK.Process(target=write_forever, args=(path, event)) for event in started]
        for writer in writers:
            writer.start()
        assert all(event.wait(60) for event in started)
        end = time.monotonic() + generator.random() / 20
        while time.monotonic() < end:
            check_entries()
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
        check_entries()
    print(f"{hits[True]:,} complete entries read, {hits[False]:,} not found")
    assert hits[True] and hits[False]


def fill(inputs: NodeInputs, images: list[str], seed: int) -> None:
    torch.set_num_threads(1)
    order = random.Random(seed).sample(range(12), 12)
    inputs.read_images([images[row] for row in order], order)


@pytest.mark.parametrize("killed", [False, True])
def test_several_processes_fill_one_file(inputs: NodeInputs, images: list[str], killed: bool) -> None:
    generator = random.Random(1)
    for seed in range(0, 30 if killed else 3, 3):
        fillers = [FORK.Process(target=fill, args=(inputs, images, seed + i)) for i in range(3)]
        for filler in fillers:
            filler.start()
        if killed:
            time.sleep(generator.random() / 20)
            for filler in fillers:
                filler.kill()
        for filler in fillers:
            filler.join()
        assert killed or [filler.exitcode for filler in fillers] == [0, 0, 0]
    decoded = count_decoded(inputs, images)
    assert killed or decoded == 0
    assert count_decoded(inputs, images) == 0


class CountedRows:
    """Rows that accept only int arrays as an index, and record the largest one."""

    def __init__(self, rows: np.ndarray):
        self.rows, self.largest = rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, edges: np.ndarray) -> np.ndarray:
        assert isinstance(edges, np.ndarray) and edges.dtype.kind == "i"
        self.largest = max(self.largest, len(edges))
        return self.rows[edges]


@pytest.mark.parametrize(("nodes", "edges"), [(50, 90), (300, 2**20 + 1000), (7, 1)])
def test_most_frequent_nodes_have_slots(nodes: int, edges: int) -> None:
    rows = np.random.default_rng(nodes).zipf(1.3, (edges, 2)) % nodes
    count = Counter(rows.ravel().tolist())
    order = sorted(range(nodes), key=lambda row: (-count[row], row))
    for room in (0, 1, nodes // 2, nodes - 1):
        counted = CountedRows(rows)
        slots = slots_by_frequency(counted, nodes, room)  # type: ignore[arg-type]
        assert slots.dtype == np.int32 and counted.largest <= 2**20
        assert [int(np.flatnonzero(slots == slot)[0]) for slot in range(room)] == order[:room]
        assert (slots >= 0).sum() == room
    assert slots_by_frequency(rows, nodes, nodes + 1).tolist() == list(range(nodes))


Case = namedtuple("Case", "config preprocessing")


@pytest.fixture
def case(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Case]:
    monkeypatch.setenv("MMGRAPH_CACHE", str(tmp_path / "cache"))
    config = parse_config(
        settings(graph, tmp_path / "run", "--max_steps=3", "--report_to=none", "--cache_size=0", "--tower_cache=off")
    )
    yield Case(config, Preprocessing(load_tokenizer_and_processor(config.model_name)[1]))


def with_values(config: Any, **values: Any) -> Any:
    return type(config)(**{**vars(config), **values})


def test_number_of_slots_and_file_names(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    entry_bytes = slot_bytes((3, 72, 72))
    graph = load_graph(case.config)
    capsys.readouterr()
    names = set()
    for pictures in (0.5, 7.9, 8, 39.9, 40, 1000):
        config = with_values(case.config, image_cache_gb=pictures * entry_bytes / 1e9 * (1 + 1e-9))
        file = open_image_cache(config, graph, case.preprocessing, cache_folder(config.nodes))
        room = min(int(pictures), 40)
        assert (file.slots >= 0).sum() == room and file.path.stat().st_size == room * entry_bytes
        assert file.path.parent == tmp_path / "cache" and file.path.stat().st_blocks == 0  # sparse
        [message] = capsys.readouterr().out.splitlines()
        assert str(file.path) in message
        figures = re.findall(r"\b\d[\d.]*(?: GB)?\b", message.replace(str(file.path), ""))
        # images with a slot, nodes, size of the file
        assert figures == [str(room), "40", f"{room * entry_bytes / 1e9:.2f} GB"]
        names.add(file.path.name)
    assert len(names) == 5  # 40 and 1000 have the same name: both have room for all nodes
    config = with_values(case.config, image_cache_gb=8 * entry_bytes / 1e9 * (1 + 1e-9))
    for changed in (
        (with_values(config, truncated_images="black"), graph),
        (config, graph._replace(nodes_fingerprint="other")),
        (config, graph._replace(edges_fingerprint="other")),
    ):
        names.add(open_image_cache(*changed, case.preprocessing, cache_folder(config.nodes)).path.name)
    case.preprocessing.short_side += 8
    names.add(open_image_cache(config, graph, case.preprocessing, cache_folder(config.nodes)).path.name)
    assert len(names) == 9


def decoded_per_batch(config: Any) -> list[int]:
    run = build_run(config, build_accelerator(), load_graph(config))
    # a limit, because the stream continues with the next epoch
    steps = range(run.schedule.samples_per_epoch // config.global_batch_size)
    return [batch.decoded for _, batch in zip(steps, run.stream, strict=False)]


def test_trainer_decodes_each_image_once(case: Case, tmp_path: Path) -> None:
    first = decoded_per_batch(case.config)
    assert len(first) == 16 and all(isinstance(decoded, int) for decoded in first) and 30 <= sum(first) <= 40
    assert sum(decoded_per_batch(with_values(case.config, num_workers=2))) == 0
    for path in (tmp_path / "cache").glob("pictures-*"):
        path.unlink()
    assert sum(decoded_per_batch(with_values(case.config, image_cache_gb=0.0))) > 100
    assert not list((tmp_path / "cache").glob("pictures-*"))


def train(config: Any, tmp_path: Path, *flags: str) -> list[float]:
    folder = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
    graph = Path(config.nodes).parent
    more = ("--max_steps=3", "--report_to=none", "--cache_size=0", "--tower_cache=off", *flags)
    assert train_main(settings(graph, folder, *more)) == 0
    return [row["loss"] for row in read_metrics(folder)]


def cache_messages(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """Return the printed lines that name a file or a setting of the cache."""
    names = ("pictures-", "MMGRAPH_CACHE", "image_cache_gb")
    return [line for line in capsys.readouterr().out.splitlines() if any(name in line for name in names)]


def test_training_without_a_usable_cache(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = train(case.config, tmp_path, "--image_cache_gb=0")
    assert not cache_messages(capsys) and not list((tmp_path / "cache").glob("pictures-*"))

    (tmp_path / "file").write_text("a file where the folder should be")
    monkeypatch.setenv("MMGRAPH_CACHE", str(tmp_path / "file/cache"))
    assert train(case.config, tmp_path) == expected
    [message] = cache_messages(capsys)
    assert f"{tmp_path / 'file/cache'}/pictures-" in message and "MMGRAPH_CACHE" in message
    assert os.strerror(errno.ENOTDIR) in message

    monkeypatch.setenv("MMGRAPH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(targets.MISSING_DISK_SPACE, lambda path, size: 10**9)
    assert train(case.config, tmp_path) == expected
    [message] = cache_messages(capsys)
    assert str(tmp_path / "cache") in message and re.search(r"\b1\.00 GB\b", message) and "--image_cache_gb" in message
    assert not list((tmp_path / "cache").glob("pictures-*"))


def test_missing_room_counts_existing_bytes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    path = tmp_path / "no/folder/yet/file"
    assert missing_disk_space(path, 6000) == 1000 and missing_disk_space(path, 5000) == 0
    (tmp_path / "file").write_bytes(bytes(4096))
    assert missing_disk_space(tmp_path / "file", 9200) == 9200 - 5000 - (tmp_path / "file").stat().st_blocks * 512


@pytest.mark.parametrize("workers", [0, 2])
def test_full_disk_stops_only_the_cache(
    workers: int, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = train(case.config, tmp_path, "--image_cache_gb=0")
    write, written = os.pwrite, []

    def write_until_full(*args: Any) -> int:
        written.append(args)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*args)

    monkeypatch.setattr(os, "pwrite", write_until_full)
    assert train(case.config, tmp_path, f"--num_workers={workers}") == expected
    assert capsys.readouterr().out.count(os.strerror(errno.ENOSPC)) == 1
    assert len(written) == (0 if workers else 6)  # workers are forks with separate lists
    monkeypatch.undo()
    monkeypatch.setenv("MMGRAPH_CACHE", str(tmp_path / "cache"))
    assert sum(decoded_per_batch(case.config)) <= 35  # at least five images were cached


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_share_the_file(method: str, case: Case) -> None:
    config = case.config
    graph = load_graph(config)
    tokenizer, processor = load_tokenizer_and_processor(config.model_name)

    def batches(file: ImageCache | None, worker: bool) -> list[EdgeBatch]:
        inputs = NodeInputs(tokenizer, processor, 0, picture_file=file)
        collator = BatchCollator(graph.nodes, graph.images, inputs)
        start = {"num_workers": 1, "multiprocessing_context": method} if worker else {}
        return list(DataLoader(EdgeRows(graph.rows), 20, collate_fn=collator, **start))

    expected = batches(None, worker=False)
    file = open_image_cache(config, graph, case.preprocessing, cache_folder(config.nodes))
    for worker, decoded in ((True, 40), (False, 0)):
        actual = batches(file, worker)
        assert sum(batch.decoded for batch in actual) == decoded
        assert all(
            torch.equal(a.inputs["pictures"], b.inputs["pictures"]) for a, b in zip(actual, expected, strict=True)
        )


def read_as_rank(rank: int, folder: Path, rows: np.ndarray, file: ImageCache | None, barrier: Any, out: Any) -> None:
    """Read two epochs of a rank's batches, in step with the other rank.

    Put (epoch, edge ends, unique nodes, decoded images) of each batch into ``out``.
    """
    count = int(rows.max()) + 1
    nodes = pd.DataFrame({"short_name": "", "summary": "", "image_path": [f"{i}.jpg" for i in range(count)]})
    inputs = NodeInputs(tokenize, Processor(), 128, picture_file=file)
    collator = BatchCollator(NodesDataset(nodes), ImageFiles(ImagePaths(folder / "nodes.csv", folder)), inputs)
    sampler = GlobalBatchSampler(len(rows), 64, seed=42)
    shard = BatchSamplerShard(sampler, 2, rank, split_batches=True, even_batches=False)
    loader = DataLoader(
        EdgeRows(rows), batch_sampler=shard, collate_fn=collator, num_workers=4, persistent_workers=True
    )
    for epoch in (1, 2):
        sampler.begin(epoch)
        for batch in loader:
            barrier.wait(60)
            out.put((epoch, len(batch.rows), len(batch.unique), batch.decoded))


@pytest.mark.slow
def test_decoded_images_per_epoch(tmp_path: Path) -> None:
    """Count the images that two ranks with four workers each decode, on a graph with skewed degrees.

    With room for all images, the first epoch decodes at most 1.2 images per node, and the second epoch none. With room
    for the 8 % most frequent nodes, at least their share of the edge ends, minus 0.01, needs no decoding in the second
    epoch.
    """
    nodes, edges = 2000, 220 * 64  # a multiple of the batch size: an epoch has all edges
    generator = np.random.default_rng(0)
    weights = 1 / np.arange(1, nodes + 1) ** 0.8
    rows = generator.choice(nodes, (edges, 2), p=weights / weights.sum())
    rows = np.unique(rows, return_inverse=True)[1].reshape(-1, 2)  # remove nodes without an edge
    nodes = int(rows.max()) + 1
    for i in range(nodes):
        Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((40, 40)).save(
            tmp_path / f"{i}.jpg"
        )
    few = nodes * 8 // 100
    ends = np.sort(np.bincount(rows.ravel()))[::-1]
    for room in (nodes, few):
        file = ImageCache(tmp_path / f"room{room}", slots_by_frequency(rows, nodes, room), SHAPE)
        barrier, out = FORK.Barrier(2), FORK.SimpleQueue()
        ranks = [FORK.Process(target=read_as_rank, args=(i, tmp_path, rows, file, barrier, out)) for i in range(2)]
        for rank in ranks:
            rank.start()
        counts = {1: np.zeros(3, dtype=int), 2: np.zeros(3, dtype=int)}
        for _ in range(2 * 2 * (edges // 64)):
            epoch, *batch_counts = out.get()
            counts[epoch] += batch_counts
        for rank in ranks:
            rank.join()
        for epoch, (lookups, unique, decoded) in counts.items():
            print(
                f"room for {room} of {nodes}, epoch {epoch}: {decoded:,} decoded; cached: {1 - decoded / lookups:.1%} "
                f"of {lookups:,} edge ends, {1 - decoded / unique:.1%} of {unique:,} images"
            )
        if room == nodes:
            assert 1 - counts[1][2] / counts[1][0] >= 1 - 1.2 * nodes / (2 * edges) and counts[2][2] == 0
        else:
            assert 1 - counts[2][2] / counts[2][0] >= ends[:few].sum() / ends.sum() - 0.01
