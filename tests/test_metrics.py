"""``metrics.jsonl`` and the tracker."""

import json
from pathlib import Path

import pytest
from conftest import read_metrics, settings

from mmgraph.cli import train_main
from mmgraph.metrics import MetricsFile


def test_rows_behind_the_kept_bytes_are_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = MetricsFile(path)
    for step in range(1, 6):
        first.write({"step": step})
    kept = first.sync()
    first.write({"step": 6})
    first.close()
    second = MetricsFile(path, kept)
    second.write({"step": 6, "again": True})
    second.close()
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6] and "again" in rows[-1]


def test_wandb_offline_keeps_its_run(graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "offline")
    ids = set()
    for steps in (2, 4):
        flags = settings(graph, tmp_path / "run", f"--max_steps={steps}", "--report_to=wandb")
        assert train_main(flags) == 0
        state = json.loads((tmp_path / f"run/state/step-{steps:08d}/state.json").read_text())
        ids.add(state["components"]["wandb"])
    files = list((tmp_path / "run/wandb").glob("offline-run-*/*.wandb"))
    assert len(ids) == 1 and len(files) == 2 and all(ids.pop() in file.name for file in files[:1])


def test_wandb_cannot_stop_a_run(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import wandb

    class Broken:
        id, offline = "abc", False

        def log(self, *args: object, **kwargs: object) -> None:
            raise ConnectionError("network is down")

    monkeypatch.setattr(wandb, "init", lambda **_: Broken())
    assert train_main(settings(graph, tmp_path / "log", "--max_steps=3", "--report_to=wandb")) == 0
    assert capsys.readouterr().out.count("wandb is off from here: ConnectionError: network is down") == 1
    assert len(read_metrics(tmp_path / "log")) == 3

    def refuse(**_: object) -> None:
        raise RuntimeError("no key")

    monkeypatch.setattr(wandb, "init", refuse)
    assert train_main(settings(graph, tmp_path / "init", "--max_steps=3", "--report_to=wandb")) == 0
    assert "wandb is off: RuntimeError: no key" in capsys.readouterr().out
