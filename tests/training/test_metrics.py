"""``metrics.jsonl`` and the trackers."""

import json
import struct
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import read_metrics, settings
from launches import SCRIPT, accelerate_launch, run

from mmgraph.cli import train_main
from mmgraph.training.metrics_file import MetricsFile


def test_rows_after_the_given_size_are_truncated(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path)
    for step in range(1, 6):
        first.write({"step": step})
    size = first.sync()
    first.write({"step": 6})
    first.close()
    second = MetricsFile(path, size)
    second.write({"step": 6, "again": True})
    second.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and "again" in rows[-1]


def wandb_records(path: Path) -> Iterator[bytes]:
    """Yield the records of a ``.wandb`` file: LevelDB's log format after a header of 7 bytes."""
    data, parts = path.read_bytes(), b""
    position = 7
    while position + 7 <= len(data):
        if 32768 - position % 32768 < 7:  # the rest of the block is too small for a record header
            position += 32768 - position % 32768
            continue
        _, length, record_type = struct.unpack("<IHB", data[position : position + 7])
        if record_type == 0:
            break
        parts += data[position + 7 : position + 7 + length]
        position += 7 + length
        if record_type in (1, 4):  # a full record, or the last part of a record
            yield parts
            parts = b""


def wandb_run(path: Path) -> tuple[str, dict[str, object], list[dict[str, object]]]:
    """Return the id, the config and the rows of a run, read from its ``.wandb`` file."""
    from wandb.proto.wandb_internal_pb2 import Record

    run_id, config, rows = "", {}, []
    for data in wandb_records(path):
        record = Record()
        record.ParseFromString(data)
        if record.WhichOneof("record_type") == "run":
            run_id = record.run.run_id
        for message in (record.run.config, record.config):
            config |= {item.key or item.nested_key[0]: json.loads(item.value_json) for item in message.update}
        if record.WhichOneof("record_type") == "history":
            rows.append({item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item})
    return run_id, config, rows


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_offline_wandb_run_has_the_rows_of_metrics(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ranks: int
) -> None:
    """All ranks write one run, which is offline without an API key. A resume on one process continues this run.

    In new processes: where others were forked, wandb may lose its file.
    """

    def train(*flags: str) -> str:
        done = run([sys.executable, SCRIPT, *flags])
        assert done.returncode == 0, done.stderr[-3000:]
        return done.stdout

    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    output = tmp_path / "run"
    flags = ["--report_to=wandb", "--project=owls", "--tags=a,b", "--notes=a text"]
    first_flags = settings(graph, output, "--max_steps=8", *flags)
    printed = train(*first_flags) if ranks == 1 else accelerate_launch("cpu_2proc.yaml", *first_flags).stdout
    (first,) = output.glob("wandb/offline-run-*/*.wandb")
    assert printed.count(f"wandb sync {first.parent}") == 1
    train(*settings(graph, output, "--max_steps=12", *flags))
    (second,) = set(output.glob("wandb/offline-run-*/*.wandb")) - {first}
    metrics, wandb_rows = read_metrics(output), []
    for path in (first, second):
        run_id, config, rows = wandb_run(path)
        assert run_id == first.stem.removeprefix("run-") and config["fused_dim"] == 32
        wandb_rows += rows
    assert [row["_step"] for row in wandb_rows] == list(range(1, 13))
    for row, expected in zip(wandb_rows, metrics, strict=True):
        assert {name: row[name] for name in expected if name != "step"} == {
            name: value for name, value in expected.items() if name != "step"
        }
    state = json.loads((output / "state/step-00000012/state.json").read_text())
    assert state["components"]["wandb"] == run_id


def test_wandb_starts_by_default_if_there_is_a_login(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without a login, a log line explains how to log in. With a login but no network, wandb is offline.

    The run completes in both cases.
    """
    import wandb

    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.delenv("WANDB_MODE", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    for name in ("none", "broken"):
        assert train_main(settings(graph, tmp_path / name, "--max_steps=2")) == 0
        [line] = [line for line in capsys.readouterr().out.splitlines() if "--report_to" in line]
        assert "wandb login" in line and "WANDB_API_KEY" in line and not (tmp_path / name / "wandb").exists()
        (tmp_path / "netrc").write_bytes(b"\xff\xfe")
    (tmp_path / "netrc").write_text("machine localhost login user password " + "k" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://localhost:9")  # no server listens on this port
    wandb.teardown()  # wandb stores the first settings of a process
    start = time.monotonic()
    assert train_main(settings(graph, tmp_path / "run", "--max_steps=2")) == 0
    assert time.monotonic() - start < 40
    [line] = [line for line in capsys.readouterr().out.splitlines() if "wandb sync" in line]
    [file] = (tmp_path / "run/wandb").glob("offline-run-*/*.wandb")
    assert str(file.parent) in line and "localhost" in line  # the host that wandb could not reach


def test_tensorboard_has_the_values_of_metrics(graph: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = tmp_path / "run"
    for steps in (3, 5):
        assert train_main(settings(graph, output, f"--max_steps={steps}", "--report_to=tensorboard")) == 0
    events = EventAccumulator(str(output / "tensorboard"))
    events.Reload()
    for name in ("loss", "lr", "grad_norm", "peak_memory_gb"):
        scalars = [(event.step, event.value) for event in events.Scalars(name)]
        assert scalars == [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in read_metrics(output)]


def test_an_error_of_wandb_does_not_end_the_run(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    class Broken:
        id, offline, url = "abc", False, ""

        def log(self, *args: object, **kwargs: object) -> None:
            raise ConnectionError("network is down")

        def finish(self) -> None: ...

    monkeypatch.setattr(wandb, "init", lambda **_: Broken())
    assert train_main(settings(graph, tmp_path / "log", "--max_steps=3", "--report_to=wandb")) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "ConnectionError: network is down" in line]
    assert line.startswith("wandb ")
    assert len(read_metrics(tmp_path / "log")) == 3

    limits = []

    def refuse(settings: wandb.Settings, **_: object) -> None:
        limits.append(settings.init_timeout)
        raise RuntimeError("no key")

    monkeypatch.setattr(wandb, "init", refuse)
    flags = ("--max_steps=3", "--report_to=wandb", "--collective_timeout=30")
    assert train_main(settings(graph, tmp_path / "init", *flags)) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "RuntimeError: no key" in line]
    assert line.startswith("wandb ") and len(read_metrics(tmp_path / "init")) == 3
    # The online and the offline attempt together get less than half of --collective_timeout, because other ranks wait.
    assert 0 < sum(limits) < 15
