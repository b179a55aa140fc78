"""Reports on runs that are damaged, incomplete, from an older version, or have hostile names."""

import json
import os
import re
import shutil
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from conftest import read_metrics, settings
from launches import launch
from pages import LINES, Opened, check_page
from playwright.sync_api import Browser

from mmgraph.cli import main

HOSTILE = "</script><script>window.taken = 1</script><img src=x onerror='window.taken = 1'>'\"&{{ 7 * 7 }}"


def test_hostile_names(graph: Path, browser: Browser, tmp_path: Path) -> None:
    """If the names of nodes, relations and the run contain HTML, scripts or templates, the page shows them as text."""
    folder = tmp_path / "graph"
    shutil.copytree(graph, folder, ignore=shutil.ignore_patterns("mmgraph_cache"))
    nodes = pd.read_csv(folder / "nodes.csv", dtype=str)
    nodes["short_name"], nodes["summary"] = HOSTILE, HOSTILE
    nodes.to_csv(folder / "nodes.csv", index=False)
    edges = pd.read_csv(folder / "edges.csv", dtype=str)
    edges["rel_id"] = HOSTILE
    edges.to_csv(folder / "edges.csv", index=False)
    launch("cpu.yaml", *settings(folder, tmp_path / "run", "--max_steps=20", "--eval_fraction=0.1", "--report",
                                 f"--run_name={HOSTILE}"))  # fmt: skip
    with Opened(browser, tmp_path / "run/report.html") as opened:
        opened.page.locator(".chart.map").hover()
        opened.page.wait_for_timeout(300)
        assert opened.page.evaluate("window.taken") is None
        assert HOSTILE in opened.page.locator("article").first.inner_text()
        assert opened.table("relations")[0][0] == HOSTILE and opened.page.locator("h1").inner_text() == HOSTILE
        opened.check()


@pytest.mark.parametrize(
    ("damage", "file", "fact"),
    [
        (lambda run: (run / "config.yaml").unlink(), ": ", "config.yaml"),
        (lambda run: (run / "config.yaml").write_text("a: [b"), "/config.yaml: ", "line 1"),
        (lambda run: (run / "config.yaml").write_text("[1]"), "/config.yaml: ", ""),
        (lambda run: (run / "evaluation.json").write_text("{}"), "/evaluation.json: ", "KeyError"),
        (lambda run: _change(run, "embeddings", {}), "/evaluation.json: ", "ValueError"),
        (lambda run: _change(run, "sampled", {}), "/evaluation.json: ", "KeyError"),
        (lambda run: _change(run, "edges", None), "/evaluation.json: ", "TypeError"),
        (lambda run: _change(run, "retrieval", {"r@1": 1}), "/evaluation.json: ", "KeyError"),
        (lambda run: _replace_line(run, 4, '{"step": Infinity}'), "/metrics.jsonl", "line 4: "),
        (lambda run: _replace_line(run, 4, "[" * 99_999), "/metrics.jsonl", "line 4: "),
        (lambda run: _replace_line(run, 4, '{"loss": 1}'), "/metrics.jsonl", "line 4: "),
        (lambda run: _replace_line(run, 4, "\x00" * 9), "/metrics.jsonl", "line 4: "),
    ],
)
def test_damaged_runs(
    runs: Path, tmp_path: Path, damage: Any, file: str, fact: str, capsys: pytest.CaptureFixture[str]
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(runs / "evaluated", copy)
    (copy / "report.html").write_text("the one before")
    damage(copy)
    assert main(["report", str(copy)]) == 2
    [error] = capsys.readouterr().err.splitlines()
    where = f"mmgraph: error: {copy}{file}"
    assert error.startswith(where) and fact in error.removeprefix(where)
    assert (copy / "report.html").read_text() == "the one before"


def _change(run: Path, name: str, value: object) -> None:
    table = json.loads((run / "evaluation.json").read_text())
    (run / "evaluation.json").write_text(json.dumps({**table, name: value}))


def _replace_line(run: Path, number: int, text: str) -> None:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    lines[number - 1] = text
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_wrong_usage(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for flags, *facts in (
        ([str(tmp_path)], f"{tmp_path}: ", "config.yaml"),
        ([str(runs / "plain"), "--node", "nobody"], "--node 'nobody': ", "node_id"),
        ([str(runs / "plain"), "--image", "gone.png"], "gone.png: file not found"),  # an image status
        ([str(runs / "plain"), "--output", str(tmp_path / "no/folder.html")], "--output ", f" {tmp_path / 'no'}"),
        ([str(runs / "plain"), "--output", str(tmp_path)], f"--output {tmp_path}: "),
        ([str(runs / "plain"), "--size", "3"], " --size "),
    ):
        assert main(["report", *flags]) == 2, flags
        [error] = capsys.readouterr().err.splitlines()
        assert error.startswith("mmgraph: error: ") and all(fact in error for fact in facts), error


def test_missing_files(runs: Path, browser: Browser, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The page states what is missing if the node table, the checkpoints or the logged steps are missing.

    The path of the run's folder, which the page shows, is wider than the screen of a phone.
    """
    copy = tmp_path / ("run" * 30)
    shutil.copytree(runs / "evaluated", copy)
    assert main(["report", str(copy), "--nodes", str(tmp_path / "gone.csv")]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "gone.csv" in line]
    assert line.startswith(f"{copy}: ")
    with Opened(browser, copy / "report.html", 390) as opened:
        opened.check()
        assert "gone.csv" in opened.page.locator("#map").inner_text()
        assert not opened.page.locator(".chart.map").count() and not opened.page.locator("article").count()
        assert len(opened.table("evaluation")) == 6
    shutil.rmtree(copy / "checkpoints")
    for name in ("metrics.jsonl", "evaluation.json", "environment.json"):
        (copy / name).unlink()
    assert main(["report", str(copy)]) == 0
    with Opened(browser, copy / "report.html", 390) as opened:
        opened.check()
        assert not opened.page.locator(".chart").count()
        assert opened.page.locator("#training .note").count() == 1  # states why there are no curves
        assert str(copy) in opened.page.locator("#map .note").inner_text()  # states that the folder has no checkpoint


def test_embeddings_that_are_not_finite(
    runs: Path, browser: Browser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page has the curves of both runs, but only the map of the run with finite embeddings."""
    copy = tmp_path / "run"
    shutil.copytree(runs / "evaluated", copy)
    final = copy / "checkpoints/multimodal_encoder_final.pt"
    weights = torch.load(final)
    weights["graph_proj.bias"][0] = torch.nan
    torch.save(weights, final)
    path = tmp_path / "both.html"
    assert main(["report", str(copy), str(runs / "plain"), "--output", str(path)]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if line.startswith(f"{copy}: ")]
    assert re.search(r"\brow 0\b", line)
    with Opened(browser, path) as opened:
        assert re.search(r"\brow 0\b", opened.page.locator("#map .note").first.inner_text())
        assert opened.page.locator(".chart.map").count() == 1 and len(opened.page.evaluate(LINES)["loss"]) == 2
        opened.check()


@pytest.mark.slow
def test_an_older_run_with_gaps(runs: Path, browser: Browser, tmp_path: Path) -> None:
    """The page shows a run of an older version, without report settings, ``epoch`` and ``grad_norm``.

    The run also has a skipped step, a damaged environment.json, and an evaluation table without a step, as
    ``mmgraph evaluate`` writes it.
    """
    copy = tmp_path / "run"
    shutil.copytree(runs / "evaluated", copy)
    lines = [line for line in (copy / "config.yaml").read_text().splitlines() if not line.startswith("report")]
    (copy / "config.yaml").write_text("\n".join(lines))
    rows = [{**row, "grad_norm": None} for row in read_metrics(copy)]
    rows[5] |= {"loss": None, "skipped": True}
    rows = [{name: value for name, value in row.items() if name != "epoch"} for row in rows]
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = json.loads((copy / "evaluation.json").read_text())
    (copy / "evaluation.json").write_text(json.dumps({name: table[name] for name in table if name != "step"}))
    (copy / "environment.json").write_text("[" * 99_999)
    assert main(["report", str(copy), str(runs / "evaluated"), "--output", str(tmp_path / "page.html")]) == 0
    with Opened(browser, tmp_path / "page.html") as opened:
        drawn = opened.page.evaluate(LINES)
        assert len(drawn["loss"]) == 2 and len(drawn["grad_norm"]) == 1
        different = {row[0] for row in opened.table("settings") if row[1] != row[2]}
        assert different <= {"report_to"}
        captions = opened.page.locator("#held-out .caption").all_inner_texts()
        first, second = (re.findall(r"\d+", caption) for caption in captions[:2])
        assert first and second == ["30", *first], captions  # only the second run has the step of its evaluation
        opened.check()


@pytest.mark.slow
def test_long_names_and_links_as_output(graph: Path, runs: Path, browser: Browser, tmp_path: Path) -> None:
    nodes = pd.read_csv(graph / "nodes.csv", dtype=str)
    nodes["short_name"] = "word " * 40_000
    nodes["image_path"] = [str(graph / path.replace("\\", "/")) for path in nodes["image_path"]]
    nodes.to_csv(tmp_path / "nodes.csv", index=False)
    (tmp_path / "link.html").symlink_to(tmp_path / "page.html")
    os.mkfifo(tmp_path / "pipe")
    flags = [str(runs / "plain"), f"--nodes={tmp_path / 'nodes.csv'}"]
    assert main(["report", *flags, f"--output={tmp_path / 'link.html'}"]) == 0
    assert (tmp_path / "link.html").is_symlink() and (tmp_path / "page.html").stat().st_size < 3_000_000
    assert main(["report", *flags, f"--output={tmp_path / 'pipe'}"]) == 2 and (tmp_path / "pipe").is_fifo()
    with Opened(browser, tmp_path / "page.html", 390) as opened:
        assert opened.page.evaluate("document.documentElement.scrollHeight") < 20_000
        opened.check()
    copy, output = tmp_path / ("run" * 30), tmp_path / "two.html"
    shutil.copytree(runs / "plain", copy)  # legends, headings and tables show the long name
    assert main(["report", str(runs / "plain"), str(copy), f"--output={output}"]) == 0
    check_page(browser, output)
