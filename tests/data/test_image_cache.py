"""The shared image cache: never another picture than decoding gives, whoever writes, whatever happens to the file."""

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
from mmgraph.data.batches import BatchCollator, EdgeBatch, EdgeRows, shared_pictures
from mmgraph.data.graph import load_graph
from mmgraph.data.image_cache import TICK_NS, PictureFile, missing_room, slot_bytes, slots_by_frequency
from mmgraph.data.image_paths import ImagePaths
from mmgraph.data.image_source import AS_GIVEN, ImageFiles
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
    """Pictures are what is looked at here."""
    return dict.fromkeys(("input_ids", "attention_mask"), torch.ones(len(texts), 1, dtype=torch.int64))


def source_signature(path: str) -> bytes | None:
    return file_signature(path, image_cache.TICK_NS)


def settle() -> None:
    """Let what was just written become old enough to be kept."""
    time.sleep(2 * TICK_NS / 1e9)


@pytest.fixture
def images(tmp_path: Path) -> list[str]:
    """Twelve image files, of which one ends early."""
    generator = np.random.default_rng(0)
    paths = [tmp_path / f"{i}.png" for i in range(12)]
    for path in paths:
        Image.fromarray(generator.integers(0, 256, (40, 50, 3), dtype=np.uint8)).save(path)
    paths[3].write_bytes(paths[3].read_bytes()[:3000])
    settle()
    return [str(path) for path in paths]


@pytest.fixture
def inputs(tmp_path: Path) -> NodeInputs:
    """With a file for 12 rows and nothing else that caches."""
    file = PictureFile(tmp_path / "cache/pictures", np.arange(12, dtype=np.int32), SHAPE)
    return NodeInputs(tokenize, Processor(), 0, picture_file=file)


def decoded_by(inputs: NodeInputs, paths: list[Any]) -> int:
    """Read all, compare with decoding, and count what was decoded."""
    expected, expected_causes = NodeInputs(tokenize, Processor(), 0).pictures(paths)
    before = inputs.decoded
    found, causes = inputs.pictures(paths, range(len(paths)))
    assert torch.equal(found, expected) and causes == expected_causes
    return inputs.decoded - before


def test_what_is_kept_is_what_decoding_gives(inputs: NodeInputs, images: list[str], tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    paths = [*images[:8], None, str(tmp_path / "missing.png"), str(tmp_path / "broken.png"), str(tmp_path)]
    settle()
    assert decoded_by(inputs, paths) == 9  # 8 and the broken one: what is not there is not decoded
    assert decoded_by(inputs, paths) == 1  # why a file is not readable may pass
    again = PictureFile(inputs.picture_file.path, inputs.picture_file.slots, SHAPE)
    assert decoded_by(NodeInputs(tokenize, Processor(), 0, picture_file=again), paths) == 1
    causes = inputs.pictures(paths, range(12))[1]
    assert IMAGE_STATUS[causes[3]] == "truncated" and sum(cause > 0 for cause in causes) == 5


def test_without_rows_and_without_a_slot_nothing_is_kept(images: list[str], tmp_path: Path) -> None:
    slots = np.array([0, -1, 1, *[-1] * 9], dtype=np.int32)
    inputs = NodeInputs(tokenize, Processor(), 0, picture_file=PictureFile(tmp_path / "file", slots, SHAPE))
    for _ in range(2):
        inputs.pictures(images)
    assert inputs.decoded == 24
    assert [decoded_by(inputs, images) for _ in range(3)] == [12, 10, 10]
    assert (tmp_path / "file").stat().st_size == 2 * slot_bytes(SHAPE)


@pytest.mark.parametrize("way", ["in place", "renamed", "touched"])
def test_an_image_that_changed_is_decoded_anew(inputs: NodeInputs, images: list[str], way: str) -> None:
    decoded_by(inputs, images)
    first, second = Path(images[0]), Path(images[1])
    before = first.stat()
    content = second.read_bytes() if way != "touched" else first.read_bytes()
    target = first if way == "in place" else first.with_name("new.png")
    target.write_bytes(content.ljust(before.st_size, b"\0")[: before.st_size])  # the same size, and
    os.utime(target, ns=(before.st_atime_ns, before.st_mtime_ns))  # the same time
    target.replace(first)
    settle()
    assert [decoded_by(inputs, images) for _ in range(2)] == [1, 0]


def test_an_image_that_is_changing_is_not_kept(
    inputs: NodeInputs, images: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    file, before = inputs.picture_file, source_signature(images[0])

    def decode() -> tuple[torch.Tensor, int]:
        Path(images[0]).write_bytes(Path(images[1]).read_bytes())
        return torch.zeros(SHAPE, dtype=torch.uint8), 0

    assert file.read(0, AS_GIVEN, images[0], decode)[1] == 0 and file.get(0, before) is None
    settle()
    assert decoded_by(inputs, images[:1]) == 1 and decoded_by(inputs, images[:1]) == 0
    monkeypatch.setattr(targets.PICTURE_TICK_NS, 3600 * 10**9)  # all files are this young
    assert decoded_by(inputs, images[:1]) == 1 and source_signature(images[0]) is None


def test_a_damaged_entry_is_never_returned(inputs: NodeInputs, images: list[str]) -> None:
    file = inputs.picture_file
    decoded_by(inputs, images)
    whole = file.path.read_bytes()
    signatures = [source_signature(path) for path in images]
    kept = [file.get(row, signatures[row])[0] for row in range(12)]
    generator = random.Random(0)
    for i in range(150):
        start = generator.randrange(len(whole))
        length = generator.choice((1, 20, 5000))
        junk = bytes(length) if i % 2 else generator.randbytes(length)
        damaged = (whole[:start] + junk + whole[start + length :])[: len(whole)] if i % 5 else whole[:start]
        file.path.write_bytes(damaged)
        for row in range(12):
            place = slice(row * file.slot_bytes, (row + 1) * file.slot_bytes)
            found = file.get(row, signatures[row])
            assert (found is not None) == (damaged[place] == whole[place])
            assert found is None or torch.equal(found[0], kept[row])
    decoded_by(inputs, images)
    assert decoded_by(inputs, images) == 0 and file.path.read_bytes() == whole


def test_only_the_same_image_file_is_found(inputs: NodeInputs, images: list[str]) -> None:
    signatures = {source_signature(path) for path in images}
    assert len(signatures) == 12 and all(len(signature or b"") == 16 for signature in signatures)
    assert source_signature(os.path.relpath(images[0])) == source_signature(images[0])
    decoded_by(inputs, images)
    assert inputs.picture_file.get(0, source_signature(images[1])) is None


LARGE = (3, 224, 224)
VERSIONS = {name * 16: torch.full(LARGE, name[0], dtype=torch.uint8) for name in (b"a", b"b")}


def write_for_ever(path: Path, started: Any) -> None:
    """Puts pictures of two states of three image files, in turn."""
    file = PictureFile(path, np.arange(3, dtype=np.int32), LARGE)
    started.set()
    while True:
        for row in range(3):
            for signature, picture in VERSIONS.items():
                file.put(row, signature, picture, 0)


def test_writers_that_are_killed_and_writers_at_once(tmp_path: Path) -> None:
    """Two processes write other pictures to the same slots, until they are killed anywhere: none is ever mixed."""
    path = tmp_path / "file"
    file = PictureFile(path, np.arange(3, dtype=np.int32), LARGE)
    found: Counter[bool] = Counter()

    def look() -> None:
        for row in range(3):
            for signature, picture in VERSIONS.items():
                entry = file.get(row, signature)
                found[entry is not None] += 1
                assert entry is None or torch.equal(entry[0], picture)

    generator = random.Random(0)
    for _ in range(10):
        started = [FORK.Event() for _ in range(2)]
        writers = [FORK.Process(target=write_for_ever, args=(path, event)) for event in started]
        for writer in writers:
            writer.start()
        assert all(event.wait(60) for event in started)
        end = time.monotonic() + generator.random() / 20
        while time.monotonic() < end:
            look()
        for writer in writers:
            os.kill(writer.pid, signal.SIGKILL)
            writer.join()
        look()
    print(f"{found[True]:,} entries found whole, {found[False]:,} not found")
    assert found[True] and found[False]


def fill(inputs: NodeInputs, images: list[str], seed: int) -> None:
    torch.set_num_threads(1)
    order = random.Random(seed).sample(range(12), 12)
    inputs.pictures([images[row] for row in order], order)


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
    decoded = decoded_by(inputs, images)
    assert killed or decoded == 0
    assert decoded_by(inputs, images) == 0


class Mapped:
    """Rows that are indexed by int arrays alone."""

    def __init__(self, rows: np.ndarray):
        self.rows, self.largest = rows, 0

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, edges: np.ndarray) -> np.ndarray:
        assert isinstance(edges, np.ndarray) and edges.dtype.kind == "i"
        self.largest = max(self.largest, len(edges))
        return self.rows[edges]


@pytest.mark.parametrize(("nodes", "edges"), [(50, 90), (300, 2**20 + 1000), (7, 1)])
def test_slots_are_of_the_most_frequent_nodes(nodes: int, edges: int) -> None:
    rows = np.random.default_rng(nodes).zipf(1.3, (edges, 2)) % nodes
    count = Counter(rows.ravel().tolist())
    order = sorted(range(nodes), key=lambda row: (-count[row], row))
    for room in (0, 1, nodes // 2, nodes - 1):
        mapped = Mapped(rows)
        slots = slots_by_frequency(mapped, nodes, room)  # type: ignore[arg-type]
        assert slots.dtype == np.int32 and mapped.largest <= 2**20
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


def replaced(config: Any, **values: Any) -> Any:
    return type(config)(**{**vars(config), **values})


def test_there_is_room_for_as_many_as_fit(case: Case, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    one = slot_bytes((3, 72, 72))
    graph = load_graph(case.config)
    capsys.readouterr()
    names = set()
    for pictures in (0.5, 7.9, 8, 39.9, 40, 1000):
        config = replaced(case.config, image_cache_gb=pictures * one / 1e9 * (1 + 1e-9))
        file = shared_pictures(config, graph, case.preprocessing, cache_folder(config.nodes))
        room = min(int(pictures), 40)
        assert (file.slots >= 0).sum() == room and file.path.stat().st_size == room * one
        assert file.path.parent == tmp_path / "cache" and file.path.stat().st_blocks == 0  # sparse
        [told] = capsys.readouterr().out.splitlines()
        assert str(file.path) in told
        figures = re.findall(r"\b\d[\d.]*(?: GB)?\b", told.replace(str(file.path), ""))
        assert figures == [str(room), "40", f"{room * one / 1e9:.2f} GB"]  # pictures, nodes, bytes
        names.add(file.path.name)
    assert len(names) == 5  # the last two are one: room for all
    config = replaced(case.config, image_cache_gb=8 * one / 1e9 * (1 + 1e-9))
    for other in (
        (replaced(config, truncated_images="black"), graph),
        (config, graph._replace(nodes_fingerprint="other")),
        (config, graph._replace(edges_fingerprint="other")),
    ):
        names.add(shared_pictures(*other, case.preprocessing, cache_folder(config.nodes)).path.name)
    case.preprocessing.short_side += 8
    names.add(shared_pictures(config, graph, case.preprocessing, cache_folder(config.nodes)).path.name)
    assert len(names) == 9


def decoded_in_an_epoch(config: Any) -> list[int]:
    run = build_run(config, build_accelerator(), load_graph(config))
    steps = range(run.schedule.samples_per_epoch // config.global_batch_size)  # the stream goes on to the next epoch
    return [batch.decoded for _, batch in zip(steps, run.stream, strict=False)]


def test_the_trainer_decodes_each_image_once(case: Case, tmp_path: Path) -> None:
    first = decoded_in_an_epoch(case.config)
    assert len(first) == 16 and all(isinstance(decoded, int) for decoded in first) and 30 <= sum(first) <= 40
    assert sum(decoded_in_an_epoch(replaced(case.config, num_workers=2))) == 0
    for path in (tmp_path / "cache").glob("pictures-*"):
        path.unlink()
    assert sum(decoded_in_an_epoch(replaced(case.config, image_cache_gb=0.0))) > 100
    assert not list((tmp_path / "cache").glob("pictures-*"))


def train(config: Any, tmp_path: Path, *flags: str) -> list[float]:
    folder = tmp_path / f"run{len(list(tmp_path.glob('run*')))}"
    graph = Path(config.nodes).parent
    more = ("--max_steps=3", "--report_to=none", "--cache_size=0", "--tower_cache=off", *flags)
    assert train_main(settings(graph, folder, *more)) == 0
    return [row["loss"] for row in read_metrics(folder)]


def about_the_cache(capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that name a file of the cache, or a setting of it."""
    names = ("pictures-", "MMGRAPH_CACHE", "image_cache_gb")
    return [line for line in capsys.readouterr().out.splitlines() if any(name in line for name in names)]


def test_training_goes_on_without_it(
    case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = train(case.config, tmp_path, "--image_cache_gb=0")
    assert not about_the_cache(capsys) and not list((tmp_path / "cache").glob("pictures-*"))

    (tmp_path / "file").write_text("a file where the folder should be")
    monkeypatch.setenv("MMGRAPH_CACHE", str(tmp_path / "file/cache"))
    assert train(case.config, tmp_path) == expected
    [told] = about_the_cache(capsys)
    assert f"{tmp_path / 'file/cache'}/pictures-" in told and "MMGRAPH_CACHE" in told
    assert os.strerror(errno.ENOTDIR) in told

    monkeypatch.setenv("MMGRAPH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(targets.PICTURES_MISSING_ROOM, lambda path, size: 10**9)
    assert train(case.config, tmp_path) == expected
    [told] = about_the_cache(capsys)
    assert str(tmp_path / "cache") in told and re.search(r"\b1\.00 GB\b", told) and "--image_cache_gb" in told
    assert not list((tmp_path / "cache").glob("pictures-*"))


def test_room_counts_what_is_there_already(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=5000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage)
    path = tmp_path / "no/folder/yet/file"
    assert missing_room(path, 6000) == 1000 and missing_room(path, 5000) == 0
    (tmp_path / "file").write_bytes(bytes(4096))
    assert missing_room(tmp_path / "file", 9200) == 9200 - 5000 - (tmp_path / "file").stat().st_blocks * 512


@pytest.mark.parametrize("workers", [0, 2])
def test_a_full_disk_stops_the_cache_and_nothing_else(
    workers: int, case: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = train(case.config, tmp_path, "--image_cache_gb=0")
    write, written = os.pwrite, []

    def full(*args: Any) -> int:
        written.append(args)
        if len(written) > 5:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(*args)

    monkeypatch.setattr(os, "pwrite", full)
    assert train(case.config, tmp_path, f"--num_workers={workers}") == expected
    assert capsys.readouterr().out.count(os.strerror(errno.ENOSPC)) == 1
    assert len(written) == (0 if workers else 6)  # workers are forks: each has a list of its own
    monkeypatch.undo()
    monkeypatch.setenv("MMGRAPH_CACHE", str(tmp_path / "cache"))
    assert sum(decoded_in_an_epoch(case.config)) <= 35  # at least five were kept


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_share_the_file(method: str, case: Case) -> None:
    config = case.config
    graph = load_graph(config)
    tokenizer, processor = load_tokenizer_and_processor(config.model_name)

    def batches(file: PictureFile | None, worker: bool) -> list[EdgeBatch]:
        inputs = NodeInputs(tokenizer, processor, 0, picture_file=file)
        collator = BatchCollator(graph.nodes, graph.images, inputs)
        start = {"num_workers": 1, "multiprocessing_context": method} if worker else {}
        return list(DataLoader(EdgeRows(graph.rows), 20, collate_fn=collator, **start))

    expected = batches(None, worker=False)
    file = shared_pictures(config, graph, case.preprocessing, cache_folder(config.nodes))
    for worker, decoded in ((True, 40), (False, 0)):
        found = batches(file, worker)
        assert sum(batch.decoded for batch in found) == decoded
        assert all(
            torch.equal(a.inputs["pictures"], b.inputs["pictures"]) for a, b in zip(found, expected, strict=True)
        )


def read_as_a_rank(rank: int, folder: Path, rows: np.ndarray, file: PictureFile | None, barrier: Any, out: Any) -> None:
    """Two epochs of a rank's batches, in step with the other's. Puts (epoch, lookups, distinct, decoded)."""
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
def test_how_much_is_decoded(tmp_path: Path) -> None:
    """Two ranks of four workers on a graph of skewed degrees: with room for all pictures, and for 8 % of them."""
    nodes, edges = 2000, 220 * 64  # no edge is left out of an epoch
    generator = np.random.default_rng(0)
    weights = 1 / np.arange(1, nodes + 1) ** 0.8
    rows = generator.choice(nodes, (edges, 2), p=weights / weights.sum())
    rows = np.unique(rows, return_inverse=True)[1].reshape(-1, 2)  # without nodes that have no edge
    nodes = int(rows.max()) + 1
    for i in range(nodes):
        Image.fromarray(generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)).resize((40, 40)).save(
            tmp_path / f"{i}.jpg"
        )
    few = nodes * 8 // 100
    ends = np.sort(np.bincount(rows.ravel()))[::-1]
    for room in (nodes, few):
        file = PictureFile(tmp_path / f"room{room}", slots_by_frequency(rows, nodes, room), SHAPE)
        barrier, out = FORK.Barrier(2), FORK.SimpleQueue()
        ranks = [FORK.Process(target=read_as_a_rank, args=(i, tmp_path, rows, file, barrier, out)) for i in range(2)]
        for rank in ranks:
            rank.start()
        counts = {1: np.zeros(3, dtype=int), 2: np.zeros(3, dtype=int)}
        for _ in range(2 * 2 * (edges // 64)):
            epoch, *found = out.get()
            counts[epoch] += found
        for rank in ranks:
            rank.join()
        for epoch, (lookups, distinct, decoded) in counts.items():
            print(
                f"room for {room} of {nodes}, epoch {epoch}: {decoded:,} decoded; none for {1 - decoded / lookups:.1%} "
                f"of {lookups:,} edge ends, {1 - decoded / distinct:.1%} of {distinct:,} pictures"
            )
        if room == nodes:
            assert 1 - counts[1][2] / counts[1][0] >= 1 - 1.2 * nodes / (2 * edges) and counts[2][2] == 0
        else:
            assert 1 - counts[2][2] / counts[2][0] >= ends[:few].sum() / ends.sum() - 0.01
