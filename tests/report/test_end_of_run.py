"""The report at the end of a run: files, trackers, failures and signals."""

import os
import signal
import sys
import time
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import pytest
import targets
from conftest import settings
from launches import SCRIPT, launch_command, run, run_warm
from targets import EMBED_SHARD_OF_REPORT, REPORT_AT_THE_END, WRITE_PAGE

from mmgraph.cli import train_main


@pytest.mark.parametrize("trackers", ["tensorboard", pytest.param("all", marks=pytest.mark.slow)])
def test_trackers_show_the_report(graph: Path, tmp_path: Path, trackers: str) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    flags = settings(
        graph, tmp_path / "run", "--report", f"--report_to={trackers}", "--max_steps=20", "--eval_fraction=0.1"
    )
    # wandb may lose its file in a warm process, which is a fork.
    done = run_warm([SCRIPT, *flags]) if trackers == "tensorboard" else run([sys.executable, SCRIPT, *flags])
    assert done.returncode == 0, done.stdout + done.stderr
    events = EventAccumulator(str(tmp_path / "run/tensorboard"), {"images": 0, "tensors": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {"report/map", "report/gallery"}
    [gallery] = events.Images("report/gallery")
    assert gallery.step == 20 and gallery.height == 12 * 100 and gallery.width == 925
    texts = [tag for tag in events.Tags()["tensors"] if tag.startswith("report/")]
    assert [tag.partition("/text_summary")[0] for tag in texts] == ["report/nearest"]  # no relations in this table
    if trackers == "tensorboard":
        return
    media = [path for path in (tmp_path / "run/wandb").glob("offline-*/files/media/**/*") if path.is_file()]
    assert {path.name.split("_")[0] for path in media} == {"map", "gallery", "nearest", "page"}
    page = next(path for path in media if path.name.startswith("page"))
    assert "report.html" not in page.name and page.read_text() == (tmp_path / "run/report.html").read_text()


def test_a_failing_report_does_not_fail_the_run(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("for the test")

    monkeypatch.setattr(WRITE_PAGE, fail)
    assert train_main(settings(graph, tmp_path / "run", "--max_steps=20", "--report")) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "ValueError: for the test" in line]
    assert f"mmgraph report {tmp_path / 'run'}" in line and not (tmp_path / "run/report.html").exists()
    assert (tmp_path / "run/checkpoints/multimodal_encoder_final.pt").is_file()


def test_a_short_run_writes_no_report(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    reports: list[object] = []
    monkeypatch.setattr(REPORT_AT_THE_END, lambda *arguments: reports.append(arguments))
    # One step sees the 24 ends of 12 edges, fewer than the 40 nodes. Two steps see 48 ends.
    assert train_main(settings(graph, tmp_path / "run", "--max_steps=1", "--report")) == 0
    assert capsys.readouterr().out.count(f"mmgraph report {tmp_path / 'run'}") == 1
    assert not reports and not (tmp_path / "run/report.html").exists()
    assert train_main(settings(graph, tmp_path / "run", "--max_steps=2", "--report")) == 0
    assert len(reports) == 1


@pytest.mark.parametrize("reason", ["embed", pytest.param("import", marks=pytest.mark.slow)])
def test_a_rank_that_fails_in_the_report_does_not_fail_the_run(graph: Path, tmp_path: Path, reason: str) -> None:
    """Rank 1 fails to embed its nodes or to import Bokeh. Both ranks succeed, and one line has the reason."""
    output = tmp_path / "run"
    flags = settings(graph, output, "--max_steps=20", "--report")
    if reason == "embed":
        fault = ("at_call", {"target": EMBED_SHARD_OF_REPORT, "number": 1, "action": "raise", "rank": 1})
        done = run_warm([SCRIPT, *flags], "cpu_2proc.yaml", [fault])
    else:  # in a new process, which has not imported Bokeh before
        script = tmp_path / "run.py"
        script.write_text(
            "import os, runpy, sys\n"
            "if os.environ['RANK'] == '1':\n    sys.modules['bokeh'] = None\n"
            f"runpy.run_path({SCRIPT!r}, run_name='__main__')\n"
        )
        done = run([*launch_command("cpu_2proc.yaml")[:-1], str(script), *flags])
    assert done.returncode == 0, done.stderr[-2000:]
    [line] = [line for line in done.stdout.splitlines() if f"mmgraph report {output}" in line]
    error = {"embed": "ValueError", "import": "the package bokeh is not installed"}[reason]
    assert f"rank 1: {error}" in line and "Traceback" not in done.stderr
    assert (output / "checkpoints/multimodal_encoder_final.pt").is_file()


def test_a_stopped_run_writes_no_report(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A signal that arrives during the last save, after all steps, also prevents the report."""
    save = resolve_name(targets.SAVE)
    reports: list[object] = []

    def stopped(self: Any) -> None:
        save(self)
        if targets.finished(self) and not targets.stop_requested(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)

    monkeypatch.setattr(targets.SAVE, stopped)
    monkeypatch.setattr(REPORT_AT_THE_END, lambda *arguments: reports.append(arguments))
    assert train_main(settings(graph, tmp_path / "run", "--max_steps=20", "--report")) == 0
    assert str(tmp_path / "run/checkpoints/multimodal_encoder_final.pt") in capsys.readouterr().out
    assert not reports and not (tmp_path / "run/report.html").exists()
    assert (tmp_path / "run/checkpoints/multimodal_encoder_final.pt").is_file()


@pytest.mark.parametrize("number", ["SIGINT", "SIGTERM", "SIGUSR1"])
def test_a_signal_ends_a_report(graph: Path, tmp_path: Path, number: str) -> None:
    """A signal while the page is written ends the run early. The final weights exist, and no partial page is left."""
    at_the_page = {"target": WRITE_PAGE, "number": 1}
    # The last fault in the list runs first: the signal, then a sleep of 60 s in place of a slow page.
    faults = [("at_call", {**at_the_page, "action": 60}), ("at_call", {**at_the_page, "action": number})]
    output = tmp_path / "run"
    start = time.monotonic()
    done = run_warm([SCRIPT, *settings(graph, output, "--max_steps=20", "--report")], faults=faults)
    assert done.code == 0 and time.monotonic() - start < 50, done
    [line] = [line for line in done.said.splitlines() if f"mmgraph report {output}" in line]
    assert "Error" not in line and "Traceback" not in done.said
    assert (output / "checkpoints/multimodal_encoder_final.pt").is_file()
    assert not list(output.glob("*report*"))
