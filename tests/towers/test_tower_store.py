"""The tower store: exact tokens, one entry for each text and image, no stale entries, and interrupted builds."""

import errno
import itertools
import math
import os
import pkgutil
import re
import shutil
import signal
import threading
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
from mmgraph.data.batches import EdgeBatch
from mmgraph.data.graph import load_graph
from mmgraph.data.images import IMAGE_STATUS
from mmgraph.data.input_rules import InputRules
from mmgraph.distributed.collectives import SYNC_SECONDS, work_on_all_ranks
from mmgraph.distributed.launch import build_accelerator
from mmgraph.errors import UserError
from mmgraph.towers import cached as tower_cache
from mmgraph.towers import store_plan as tower_plan
from mmgraph.towers.cached import CachedTowers
from mmgraph.towers.clip import load_towers, read_tower_state, tower_state
from mmgraph.towers.fingerprint import towers_fingerprint
from mmgraph.towers.resident import ResidentTokens
from mmgraph.towers.store import TowerStore
from mmgraph.towers.tokens import Tokens
from mmgraph.training.build import build_run


@pytest.fixture
def own_graph(graph: Path, tmp_path: Path) -> Path:
    """A copy of the graph that a test may change. It has no cache."""
    folder = graph_files(tmp_path / "graph")
    shutil.copytree(graph / "towers", folder / "towers")
    return folder


def flags(graph: Path, *more: str) -> list[str]:
    """Return the flags of ``mmgraph cache``."""
    return [f"--nodes={graph / 'nodes.csv'}", f"--edges={graph / 'edges.csv'}", f"--model_name={graph / 'towers'}",
            "--num_workers=2", *more]  # fmt: skip


def store_of(graph: Path) -> Path:
    """Return the folder of the only store in the graph's cache folder."""
    (folder,) = (graph / "mmgraph_cache").glob("towers-*")
    return folder


def files_of(folder: Path) -> dict[str, bytes]:
    """Return the bytes of each file in a folder, by name."""
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """Return the only error line that a failed command printed."""
    [line] = [line for line in capsys.readouterr().err.splitlines() if line.startswith("mmgraph: error: ")]
    return line


def wait_for_stable_images(graph: Path) -> None:
    """Wait until no image changed in the last 2 s. More recently changed images are read at every start."""
    time.sleep(max(0, 2.1 - (time.time() - max(path.stat().st_ctime for path in (graph / "images").iterdir()))))


def test_stored_tokens_match_the_towers(own_graph: Path) -> None:
    """Each node's stored tokens match the output of transformers' CLIP models on the inputs of this node alone."""
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
    # The texts are padded to the longest text of the batch.
    assert tokens.text_mask.shape[1] == int(tokens.text_mask.sum(dim=1).max())


def open_stored(graph: Path, *more: str) -> CachedTowers:
    """Return the token source of a run that reads the store."""
    config = parse_config(settings(graph, graph / "run", *more))
    source = build_run(config, build_accelerator(), load_graph(config)).train_step.source
    assert isinstance(source, CachedTowers)
    return source


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 2e-6), ("float16", 2e-4)])
def test_same_losses_as_with_live_towers(graph: Path, tmp_path: Path, dtype: str, bound: float) -> None:
    """The losses of 60 steps at the default learning rate, on one process in float32."""
    for name, more in (("live", ["--tower_cache=off"]), ("stored", [f"--tower_cache_dtype={dtype}"])):
        flags = settings(graph, tmp_path / name, "--max_steps=20", "--learning_rate=5e-5", *more)
        assert train_main(flags) == 0
    difference = loss_difference(tmp_path / "stored", tmp_path / "live", 20)
    print(f"{dtype}: {difference:.1e}")
    assert difference < bound


@pytest.mark.slow
def test_two_ranks_build_and_read_one_store(own_graph: Path, tmp_path: Path) -> None:
    launch("cpu_2proc.yaml", *settings(own_graph, tmp_path / "two", "--max_steps=12"))
    launch("cpu.yaml", *settings(own_graph, tmp_path / "live", "--max_steps=12", "--tower_cache=off"))
    assert loss_difference(tmp_path / "two", tmp_path / "live", 12) < 1e-5
    assert len(TowerStore(store_of(own_graph)).texts.files) == 1


def test_no_tower_is_loaded_with_a_complete_store(
    own_graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["cache", *flags(own_graph)]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if str(store_of(own_graph)) in line]
    assert any(re.search(r"\b80\b", line) for line in lines)  # 40 texts and 40 images

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


def record_computed(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """Return a list to which each entry that is computed from now on is added, as (modality, row of the node)."""
    computed: list[tuple[str, int]] = []
    make = pkgutil.resolve_name(targets.MAKE_SHARD)

    def record(self: Any, shard: tower_plan.Shard) -> Generator[int, None, bytes]:
        computed.extend((shard.modality, row) for row in shard.rows.tolist())
        return make(self, shard)

    monkeypatch.setattr(targets.MAKE_SHARD, record)
    return computed


def test_only_changed_entries_are_computed_again(own_graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["cache", *flags(own_graph)]) == 0
    wait_for_stable_images(own_graph)
    assert main(["cache", *flags(own_graph)]) == 0  # stores the times of all images
    before = open_stored(own_graph).pooled_tokens(np.arange(40), np.arange(40))
    computed = record_computed(monkeypatch)
    assert main(["cache", *flags(own_graph)]) == 0 and computed == []
    nodes = pd.read_csv(own_graph / "nodes.csv", dtype=str, keep_default_na=False)
    nodes.loc[7, "summary"] = "an old bright square of blue"
    nodes.to_csv(own_graph / "nodes.csv", index=False)
    path = own_graph / "images/11.png"
    status = path.stat()
    Image.effect_noise((71, 50), 90).convert("RGB").save(path)
    os.truncate(path, max(status.st_size, path.stat().st_size))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # the mtime does not show the change
    assert main(["cache", *flags(own_graph)]) == 0
    assert sorted(computed) == [("image", 11), ("text", 7)]
    after = open_stored(own_graph).pooled_tokens(np.arange(40), np.arange(40))
    changed_texts = [i for i in range(40) if not torch.equal(before.text_pooled[i], after.text_pooled[i])]
    changed_images = [i for i in range(40) if not torch.equal(before.patches[i], after.patches[i])]
    assert changed_texts == [7] and changed_images == [11]
    rows = nodes.sample(frac=1, random_state=0)  # reordered rows need no new entries
    rows.to_csv(own_graph / "nodes.csv", index=False)
    computed.clear()
    assert main(["cache", *flags(own_graph)]) == 0 and computed == []
    moved = open_stored(own_graph).pooled_tokens(np.arange(40), np.arange(40))
    assert torch.equal(moved.patches, after.patches[rows.index.tolist()])


@pytest.mark.parametrize("what", ["towers", "truncated", "dtype"])
def test_other_settings_build_another_store(own_graph: Path, what: str) -> None:
    """Other tower weights, --truncated_images or --tower_cache_dtype do not reuse the entries of a store."""
    assert main(["cache", *flags(own_graph)]) == 0
    more = {"towers": [], "truncated": ["--truncated_images=black"], "dtype": ["--tower_cache_dtype=float16"]}[what]
    if what == "towers":
        file = own_graph / "towers/model.safetensors"
        weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
        weights["text_model.final_layer_norm.weight"][0] += 1e-3
        save_file(weights, file, {"format": "pt"})
    assert main(["cache", *flags(own_graph, *more)]) == 0
    assert len(list((own_graph / "mmgraph_cache").glob("towers-*"))) == 2


@pytest.mark.parametrize(
    ("scale", "dtype", "message"),
    [
        (1e6, "float16", "exceed the range of float16; set --tower_cache_dtype float32"),
        (math.nan, "float16", "are not finite; check the"),
        (math.nan, "float32", "are not finite; check the"),
    ],
)
def test_tokens_that_cannot_be_stored(
    own_graph: Path, capfd: pytest.CaptureFixture[str], scale: float, dtype: str, message: str
) -> None:
    file = own_graph / "towers/model.safetensors"
    weights = {name: tensor.clone() for name, tensor in load_file(file).items()}
    weights["text_model.final_layer_norm.weight"] *= scale
    save_file(weights, file, {"format": "pt"})
    assert main(["cache", *flags(own_graph, f"--tower_cache_dtype={dtype}")]) == 2
    [error] = [line for line in capfd.readouterr().err.splitlines() if line.startswith("mmgraph: error:")]
    assert f"tokens of these towers {message}" in error
    assert not list((own_graph / "mmgraph_cache").glob("towers-*/text-*.safetensors"))


def build(graph: Path, *faults: Fault) -> Ended:
    """Build the store in another process, in shards of 3 entries."""
    small_shards = ("put", {"target": targets.SHARD_ENTRIES, "value": 3})
    return run_warm(["-m", "mmgraph", "cache", *flags(graph, "--num_workers=0")], faults=[small_shards, *faults])


def shard_files(folder: Path) -> dict[str, tuple[int, int]]:
    """Return the inode and mtime of each shard, by name. They differ if a shard was rebuilt."""
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
        before = shard_files(store_of(killed))
        assert len(before) == 3 * kills
    assert build(killed).code == 0
    after = shard_files(store_of(killed))
    assert before == {name: after[name] for name in before}  # no shard was built again
    assert files_of(store_of(killed)) == files_of(store_of(complete))


def test_two_runs_build_one_store(graph: Path, own_graph: Path, tmp_path: Path) -> None:
    alone = graph_files(tmp_path / "alone")
    shutil.copytree(graph / "towers", alone / "towers")
    with ThreadPoolExecutor() as threads:
        assert [ended.code for ended in threads.map(build, [own_graph, own_graph])] == [0, 0]
    assert build(alone).code == 0
    assert files_of(store_of(own_graph)) == files_of(store_of(alone))


# launch.py with a separate cache folder for each rank
HOSTS = """
import os, sys
os.environ["MMGRAPH_CACHE"] = sys.argv[1] + os.environ["RANK"]
from mmgraph.cli import leave, train_main
leave(train_main(sys.argv[2:]))
"""


def test_hosts_without_a_shared_file_system(own_graph: Path, tmp_path: Path) -> None:
    """Each rank has its own cache. It is built, reused, and repaired after a rank has lost a shard."""
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


def test_an_image_is_read_again_after_a_read_error(
    own_graph: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    wait_for_stable_images(own_graph)
    read = pkgutil.resolve_name(targets.READ_FILE)
    failed = iter([(None, IMAGE_STATUS.index("unreadable"))])
    monkeypatch.setattr(targets.READ_FILE, lambda file: next(failed, None) or read(file))
    assert main(["cache", *flags(own_graph)]) == 2
    assert re.search(rf"{re.escape(str(own_graph / 'images'))}/\d+\.png\b", error_line(capsys))
    monkeypatch.undo()
    assert main(["cache", *flags(own_graph)]) == 0
    assert not open_stored(own_graph).image_status.any() and IMAGE_STATUS[3] not in capsys.readouterr().out


def test_texts_that_change_while_a_command_runs(
    own_graph: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """No tokens are stored under the hash of another text.

    A build reads each text twice: to hash it, and to compute its tokens. If the hashes differ, the build fails.
    If the node table changes while encode loads the weights, the next build computes the entry of the changed text.
    """
    monkeypatch.setattr(targets.BUILD_TEXT_HASH, lambda text: bytes(16))
    assert main(["cache", *flags(own_graph)]) == 2
    assert ".png" not in error_line(capsys)
    assert {name.split("-")[0] for name in shard_files(store_of(own_graph))} == {"image"}  # no text shard was written
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
    computed = record_computed(monkeypatch)
    assert main(["cache", *flags(own_graph)]) == 0 and computed == [("text", 7)]


def test_build_resumes_after_a_full_disk(
    own_graph: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace = Path.replace

    def no_room(path: Path, target: Path) -> Path:
        if target.name.startswith("text-"):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return replace(path, target)

    monkeypatch.setattr(Path, "replace", no_room)
    assert main(["cache", *flags(own_graph)]) == 1
    error = error_line(capsys)
    assert os.strerror(errno.ENOSPC) in error and "--tower_cache off" in error and str(store_of(own_graph)) in error
    monkeypatch.undo()
    assert not [name for name in files_of(store_of(own_graph)) if name.endswith(".tmp")]
    computed = record_computed(monkeypatch)
    assert main(["cache", *flags(own_graph)]) == 0
    assert {modality for modality, _ in computed} == {"text"}  # the image shards are reused


def test_ranks_sync_every_few_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank syncs during a long shard, and immediately if it has nothing to do."""
    now, done = itertools.count(), [0]

    def work() -> Iterator[int]:
        for count in [64] * 20 + [0, 3]:
            done[0] += count
            yield count

    monkeypatch.setattr("time.monotonic", lambda: next(now))
    done_at_sync = [done[0] for _ in work_on_all_ranks(build_accelerator(), work())]
    monkeypatch.undo()
    # The last three syncs are at the count of 0, with the remaining 3 items, and at the end of the work.
    assert done_at_sync[-3:] == [20 * 64, 20 * 64 + 3, 20 * 64 + 3]
    counts = np.diff([0, *done_at_sync[:-1]])
    assert 4 < len(counts) < 8 and counts.max() <= 64 * (SYNC_SECONDS + 1)


def test_a_store_that_lacks_entries_is_refused(own_graph: Path, tmp_path: Path) -> None:
    assert main(["cache", *flags(own_graph)]) == 0
    for resident in (False, True):
        with pytest.raises(UserError, match=rf"^[^\n]*{re.escape(str(tmp_path))}\b[^\n]*$"):
            CachedTowers(TowerStore(tmp_path), load_content_hashes(own_graph), torch.device("cpu"), resident)


def test_auto_runs_live_towers_if_a_store_is_not_worth_it_or_not_writable(
    own_graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With an explicit --tower_cache, a folder that cannot be written is an error."""
    assert train_main(settings(own_graph, tmp_path / "one", "--max_steps=1")) == 0
    cache = own_graph / "mmgraph_cache"
    assert re.search(r"\b24 nodes\b", capsys.readouterr().out) and not list(cache.glob("towers-*"))
    blocked = tmp_path / "blocked"
    blocked.write_text("a file, not a folder")
    monkeypatch.setenv("MMGRAPH_CACHE", str(blocked))
    assert train_main(settings(own_graph, tmp_path / "two", "--max_steps=16")) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if f"{blocked}/towers-" in line]
    assert os.strerror(errno.ENOTDIR) in line and not list(cache.glob("towers-*"))
    explicit = f"--tower_cache={blocked}"
    assert train_main(settings(own_graph, tmp_path / "three", "--max_steps=16", explicit)) == 2
    line = error_line(capsys)
    assert f"--tower_cache {blocked}" in line and os.strerror(errno.ENOTDIR) in line
    monkeypatch.delenv("MMGRAPH_CACHE")
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr("shutil.disk_usage", lambda _: usage)
    assert str(tmp_path / "small") in str(tower_plan.refusal(tmp_path / "small", 100_000))
    assert tower_plan.refusal(tmp_path / "small", 900) is None


def test_flags_of_the_store(own_graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """--tower_cache with a folder, --tower_cache_local, and --tower_cache_device with a missing device."""
    here, local = tmp_path / "here", tmp_path / "local"
    more = (f"--tower_cache={here}", f"--tower_cache_local={local}")
    assert train_main(settings(own_graph, tmp_path / "a", "--max_steps=3", *more)) == 0
    assert not list((own_graph / "mmgraph_cache").glob("towers-*"))
    (store,), (copy,) = here.iterdir(), local.iterdir()
    assert {n: b for n, b in files_of(store).items() if n != "store.json"} == files_of(copy)
    assert str(copy) in capsys.readouterr().out  # the log names the store that is read
    local.joinpath("file").write_text("")
    more = (f"--tower_cache={here}", f"--tower_cache_local={local / 'file'}")
    assert train_main(settings(own_graph, tmp_path / "b", "--max_steps=3", *more)) == 0
    output = capsys.readouterr().out
    [line] = [line for line in output.splitlines() if f"--tower_cache_local {local / 'file'}" in line]
    assert os.strerror(errno.ENOTDIR) in line or os.strerror(errno.EEXIST) in line
    assert str(store) in output and str(copy) not in output  # the store is read without a copy
    if not torch.cuda.is_available():
        more = (f"--tower_cache={here}", "--tower_cache_device=cuda")
        assert train_main(settings(own_graph, tmp_path / "c", *more)) == 2
        assert "--tower_cache_device cuda" in error_line(capsys) and not (tmp_path / "c/metrics.jsonl").exists()


def test_error_names_a_damaged_shard(own_graph: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """After the shard is removed, the next run rebuilds it."""
    assert main(["cache", *flags(own_graph)]) == 0
    shard = next(store_of(own_graph).glob("text-*"))
    os.truncate(shard, shard.stat().st_size // 2)
    assert train_main(settings(own_graph, tmp_path / "run", "--max_steps=16")) == 2
    assert str(shard) in error_line(capsys)
    shard.unlink()
    assert train_main(settings(own_graph, tmp_path / "run", "--max_steps=16")) == 0


def shard_tensors(modality: str) -> dict[str, torch.Tensor]:
    """Return the tensors of a shard of two entries."""
    hashes, pooled = torch.arange(32, dtype=torch.uint8).view(2, 16), torch.zeros(2, 8)
    if modality == "text":
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
def test_error_names_a_shard_with_wrong_tensors(tmp_path: Path, name: str, tensor: torch.Tensor | None) -> None:
    """One tensor of the shard is missing (None), has a wrong dtype, shape or value, or is not part of the format."""
    for modality in ("text", "image"):
        save_file(shard_tensors(modality), tmp_path / f"{modality}-0.safetensors", {"format": "pt"})
    assert TowerStore(tmp_path).texts.starts[-1] == TowerStore(tmp_path).images.starts[-1] == 2
    modality = "image" if name in ("patches", "causes") else "text"
    tensors = {**shard_tensors(modality), name: tensor}
    path = tmp_path / f"{modality}-1.safetensors"
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, path)
    with pytest.raises(UserError, match=rf"^[^\n]*{re.escape(str(path))}\b[^\n]*$") as caught:
        TowerStore(tmp_path)
    # Not the errors for a shard that cannot be mapped or is from other towers.
    message = str(caught.value)
    assert "--tower_cache" not in message and f"{modality}-0" not in message


def test_error_names_shards_of_different_towers(tmp_path: Path) -> None:
    tensors = shard_tensors("image")
    save_file(tensors, tmp_path / "image-0.safetensors")
    save_file({**tensors, "patches": torch.zeros(2, 4, 6)}, tmp_path / "image-1.safetensors")
    with pytest.raises(UserError, match=r"^[^\n]*image-1\.safetensors[^\n]*image-0\.safetensors[^\n]*$"):
        TowerStore(tmp_path)


def test_resident_tokens_are_the_same(own_graph: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens from the memory of a device (here the CPU) equal tokens read from the shards."""
    monkeypatch.setattr(targets.SHARD_ENTRIES, 7)
    assert main(["cache", *flags(own_graph)]) == 0
    stored = open_stored(own_graph)
    resident = CachedTowers(stored.store, load_content_hashes(own_graph), torch.device("cpu"), resident=True)
    assert isinstance(resident.resident, ResidentTokens)
    for rows in (np.array([5]), np.array([39, 0, 7, 8, 6, 20]), np.arange(40)):
        pairs = zip(resident.pooled_tokens(rows, rows)[:3], stored.pooled_tokens(rows, rows)[:3], strict=True)
        for ours, theirs in pairs:
            assert torch.equal(ours, theirs) and ours.dtype == theirs.dtype


def test_the_reader_thread_uses_pinned_memory_and_the_device_of_its_rank(
    own_graph: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The calls are recorded, without a GPU. Accelerate's device has no index if there is one process."""
    assert main(["cache", *flags(own_graph)]) == 0
    stored, calls = open_stored(own_graph), list[object]()

    def select(device: object) -> None:
        calls.append((device, threading.current_thread() is threading.main_thread()))

    def read(store: TowerStore, texts: np.ndarray, images: np.ndarray, pin: bool = False) -> Tokens:
        calls.append(pin)
        return Tokens(torch.zeros(2, 1, 4), torch.ones(2, 1), torch.zeros(2, 1, 4))

    stored.device = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 3)
    monkeypatch.setattr(torch.cuda, "set_device", select)
    monkeypatch.setattr(TowerStore, "tokens", read)
    ends = torch.arange(2)
    [batch] = stored.batches([EdgeBatch(torch.arange(1), ends, ends, ends.numpy())])
    assert calls == [(3, False), True] and len(batch.prefetched.text) == 2


def load_content_hashes(graph: Path) -> tower_cache.ContentHashes:
    """Return the content hashes of the texts and images of all nodes."""
    config = parse_config(flags(graph))
    data = load_graph(config)
    return tower_cache.read_content_hashes(
        data.nodes,
        data.images,
        config.nodes,
        data.nodes_fingerprint,
        InputRules.of(config),
        graph / "mmgraph_cache",
        build_accelerator(),
    )


def test_missing_and_unreadable_images_are_counted(own_graph: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (own_graph / "images/1.png").unlink()
    (own_graph / "images/2.png").write_bytes(b"no picture")
    assert main(["cache", *flags(own_graph)]) == 0
    output = capsys.readouterr().out
    assert all(re.search(rf"\b1 {status}\b", output) for status in (IMAGE_STATUS[2], IMAGE_STATUS[3]))
    shards = TowerStore(store_of(own_graph)).images
    assert int(shards.starts[-1]) == 40  # 38 images, an unreadable file, a missing file
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
        stored, live = (torch.load(tmp_path / f"{towers}/features_{name}.pt") for towers in ("stored", "live"))
        assert torch.allclose(stored, live, atol=1e-5)


def test_a_store_is_not_held_in_memory(tmp_path: Path) -> None:
    """The process grows by less than 40 MB while it reads all entries of a store of 110 MB, equal to the bit."""
    generator = torch.Generator().manual_seed(0)
    written = {}
    for modality, name, shape in (("text", "tokens", (512, 8)), ("image", "patches", (512, 1, 13_000))):
        for shard in range(8):
            tensors = {
                "hashes": torch.randint(256, (512, 16), dtype=torch.uint8, generator=generator),
                "pooled": torch.zeros(512, 8),
                name: torch.randn(shape, generator=generator).half(),
                **({"offsets": torch.arange(513)} if modality == "text" else {"causes": torch.zeros(512).byte()}),
            }
            save_file(tensors, tmp_path / f"{modality}-{shard}.safetensors", {"format": "pt"})
            written[modality, shard] = tensors
    store, before = TowerStore(tmp_path), resident_mb()
    for indices in np.random.default_rng(0).permutation(8 * 512).reshape(-1, 64):
        tokens = store.tokens(indices, indices)
        for i, index in enumerate(indices.tolist()):
            assert torch.equal(tokens.text[i], written["text", index // 512]["tokens"][index % 512, None])
            assert torch.equal(tokens.patches[i], written["image", index // 512]["patches"][index % 512])
    print(f"grown by {resident_mb() - before:.1f} MB")
    assert resident_mb() - before < 40


@pytest.mark.slow
def test_time_to_the_first_step(own_graph: Path, tmp_path: Path) -> None:
    """With a complete store, the first step ends within 15 s of the launch.

    The faster of two launches counts, because other processes may slow the machine down.
    """
    assert main(["cache", *flags(own_graph)]) == 0
    seconds = []
    for name in ("one", "two"):
        start = time.time()
        accelerate_launch("cpu.yaml", *settings(own_graph, tmp_path / name, "--max_steps=1"))
        seconds.append((tmp_path / name / "metrics.jsonl").stat().st_mtime - start)
    print(f"first step after {min(seconds):.1f} s")
    assert min(seconds) < 15


def test_cache_with_a_wrong_flag_prints_one_error_line(own_graph: Path) -> None:
    done = run_warm(["-m", "mmgraph", "cache", "--nodez=1"])
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and done.stderr.startswith("mmgraph: error: ")
    assert re.search(r"--nodez\b.*--nodes\b", done.stderr)
