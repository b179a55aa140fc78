"""The tower store: exact tokens, each text and image once, never a stale one, whoever builds it and however it ends."""

import errno
import itertools
import os
import pkgutil
import re
import shutil
import signal
import time
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import targets
import torch
from conftest import graph_files, loss_difference, settings
from launches import Ended, Fault, accelerate_launch, launch, run_warm
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPVisionModel

from mmgraph.arguments import parse_config
from mmgraph.bench.data import resident_mb
from mmgraph.cli import main, train_main
from mmgraph.data.graph import load_graph
from mmgraph.data.images import IMAGE_STATUS
from mmgraph.distributed.collectives import SYNC_SECONDS, work_on_all_ranks
from mmgraph.distributed.launch import build_accelerator
from mmgraph.errors import UserError
from mmgraph.towers import cached as tower_cache
from mmgraph.towers import store_plan as tower_plan
from mmgraph.towers.cached import CachedTowers
from mmgraph.towers.clip import load_towers, read_tower_state, tower_state
from mmgraph.towers.fingerprint import towers_fingerprint
from mmgraph.towers.store import ResidentTokens, TowerStore
from mmgraph.training.build import build_run


@pytest.fixture
def own_graph(graph: Path, tmp_path: Path) -> Path:
    """A copy of the graph that a test may change, without a cache."""
    folder = graph_files(tmp_path / "graph")
    shutil.copytree(graph / "towers", folder / "towers")
    return folder


def flags(graph: Path, *more: str) -> list[str]:
    return [f"--nodes={graph / 'nodes.csv'}", f"--edges={graph / 'edges.csv'}", f"--model_name={graph / 'towers'}",
            "--num_workers=2", *more]  # fmt: skip


def store_of(graph: Path) -> Path:
    (folder,) = (graph / "mmgraph_cache").glob("towers-*")
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The one line that a command which failed has said."""
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mmgraph: error: ")]
    return line


def age(graph: Path) -> None:
    """Let images be older than the time in which a change might not show in their times."""
    time.sleep(max(0, 2.1 - (time.time() - max(path.stat().st_ctime for path in (graph / "images").iterdir()))))


def test_tokens_are_the_towers(own_graph: Path) -> None:
    """Each node's, against the towers of transformers on the plain inputs of that node alone."""
    from mmgraph import InferenceCollator, NodesDataset
    from mmgraph.data.tables import read_nodes
    from mmgraph.towers.clip import load_tokenizer_and_processor

    assert main(["cache", *flags(own_graph)]) == 0
    towers = str(own_graph / "towers")
    text_model, vision_model = CLIPTextModel.from_pretrained(towers), CLIPVisionModel.from_pretrained(towers)
    frame = read_nodes(own_graph / "nodes.csv")
    frame["image_path"] = [str(own_graph / path.replace("\\", "/")) for path in frame["image_path"]]
    nodes, collate = NodesDataset(frame), InferenceCollator(*load_tokenizer_and_processor(towers))
    stored = open_stored(own_graph)
    rows = np.array([3, 0, 39, 17, 3])
    tokens = stored.pooled_tokens(rows, rows)
    for i, row in enumerate(rows.tolist()):
        inputs = collate([nodes[row]])
        with torch.no_grad():
            text = text_model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"])
            vision = vision_model(pixel_values=inputs["pixel_values"])
        length = int(inputs["attention_mask"].sum())
        assert tokens.text_mask[i].tolist() == [1] * length + [0] * (tokens.text_mask.shape[1] - length)
        assert torch.allclose(tokens.text[i, :length], text.last_hidden_state[0, :length], atol=2e-5)
        assert not tokens.text[i, length:].any()
        assert torch.allclose(tokens.patches[i], vision.last_hidden_state[0, 1:], atol=2e-5)
        assert torch.allclose(tokens.text_pooled[i], text.pooler_output[0], atol=2e-5)
        assert torch.allclose(tokens.image_pooled[i], vision.pooler_output[0], atol=2e-5)
    assert tokens.text_mask.shape[1] == int(tokens.text_mask.sum(dim=1).max())  # no wider than the longest of the batch


def open_stored(graph: Path, *more: str) -> CachedTowers:
    config = parse_config(settings(graph, graph / "run", *more))
    source = build_run(config, build_accelerator(), load_graph(config)).train_step.source
    assert isinstance(source, CachedTowers)
    return source


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-6), ("float16", 2e-4)])
def test_losses_are_those_of_live_towers(graph: Path, tmp_path: Path, dtype: str, bound: float) -> None:
    """60 steps at the default rate, one process, float32."""
    for name, more in (("live", ["--tower_cache=off"]), ("stored", [f"--tower_cache_dtype={dtype}"])):
        flags = settings(graph, tmp_path / name, "--max_steps=60", "--learning_rate=5e-5", *more)
        assert train_main(flags) == 0
    difference = loss_difference(tmp_path / "stored", tmp_path / "live", 60)
    print(f"{dtype}: {difference:.1e}")
    assert difference < bound


def test_two_ranks_build_and_read_one_store(own_graph: Path, tmp_path: Path) -> None:
    launch("cpu_2proc.yaml", *settings(own_graph, tmp_path / "two", "--max_steps=12"))
    launch("cpu.yaml", *settings(own_graph, tmp_path / "live", "--max_steps=12", "--tower_cache=off"))
    assert loss_difference(tmp_path / "two", tmp_path / "live", 12) < 1e-5
    assert len(TowerStore(store_of(own_graph)).texts.files) == 1


def test_no_tower_is_loaded_where_the_store_is_whole(
    own_graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", *flags(own_graph)]) == 0
    told = [line for line in capsys.readouterr().out.splitlines() if str(store_of(own_graph)) in line]
    assert any(re.search(r"\b80\b", line) for line in told)  # texts and images

    def refuse(_: str) -> None:
        raise AssertionError("a tower is loaded")

    for target in (targets.LOAD_TOWERS_FOR_RUN, targets.LOAD_TOWERS_FOR_BUILD):
        monkeypatch.setattr(target, refuse)
    assert train_main(settings(own_graph, tmp_path / "run", "--max_steps=16")) == 0
    monkeypatch.undo()
    final = torch.load(tmp_path / "run/checkpoints/multimodal_encoder_final.pt")
    towers = tower_state(load_towers(str(own_graph / "towers")))
    assert all(torch.equal(final[key], tensor) for key, tensor in towers.items())
    assert towers_fingerprint(towers) == towers_fingerprint(read_tower_state(str(own_graph / "towers")))


def computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Filled with (kind, node) of each entry that is computed from here."""
    seen: list[tuple[str, int]] = []
    make = pkgutil.resolve_name(targets.MAKE_SHARD)

    def record(self: Any, shard: tower_plan.Shard) -> Generator[int, None, bytes]:
        seen.extend((shard.modality, row) for row in shard.rows.tolist())
        return make(self, shard)

    monkeypatch.setattr(targets.MAKE_SHARD, record)
    return seen


def test_only_what_changed_is_computed_again(own_graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["cache", *flags(own_graph)]) == 0
    age(own_graph)
    assert main(["cache", *flags(own_graph)]) == 0  # now all images are known by their times
    before = open_stored(own_graph).pooled_tokens(np.arange(40), np.arange(40))
    seen = computed(monkeypatch)
    assert main(["cache", *flags(own_graph)]) == 0 and seen == []
    nodes = pd.read_csv(own_graph / "nodes.csv", dtype=str, keep_default_na=False)
    nodes.loc[7, "summary"] = "an old bright square of blue"
    nodes.to_csv(own_graph / "nodes.csv", index=False)
    path = own_graph / "images/11.png"
    status = path.stat()
    Image.effect_noise((71, 50), 90).convert("RGB").save(path)
    os.truncate(path, max(status.st_size, path.stat().st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # a time of change that says nothing
    assert main(["cache", *flags(own_graph)]) == 0
    assert sorted(seen) == [("image", 11), ("text", 7)]
    after = open_stored(own_graph).pooled_tokens(np.arange(40), np.arange(40))
    changed_texts = [i for i in range(40) if not torch.equal(before.text_pooled[i], after.text_pooled[i])]
    changed_images = [i for i in range(40) if not torch.equal(before.patches[i], after.patches[i])]
    assert changed_texts == [7] and changed_images == [11]
    rows = nodes.sample(frac=1, random_state=0)  # another order is nothing new
    rows.to_csv(own_graph / "nodes.csv", index=False)
    seen.clear()
    assert main(["cache", *flags(own_graph)]) == 0 and seen == []
    moved = open_stored(own_graph).pooled_tokens(np.arange(40), np.arange(40))
    assert torch.equal(moved.patches, after.patches[rows.index.tolist()])


@pytest.mark.parametrize("what", ["towers", "truncated", "dtype"])
def test_what_tokens_depend_on_makes_another_store(own_graph: Path, what: str) -> None:
    assert main(["cache", *flags(own_graph)]) == 0
    more = {"towers": [], "truncated": ["--truncated_images=black"], "dtype": ["--tower_cache_dtype=float16"]}[what]
    if what == "towers":
        file = own_graph / "towers/model.safetensors"
        weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
        weights["text_model.final_layer_norm.weight"][0] += 1e-3
        save_file(weights, file, {"format": "pt"})
    assert main(["cache", *flags(own_graph, *more)]) == 0
    assert len(list((own_graph / "mmgraph_cache").glob("towers-*"))) == 2


def build(graph: Path, *faults: Fault) -> Ended:
    """Build the store, in shards of 3 entries, in a process of its own."""
    small_shards = ("put", {"target": targets.SHARD_ENTRIES, "value": 3})
    return run_warm(["-m", "mmgraph", "cache", *flags(graph, "--num_workers=0")], faults=[small_shards, *faults])


def shards_made(folder: Path) -> dict[str, tuple[int, int]]:
    """Which shards are there, and which file each is: another, or written again, where it was made anew."""
    paths = folder.glob("*.safetensors")
    return {path.name: ((status := path.stat()).st_ino, status.st_mtime_ns) for path in paths}


def test_killed_and_resumed_builds_leave_the_same_bytes(graph: Path, tmp_path: Path) -> None:
    complete, killed = (graph_files(tmp_path / name) for name in ("complete", "killed"))
    for folder in (complete, killed):
        shutil.copytree(graph / "towers", folder / "towers")
    assert build(complete).code == 0
    for kills in range(1, 4):
        ended = build(killed, ("at_call", {"target": targets.MAKE_SHARD, "number": 4, "action": "SIGKILL"}))
        assert ended.code == -signal.SIGKILL, ended
        before = shards_made(store_of(killed))
        assert len(before) == 3 * kills
    assert build(killed).code == 0
    after = shards_made(store_of(killed))
    assert before == {name: after[name] for name in before}  # no shard was built again
    assert files_of(store_of(killed)) == files_of(store_of(complete))


def test_two_runs_build_one_store(graph: Path, own_graph: Path, tmp_path: Path) -> None:
    alone = graph_files(tmp_path / "alone")
    shutil.copytree(graph / "towers", alone / "towers")
    with ThreadPoolExecutor() as threads:
        assert [ended.code for ended in threads.map(build, [own_graph, own_graph])] == [0, 0]
    assert build(alone).code == 0
    assert files_of(store_of(own_graph)) == files_of(store_of(alone))


HOSTS = """
import os, sys
os.environ["MMGRAPH_CACHE"] = sys.argv[1] + os.environ["RANK"]
from mmgraph.cli import leave, train_main
leave(train_main(sys.argv[2:]))
"""


def test_hosts_without_a_shared_file_system(own_graph: Path, tmp_path: Path) -> None:
    """Each rank has a cache of its own: built, found again, and mended where one has lost a file."""
    (tmp_path / "host.py").write_text(HOSTS)
    program = [str(tmp_path / "host.py"), str(tmp_path / "cache")]
    for steps in (8, 16, 24):
        done = run_warm(
            [*program, *settings(own_graph, tmp_path / "run", f"--max_steps={steps}", "--epochs=9")], "cpu_2proc.yaml"
        )
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
        stores = [list((tmp_path / f"cache{rank}").glob("towers-*/*.safetensors")) for rank in (0, 1)]
        assert len(stores[0]) == len(stores[1]) == 2
        if steps == 16:
            stores[1][0].unlink()
    assert train_main(settings(own_graph, tmp_path / "live", "--max_steps=24", "--tower_cache=off")) == 0
    assert loss_difference(tmp_path / "run", tmp_path / "live", 24) < 1e-5


def test_a_file_that_could_not_be_read_once_is_read_again(
    own_graph: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    age(own_graph)
    read = pkgutil.resolve_name(targets.READ_FILE)
    failed = iter([(None, IMAGE_STATUS.index("unreadable"))])
    monkeypatch.setattr(targets.READ_FILE, lambda file: next(failed, None) or read(file))
    assert main(["cache", *flags(own_graph)]) == 2
    assert re.search(rf"{re.escape(str(own_graph / 'images'))}/\d+\.png\b", error_line(capsys))
    monkeypatch.undo()
    assert main(["cache", *flags(own_graph)]) == 0
    assert not open_stored(own_graph).image_status.any() and IMAGE_STATUS[3] not in capsys.readouterr().out


def test_a_text_is_never_kept_as_another(
    own_graph: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nodes are hashed, and read again to be built; encode hashes them under the digest that it opened them with."""
    monkeypatch.setattr(targets.BUILD_TEXT_HASH, lambda text: bytes(16))
    assert main(["cache", *flags(own_graph)]) == 2
    assert ".png" not in error_line(capsys)
    assert {name.split("-")[0] for name in shards_made(store_of(own_graph))} == {"image"}  # of texts there is none
    monkeypatch.undo()
    assert main(["cache", *flags(own_graph)]) == 0
    assert train_main(settings(own_graph, own_graph / "run", "--max_steps=2")) == 0
    nodes = pd.read_csv(own_graph / "nodes.csv", dtype=str, keep_default_na=False)
    nodes.loc[7, "summary"] = "an old bright square of blue"
    load = pkgutil.resolve_name(targets.LOAD_ENCODER)

    def edit_and_load(*arguments: Any, **more: Any) -> Any:
        nodes.to_csv(own_graph / "nodes.csv", index=False)
        return load(*arguments, **more)

    monkeypatch.setattr(targets.LOAD_ENCODER, edit_and_load)
    assert main(["encode", str(own_graph / "run")]) == 0
    monkeypatch.undo()
    seen = computed(monkeypatch)
    assert main(["cache", *flags(own_graph)]) == 0 and seen == [("text", 7)]


def test_a_disk_that_fills_up_is_one_line_and_the_build_goes_on(
    own_graph: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace = Path.replace

    def no_room(path: Path, target: Path) -> Path:
        if target.name.startswith("text-"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", no_room)
    assert main(["cache", *flags(own_graph)]) == 1
    said = error_line(capsys)
    assert os.strerror(errno.ENOSPC) in said and "--tower_cache off" in said and str(store_of(own_graph)) in said
    monkeypatch.undo()
    assert not [name for name in files_of(store_of(own_graph)) if name.endswith(".tmp")]
    seen = computed(monkeypatch)
    assert main(["cache", *flags(own_graph)]) == 0
    assert {kind for kind, _ in seen} == {"text"}  # the images were kept


def test_a_rank_works_in_strides(monkeypatch: pytest.MonkeyPatch) -> None:
    """However long a shard takes, ranks meet; and one that has nothing to do says so at once."""
    now, done = itertools.count(), [0]

    def work() -> Iterator[int]:
        for count in [64] * 20 + [0, 3]:
            done[0] += count
            yield count

    monkeypatch.setattr("time.monotonic", lambda: next(now))
    met = [done[0] for _ in work_on_all_ranks(build_accelerator(), work())]
    monkeypatch.undo()
    assert met[-3:] == [20 * 64, 20 * 64 + 3, 20 * 64 + 3]  # the 0, what is left, and that there is no more
    counts = np.diff([0, *met[:-1]])
    assert 4 < len(counts) < 8 and counts.max() <= 64 * (SYNC_SECONDS + 1)


def test_a_store_that_lacks_entries_is_not_read(own_graph: Path, tmp_path: Path) -> None:
    assert main(["cache", *flags(own_graph)]) == 0
    for resident in (False, True):
        with pytest.raises(UserError, match=rf"^[^\n]*{re.escape(str(tmp_path))}\b[^\n]*$"):
            CachedTowers(TowerStore(tmp_path), load_content_hashes(own_graph), torch.device("cpu"), resident)


def test_auto_stays_live_where_it_does_not_pay_or_cannot_write(
    own_graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert train_main(settings(own_graph, tmp_path / "one", "--max_steps=1")) == 0
    cache = own_graph / "mmgraph_cache"
    assert re.search(r"\b24 nodes\b", capsys.readouterr().out) and not list(cache.glob("towers-*"))
    blocked = tmp_path / "blocked"
    blocked.write_text("a file where a folder is wanted")
    monkeypatch.setenv("MMGRAPH_CACHE", str(blocked))
    assert train_main(settings(own_graph, tmp_path / "two", "--max_steps=16")) == 0
    [told] = [line for line in capsys.readouterr().out.splitlines() if f"{blocked}/towers-" in line]
    assert os.strerror(errno.ENOTDIR) in told and not list(cache.glob("towers-*"))
    asked = f"--tower_cache={blocked}"
    assert train_main(settings(own_graph, tmp_path / "three", "--max_steps=16", asked)) == 2
    told = error_line(capsys)
    assert f"--tower_cache {blocked}" in told and os.strerror(errno.ENOTDIR) in told
    monkeypatch.delenv("MMGRAPH_CACHE")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    assert str(tmp_path / "small") in str(tower_plan.refusal(tmp_path / "small", 100_000))
    assert tower_plan.refusal(tmp_path / "small", 900) is None


def test_flags_of_the_store(
    own_graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A folder of one's own, a copy on the host's disk, and a device that is not there."""
    here, local = tmp_path / "here", tmp_path / "local"
    more = (f"--tower_cache={here}", f"--tower_cache_local={local}")
    assert train_main(settings(own_graph, tmp_path / "a", "--max_steps=3", *more)) == 0
    assert not list((own_graph / "mmgraph_cache").glob("towers-*"))
    (store,), (copy,) = here.iterdir(), local.iterdir()
    assert {n: b for n, b in files_of(store).items() if n != "store.json"} == files_of(copy)
    assert str(copy) in capsys.readouterr().out  # the store that is read
    local.joinpath("file").write_text("")
    more = (f"--tower_cache={here}", f"--tower_cache_local={local / 'file'}")
    assert train_main(settings(own_graph, tmp_path / "b", "--max_steps=3", *more)) == 0
    said = capsys.readouterr().out
    [told] = [line for line in said.splitlines() if f"--tower_cache_local {local / 'file'}" in line]
    assert os.strerror(errno.ENOTDIR) in told or os.strerror(errno.EEXIST) in told
    assert str(store) in said and str(copy) not in said  # it is read where it is
    if not torch.cuda.is_available():
        more = (f"--tower_cache={here}", "--tower_cache_device=cuda")
        assert train_main(settings(own_graph, tmp_path / "c", *more)) == 2
        assert "--tower_cache_device cuda" in error_line(capsys) and not (tmp_path / "c/metrics.jsonl").exists()


def test_a_damaged_shard_is_told(own_graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["cache", *flags(own_graph)]) == 0
    shard = next(store_of(own_graph).glob("text-*"))
    os.truncate(shard, shard.stat().st_size // 2)
    assert train_main(settings(own_graph, tmp_path / "run", "--max_steps=16")) == 2
    assert str(shard) in error_line(capsys)
    shard.unlink()
    assert train_main(settings(own_graph, tmp_path / "run", "--max_steps=16")) == 0


def shard_tensors(kind: str) -> dict[str, torch.Tensor]:
    """Two entries."""
    hashes, pooled = torch.arange(32, dtype=torch.uint8).view(2, 16), torch.zeros(2, 8)
    if kind == "text":
        return {"hashes": hashes, "pooled": pooled, "tokens": torch.zeros(5, 8), "offsets": torch.tensor([0, 2, 5])}
    return {"hashes": hashes, "pooled": pooled, "patches": torch.zeros(2, 4, 8), "causes": torch.zeros(2).byte()}


@pytest.mark.parametrize(
    ("name", "tensor"),
    [
        ("hashes", None),
        ("hashes", torch.zeros(2, 8, dtype=torch.uint8)),
        ("hashes", torch.zeros(2, 16, dtype=torch.int64)),
        ("pooled", torch.zeros(3, 8)),
        ("pooled", torch.zeros(2, 8).half()),
        ("tokens", torch.zeros(5, 8).bfloat16()),
        ("tokens", torch.zeros(4, 8)),
        ("tokens", torch.zeros(5, 2, 4)),
        ("offsets", torch.tensor([0, 5, 2])),
        ("offsets", torch.tensor([0, 7, 5])),
        ("offsets", torch.tensor([0, 0, 5])),
        ("offsets", torch.tensor([1, 2, 5])),
        ("offsets", torch.tensor([-3, 2, 5])),
        ("offsets", torch.tensor([0, 5])),
        ("patches", torch.zeros(1, 4, 8)),
        ("patches", torch.zeros(2, 4, 8, dtype=torch.float64)),
        ("causes", None),
        ("more", torch.zeros(2)),
    ],
)
def test_a_strangers_shard_is_told(tmp_path: Path, name: str, tensor: torch.Tensor | None) -> None:
    for kind in ("text", "image"):
        save_file(shard_tensors(kind), tmp_path / f"{kind}-0.safetensors", {"format": "pt"})
    assert TowerStore(tmp_path).texts.starts[-1] == TowerStore(tmp_path).images.starts[-1] == 2
    kind = "image" if name in ("patches", "causes") else "text"
    tensors = {**shard_tensors(kind), name: tensor}
    path = tmp_path / f"{kind}-1.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(UserError, match=rf"^[^\n]*{re.escape(str(path))}\b[^\n]*$") as caught:
        TowerStore(tmp_path)
    text = str(caught.value)  # not that it cannot be mapped, nor that two shards are of different towers
    assert "--tower_cache" not in text and f"{kind}-0" not in text


def test_shards_of_different_towers_are_told(tmp_path: Path) -> None:
    tensors = shard_tensors("image")
    save_file(tensors, tmp_path / "image-0.safetensors")
    save_file({**tensors, "patches": torch.zeros(2, 4, 6)}, tmp_path / "image-1.safetensors")
    with pytest.raises(UserError, match=r"^[^\n]*image-1\.safetensors[^\n]*image-0\.safetensors[^\n]*$"):
        TowerStore(tmp_path)


def test_resident_tokens_are_the_same(own_graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What lies in a device's memory whole (here, the CPU's) gives what is read from the shards."""
    monkeypatch.setattr(targets.SHARD_ENTRIES, 7)
    assert main(["cache", *flags(own_graph)]) == 0
    stored = open_stored(own_graph)
    resident = CachedTowers(stored.store, load_content_hashes(own_graph), torch.device("cpu"), resident=True)
    assert isinstance(resident.resident, ResidentTokens)
    for rows in (np.array([5]), np.array([39, 0, 7, 8, 6, 20]), np.arange(40)):
        found = zip(resident.pooled_tokens(rows, rows)[:3], stored.pooled_tokens(rows, rows)[:3], strict=True)
        for ours, theirs in found:
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


def load_content_hashes(graph: Path) -> tower_cache.ContentHashes:
    config = parse_config(flags(graph))
    data = load_graph(config)
    return tower_cache.read_content_hashes(
        data.nodes, data.images, config.nodes, data.nodes_fingerprint, graph / "mmgraph_cache", build_accelerator()
    )


def test_images_that_are_not_whole_are_counted(
    own_graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (own_graph / "images/1.png").unlink()
    (own_graph / "images/2.png").write_bytes(b"no picture")
    assert main(["cache", *flags(own_graph)]) == 0
    told = capsys.readouterr().out
    assert all(re.search(rf"\b1 {cause}\b", told) for cause in (IMAGE_STATUS[2], IMAGE_STATUS[3]))
    shards = TowerStore(store_of(own_graph)).images
    assert int(shards.starts[-1]) == 40  # 38 pictures, a file that is none, and no file
    assert sorted(load_file(shards.files[0])["causes"].tolist())[-2:] == [2, 3]


def test_encode_reads_the_store(
    own_graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert train_main(settings(own_graph, tmp_path / "run", "--max_steps=16")) == 0
    capsys.readouterr()
    assert main(["encode", str(tmp_path / "run"), "--output_dir", str(tmp_path / "stored")]) == 0
    assert str(store_of(own_graph)) in capsys.readouterr().out
    monkeypatch.setenv("MMGRAPH_CACHE", str(tmp_path / "empty"))
    assert main(["encode", str(tmp_path / "run"), "--output_dir", str(tmp_path / "live")]) == 0
    assert "towers-" not in capsys.readouterr().out
    for name in ("fused", "text_only", "image_only", "concat"):
        stored, live = (torch.load(tmp_path / f"{kind}/features_{name}.pt") for kind in ("stored", "live"))
        assert torch.allclose(stored, live, atol=1e-5)


def test_a_store_is_not_held_in_memory(tmp_path: Path) -> None:
    """Each entry of 110 MB is read, bit by bit equal to what was written, and the process does not grow by as much."""
    generator = torch.Generator().manual_seed(0)
    made = {}
    for kind, name, shape in (("text", "tokens", (512, 8)), ("image", "patches", (512, 1, 13_000))):
        for shard in range(8):
            tensors = {
                "hashes": torch.randint(256, (512, 16), dtype=torch.uint8, generator=generator),
                "pooled": torch.zeros(512, 8),
                name: torch.randn(shape, generator=generator).half(),
                **({"offsets": torch.arange(513)} if kind == "text" else {"causes": torch.zeros(512).byte()}),
            }
            save_file(tensors, tmp_path / f"{kind}-{shard}.safetensors", {"format": "pt"})
            made[kind, shard] = tensors
    store, before = TowerStore(tmp_path), resident_mb()
    for places in np.random.default_rng(0).permutation(8 * 512).reshape(-1, 64):
        tokens = store.tokens(places, places)
        for i, place in enumerate(places.tolist()):
            assert torch.equal(tokens.text[i], made["text", place // 512]["tokens"][place % 512, None])
            assert torch.equal(tokens.patches[i], made["image", place // 512]["patches"][place % 512])
    print(f"grown by {resident_mb() - before:.1f} MB")
    assert resident_mb() - before < 40


@pytest.mark.slow
def test_the_first_step_comes_soon(own_graph: Path, tmp_path: Path) -> None:
    """Within 15 s of the launch, where the store is there; the better of two launches, for machines are shared."""
    assert main(["cache", *flags(own_graph)]) == 0
    seconds = []
    for name in ("one", "two"):
        begun = time.time()
        accelerate_launch("cpu.yaml", *settings(own_graph, tmp_path / name, "--max_steps=1"))
        seconds.append((tmp_path / name / "metrics.jsonl").stat().st_mtime - begun)
    print(f"first step after {min(seconds):.1f} s")
    assert min(seconds) < 15


def test_cache_is_told_of_wrong_flags(own_graph: Path) -> None:
    done = run_warm(["-m", "mmgraph", "cache", "--nodez=1"])
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("mmgraph: error: ")
    assert re.search(r"--nodez\b.*--nodes\b", done.stderr)
