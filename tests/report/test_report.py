"""The report: in a real browser, its values against the files they are from, and runs of every kind."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import numpy as np
import pandas as pd
import pytest
import targets
import torch
from conftest import graph_files, read_metrics, settings
from launches import REPOSITORY, launch, run_warm
from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright
from targets import EMBED_SHARD_OF_REPORT, REPORT_AT_THE_END, WRITE_PAGE

from mmgraph.cli import main, train_main
from mmgraph.demo.towers import build_towers
from mmgraph.report.history import read_run, thinned
from mmgraph.report.nodes import arrange

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
MOST_BYTES = 10_000_000
LOOKS = [(width, scheme) for width in (390, 1600) for scheme in ("light", "dark")]

# Pictures of the map are drawn on a canvas: each is decoded here once more, to see that it is whole.
PICTURES = """async () => {
  const sources = [...document.images].map((image) => image.src);
  for (const root of Bokeh.documents.flatMap((document) => document.roots()))
    for (const renderer of root.renderers)
      if (renderer.data_source.columns().includes("picture"))
        sources.push(...[...renderer.data_source.get("picture")].filter((uri) => uri));
  const failed = [];
  for (const source of sources) {
    const image = new Image();
    image.src = source;
    try { await image.decode(); } catch (error) { failed.push(source.slice(0, 80)); }
  }
  const shown = [...document.images].filter((image) => !image.complete || !image.naturalWidth);
  return [sources.length, failed.length + shown.length];
}"""

# Text that is too small, or too like what it stands on (WCAG 2's contrast ratio), and what is wider than the window.
READABLE = """() => {
  const parts = (colour) => colour.match(/[\\d.]+/g).map(Number);
  const light = ([r, g, b]) => [r, g, b].map((c) => c / 255)
    .map((c) => c <= 0.03928 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
    .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
  const ground = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const colour = parts(getComputedStyle(e).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour;
    }
    return matchMedia("(prefers-color-scheme: dark)").matches ? [0, 0, 0] : [255, 255, 255];
  };
  const bad = [];
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  while (walker.nextNode()) {
    const element = walker.currentNode.parentElement;
    if (!walker.currentNode.data.trim() || ["SCRIPT", "STYLE"].includes(element.tagName)) continue;
    if (!element.checkVisibility()) continue;
    const style = getComputedStyle(element);
    const [a, b] = [light(parts(style.color)), light(ground(element))].sort((x, y) => y - x);
    const contrast = (a + 0.05) / (b + 0.05);
    if (parseFloat(style.fontSize) < 12 || contrast < 4.5)
      bad.push([walker.currentNode.data.trim().slice(0, 40), style.fontSize, contrast]);
  }
  for (const table of document.querySelectorAll("table")) {
    const box = table.parentElement;
    const inside = box.getBoundingClientRect().right <= innerWidth + 1;
    const scrolls = ["auto", "scroll"].includes(getComputedStyle(box).overflowX);
    if (!inside || (box.scrollWidth > box.clientWidth + 1 && !scrolls)) bad.push(["table", table.dataset.table]);
  }
  if (document.documentElement.scrollWidth > innerWidth) bad.push(["page", document.documentElement.scrollWidth]);
  return bad;
}"""

# The points of a chart, by the chart's name: of each line its label, steps and values.
LINES = """() => Object.fromEntries(Bokeh.documents.flatMap((document) => document.roots()).map((root) => [root.name,
  root.renderers.filter((renderer) => renderer.name).map((renderer) =>
    [renderer.name, [...renderer.data_source.get_array("step")], [...renderer.data_source.get_array("value")]])]))"""


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium here (Debian: apt install chromium)")
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])  # of root, in containers
        yield browser
        browser.close()


class Opened:
    """A page in a window without a network, and what it said and asked for."""

    def __init__(self, browser: Browser, path: Path, width: int = 1600, scheme: Any = "light"):
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        self.page: Page = self.context.new_page()
        self.said: list[str] = []
        self.asked: list[str] = []
        self.page.on("console", lambda message: message.type in ("error", "warning") and self.said.append(message.text))
        self.page.on("pageerror", lambda error: self.said.append(str(error)))
        self.page.on("request", lambda request: self.asked.append(request.url))
        self.page.goto(path.absolute().as_uri())
        self.page.wait_for_selector("html[data-drawn]", timeout=60_000)
        self.page.wait_for_timeout(300)

    def __enter__(self) -> "Opened":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def check(self) -> int:
        """Nothing is said or asked for, all is readable, all pictures are there. Returns how many."""
        count, failed = self.page.evaluate(PICTURES)
        assert not self.said and failed == 0
        assert [url for url in self.asked if not url.startswith("data:")] == [self.page.url]
        assert self.page.evaluate(READABLE) == []
        return int(count)

    def table(self, name: str, number: int = 0) -> list[list[str]]:
        """The cells of a table's body."""
        table = self.page.locator(f"table[data-table={name}]").nth(number)
        return [row.locator("th, td").all_inner_texts() for row in table.locator("tbody tr").all()]

    def numbers(self, place: str) -> list[str]:
        """The numbers in the first note of a section."""
        return re.findall(r"\d+(?:,\d+)*", self.page.locator(f"#{place} .note").first.inner_text())


def check_page(browser: Browser, path: Path) -> None:
    """As a phone and as a wide screen show it, light and dark."""
    assert path.stat().st_size < MOST_BYTES
    for width, scheme in LOOKS:
        with Opened(browser, path, width, scheme) as opened:
            opened.check()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The README's demo: a folder with data/demo and runs/demo."""
    folder = tmp_path_factory.mktemp("demo")
    launch("cpu.yaml", "--demo", "--eval_every=200", cwd=folder)
    return folder


def test_the_demo_in_a_browser(demo: Path, browser: Browser) -> None:
    path = demo / "runs/demo/report.html"
    assert path.stat().st_size < MOST_BYTES
    for width, scheme in LOOKS:
        with Opened(browser, path, width, scheme) as opened:
            assert opened.check() > 1906 + 12 * 5  # the map's, and the gallery's
            box = opened.page.locator(".chart.map").bounding_box()
            assert box is not None and box["width"] <= width and box["height"] >= 400
            colours = Image.open(_screenshot(opened.page, demo / "map.png")).convert("RGB").getcolors(1 << 20)
            assert colours is None or len(colours) > 1000  # pictures, not dots
            ground = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (max(map(int, re.findall(r"\d+", ground))) < 60) == (scheme == "dark")


def _screenshot(page: Page, path: Path) -> Path:
    page.locator(".chart.map").screenshot(path=path)
    return path


def test_a_picture_is_told_under_the_pointer(demo: Path, browser: Browser) -> None:
    with Opened(browser, demo / "runs/demo/report.html") as opened:
        chart = opened.page.locator(".chart.map")
        chart.scroll_into_view_if_needed()
        place = opened.page.evaluate("""() => {
          const root = Bokeh.documents.flatMap((d) => d.roots()).find((root) => root.name === "map-0");
          const source = root.renderers.map((one) => one.data_source)
            .find((one) => one.columns().includes("picture") && one.get("picture").length);
          const [x, y] = ["x", "y"].map((name) => source.get_array(name));
          const far = x.map((_, i) => Math.min(...x.map((_, j) => i === j ? 9 : Math.hypot(x[i] - x[j], y[i] - y[j]))));
          const one = far.indexOf(Math.max(...far));  // of a picture that no other covers
          const frame = Bokeh.index.find_one(root).frame;
          const [left, top] = [frame.bbox.left + frame.x_scale.compute(x[one]), frame.y_scale.compute(y[one])];
          return [left, top, source.get("name")[one]];
        }""")
        box = chart.bounding_box()
        assert box is not None
        opened.page.mouse.move(box["x"] + place[0], box["y"] + place[1])
        opened.page.wait_for_timeout(500)
        texts = opened.page.evaluate("""() => {
          const found = [];
          const walk = (root) => { for (const element of root.querySelectorAll("*")) {
            if (element.shadowRoot) walk(element.shadowRoot);
            if (element.classList.contains("bk-Tooltip") || element.localName.includes("tooltip"))
              found.push((element.shadowRoot ?? element).textContent); } };
          walk(document);
          return found;
        }""")
        assert any(place[2] in text for text in texts), (place, texts)
        opened.check()


def test_values_are_those_of_the_files(demo: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts against metrics.jsonl; tables against ``mmgraph evaluate``; settings against config.yaml."""
    monkeypatch.chdir(demo)
    assert main(["evaluate", "runs/demo", "--json", "table.json"]) == 0
    table, rows = json.loads((demo / "table.json").read_text()), read_metrics(demo / "runs/demo")
    steps = [row for row in rows if row["step"] > 0]
    evaluations = [row for row in rows if "eval/z_graph/mrr" in row]
    assert [row["step"] for row in evaluations] == [0, 200, 400, 600, 768]
    with Opened(browser, demo / "runs/demo/report.html") as opened:
        lines = opened.page.evaluate(LINES)
        for name in ("loss", "loss_mm", "loss_graph", "lr", "edges_per_s", "data_wait_s", "grad_norm"):
            [[label, at, values]] = lines[name]
            assert label == "demo" and at == [row["step"] for row in steps], name
            assert values == [row[name] for row in steps], name
        for metric in ("mrr", "hits@1", "hits@3", "hits@10"):
            drawn = {label: (at, values) for label, at, values in lines[f"eval/{metric}"]}
            assert set(drawn) == {"z_graph", "fused", "text_only", "image_only", "concat", "random"}
            for label, (at, values) in drawn.items():
                assert at == [row["step"] for row in evaluations]
                assert values == [row[f"eval/{label}/{metric}"] for row in evaluations], label
        shown = opened.table("evaluation")
        assert [row[0] for row in shown] == list(table["embeddings"])
        for name, *cells in shown:
            values = [table["embeddings"][name][metric] for metric in ("mrr", "hits@1", "hits@3", "hits@10")]
            values += [table["sampled"][name][metric] for metric in ("mrr", "hits@10")]
            assert cells == [f"{value:.4f}" for value in values], name
        relations = {row[0]: row[1:] for row in opened.table("relations")}
        assert set(relations) == set(table["relations"])
        for name, (edges, *cells) in relations.items():
            values = table["relations"][name]
            assert edges == f"{values['edges']:,}"
            assert cells == [f"{values[kind]:.4f}" for kind in table["embeddings"]], name
        assert {row[0]: row[1] for row in opened.table("settings")}["learning_rate"] == "0.001"
        assert opened.table("images") == [["whole", "1,906", ""]]
        text = opened.page.locator("main").inner_text()
        assert f"R@1 {table['retrieval']['r@1']:.4f}" in text and f"{table['retrieval_shuffled']['r@1']:.4f}" in text
        [start] = json.loads((demo / "runs/demo/environment.json").read_text())
        assert start["versions"]["torch"] in text and start["cpu"] in text and start["from_step"] == 0


def test_the_gallery_against_brute_force(demo: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(demo)
    assert main(["encode", "runs/demo", "--features", "z_graph", "--format", "npy"]) == 0
    vectors = np.load("runs/demo/features/features_z_graph.npy").astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    nodes = pd.read_csv("data/demo/nodes.csv", dtype=str, keep_default_na=False)
    rows = {node_id: row for row, node_id in enumerate(nodes["node_id"])}
    edges = {name: pd.read_csv(f"data/demo/{name}.csv", dtype=str) for name in ("edges", "eval_edges")}
    pairs = {name: set(zip(table["src_id"], table["dst_id"], strict=True)) for name, table in edges.items()}
    assert main(["report", "runs/demo", "--output", "asked.html", "--node", "cat face", "--text", "a red apple"]) == 0
    with Opened(browser, demo / "asked.html") as opened:
        entries = opened.page.locator("article").all()
        assert len(entries) == 12
        assert "cat face" in entries[0].inner_text() and "a red apple" in entries[1].inner_text()
        assert entries[1].locator(".node .id").inner_text() not in rows  # it is not in the graph
        for entry in [entries[0], *entries[2:]]:
            node_id = entry.locator(".node .id").inner_text()
            row = rows[node_id]
            scores = vectors @ vectors[row]
            scores[row] = -2
            found = [title.rsplit("(", 1)[1][:-1] for title in
                     (name.get_attribute("title") or "" for name in entry.locator("li .name").all())]  # fmt: skip
            assert len(found) == 8
            assert scores[[rows[other] for other in found]] == pytest.approx(np.sort(scores)[::-1][:8], abs=1e-6)
            told = entry.locator("li .similarity").all_inner_texts()
            assert told == [f"{scores[rows[other]]:.3f}" for other in found]
            for item, other in zip(entry.locator("li").all(), found, strict=True):
                both = {(node_id, other), (other, node_id)}
                edge = "trained" if both & pairs["edges"] else "held out" if both & pairs["eval_edges"] else ""
                assert "".join(item.locator(".edge").all_inner_texts()) == edge
        opened.check()


def test_it_is_the_same_at_the_runs_end_and_later(demo: Path, browser: Browser, monkeypatch: Any) -> None:
    monkeypatch.chdir(demo)
    assert main(["report", "--output", "later.html"]) == 0  # of the run below runs/ that ended last
    texts = []
    for path in (demo / "runs/demo/report.html", demo / "later.html"):
        with Opened(browser, path) as opened:
            texts.append(re.sub(r"Written [^.]*\.", "", opened.page.locator("body").inner_text()))
    assert texts[0] == texts[1]


@pytest.fixture(scope="module")
def runs(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of many kinds on the tiny graph: evaluated, not evaluated, of one epoch, and on two ranks."""
    folder = tmp_path_factory.mktemp("runs")
    for name, config, flags in (
        ("evaluated", "cpu.yaml", ["--max_steps=30", "--eval_fraction=0.1", "--eval_every=10"]),
        ("plain", "cpu.yaml", ["--epochs=1", "--learning_rate=3e-3"]),
        ("ranks", "cpu_2proc.yaml", ["--max_steps=30", "--eval_fraction=0.1"]),
    ):
        launch(config, *settings(graph, folder / name, "--report", "--report_to=none", *flags))
    return folder


def test_a_run_without_evaluation_and_of_one_epoch(runs: Path, browser: Browser) -> None:
    check_page(browser, runs / "plain/report.html")
    with Opened(browser, runs / "plain/report.html") as opened:
        text = opened.page.locator("#held-out").inner_text()
        assert "plain" in text and "--eval_fraction" in text and "--eval_edges" in text
        assert opened.numbers("map")[:2] == ["40", "40"]  # all nodes, with their picture
        assert "1 of 1" in opened.page.locator(".tiles dd").all_inner_texts()  # epochs
        assert not opened.page.locator("table[data-table=evaluation]").count()


def test_two_runs_side_by_side(runs: Path, browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "both.html"
    assert main(["report", str(runs / "evaluated"), str(runs / "plain"), "--output", str(path)]) == 0
    check_page(browser, path)
    with Opened(browser, path) as opened:
        lines = opened.page.evaluate(LINES)
        for name, own in (("evaluated", 0), ("plain", 1)):
            label, at, values = lines["loss"][own]
            rows = [row for row in read_metrics(runs / name) if "loss" in row]
            assert (label, at, values) == (name, [row["step"] for row in rows], [row["loss"] for row in rows])
        maps = [place.bounding_box() for place in opened.page.locator(".chart.map").all()]
        assert len(maps) == 2 and maps[0] and maps[1] and maps[0]["y"] == maps[1]["y"]  # side by side
        rows = {row[0]: row[1:] for row in opened.table("settings")}
        assert list(rows)[:3] == [name for name in rows if rows[name][0] != rows[name][1]][:3]  # what differs is first
        assert rows["learning_rate"] == ["0.001", "0.003"]
    with Opened(browser, path, 390) as opened:
        maps = [place.bounding_box() for place in opened.page.locator(".chart.map").all()]
        assert maps[0] and maps[1] and maps[0]["y"] < maps[1]["y"]  # one below the other


def test_over_ranks(runs: Path, browser: Browser) -> None:
    """The same nearest nodes as one process finds."""

    pages = {}
    for name in ("evaluated", "ranks"):
        with Opened(browser, runs / name / "report.html") as opened:
            pages[name] = opened.page.locator("article ol").all_inner_texts()
            opened.check()
    assert pages["evaluated"] == pages["ranks"]
    [start] = json.loads((runs / "ranks/environment.json").read_text())
    assert start["processes"] == 2


def test_trackers_get_the_figures(graph: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    launch("cpu.yaml", *settings(graph, tmp_path / "run", "--report", "--report_to=all", "--max_steps=20",
                                 "--eval_fraction=0.1"))  # fmt: skip
    events = EventAccumulator(str(tmp_path / "run/tensorboard"), {"images": 0, "tensors": 0})
    events.Reload()
    assert set(events.Tags()["images"]) == {"report/map", "report/gallery"}
    [gallery] = events.Images("report/gallery")
    assert gallery.step == 20 and gallery.height == 12 * 100 and gallery.width == 925
    texts = [tag for tag in events.Tags()["tensors"] if tag.startswith("report/")]
    assert [tag.partition("/text_summary")[0] for tag in texts] == ["report/nearest"]  # no relations in this table
    media = [path for path in (tmp_path / "run/wandb").glob("offline-*/files/media/**/*") if path.is_file()]
    assert {path.name.split("_")[0] for path in media} == {"map", "gallery", "nearest", "page"}
    page = next(path for path in media if path.name.startswith("page"))
    assert "report.html" not in page.name and page.read_text() == (tmp_path / "run/report.html").read_text()


def test_a_graph_without_images(graph: Path, browser: Browser, tmp_path: Path) -> None:
    folder = tmp_path / "graph"
    shutil.copytree(graph, folder, ignore=shutil.ignore_patterns("mmgraph_cache"))
    nodes = pd.read_csv(folder / "nodes.csv", dtype=str)
    nodes["image_path"] = None
    nodes.to_csv(folder / "nodes.csv", index=False)
    launch("cpu.yaml", *settings(folder, tmp_path / "run", "--max_steps=20", "--report"))
    check_page(browser, tmp_path / "run/report.html")
    with Opened(browser, tmp_path / "run/report.html") as opened:
        assert opened.table("images")[0][:2] == ["no image path", "40"]
        assert opened.numbers("map")[:2] == ["40", "0"]  # all nodes, with their picture
        assert opened.page.locator(".no-picture").count() >= 12 and not opened.page.locator("img").count()


def test_bad_images_are_told_by_cause(graph: Path, browser: Browser, tmp_path: Path) -> None:
    folder = tmp_path / "graph"
    shutil.copytree(graph, folder, ignore=shutil.ignore_patterns("mmgraph_cache"))
    (folder / "images/3.png").unlink()
    (folder / "images/8.png").write_text("no picture")
    whole = (folder / "images/9.png").read_bytes()
    (folder / "images/9.png").write_bytes(whole[: len(whole) // 2])
    launch("cpu.yaml", *settings(folder, tmp_path / "run", "--max_steps=20", "--report"))
    with Opened(browser, tmp_path / "run/report.html") as opened:
        found = {row[0]: row[1:] for row in opened.table("images")}
        assert {name: cells[0] for name, cells in found.items()} == {
            "whole": "37", "file not found": "1", "unreadable": "1", "truncated": "1",
        }  # fmt: skip
        assert found["file not found"][1] == "003: images\\3.png"
        opened.check()


HOSTILE = "</script><script>window.taken = 1</script><img src=x onerror='window.taken = 1'>'\"&{{ 7 * 7 }}"


def test_names_from_strangers(graph: Path, browser: Browser, tmp_path: Path) -> None:
    """Names and texts that are HTML, scripts or templates stay what they are; also of the run and its relations."""
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
        ([str(runs / "plain"), "--image", "gone.png"], "gone.png: file not found"),  # a cause's name
        ([str(runs / "plain"), "--output", str(tmp_path / "no/folder.html")], "--output ", f" {tmp_path / 'no'}"),
        ([str(runs / "plain"), "--output", str(tmp_path)], f"--output {tmp_path}: "),
        ([str(runs / "plain"), "--size", "3"], " --size "),
    ):
        assert main(["report", *flags]) == 2, flags
        [error] = capsys.readouterr().err.splitlines()
        assert error.startswith("mmgraph: error: ") and all(fact in error for fact in facts), error


def test_what_is_not_there_any_more_is_told_on_the_page(
    runs: Path, browser: Browser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A run's folder that was copied without its data, or before it wrote a checkpoint or a step. The page shows the
    folder's path, which is wider than a phone's screen."""
    copy = tmp_path / ("run" * 30)
    shutil.copytree(runs / "evaluated", copy)
    assert main(["report", str(copy), "--nodes", str(tmp_path / "gone.csv")]) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "gone.csv" in line]
    assert line.startswith(f"{copy}: ")
    check_page(browser, copy / "report.html")
    with Opened(browser, copy / "report.html") as opened:
        assert "gone.csv" in opened.page.locator("#map").inner_text()
        assert not opened.page.locator(".chart.map").count() and not opened.page.locator("article").count()
        assert len(opened.table("evaluation")) == 6
    shutil.rmtree(copy / "checkpoints")
    for name in ("metrics.jsonl", "evaluation.json", "environment.json"):
        (copy / name).unlink()
    assert main(["report", str(copy)]) == 0
    check_page(browser, copy / "report.html")
    with Opened(browser, copy / "report.html") as opened:
        assert not opened.page.locator(".chart").count()
        assert opened.page.locator("#training .note").count() == 1  # why there is no curve
        assert str(copy) in opened.page.locator("#map .note").inner_text()  # it has no checkpoint


def test_a_running_run(runs: Path, browser: Browser, tmp_path: Path) -> None:
    """Its last row is half written; its newest checkpoint is of an epoch."""
    copy = tmp_path / "run"
    shutil.copytree(runs / "evaluated", copy)
    (copy / "checkpoints/multimodal_encoder_final.pt").unlink()
    text = (copy / "metrics.jsonl").read_text()
    (copy / "metrics.jsonl").write_text(text[: text.rindex('"loss_mm"')])
    assert main(["report", str(copy)]) == 0
    with Opened(browser, copy / "report.html") as opened:
        assert opened.page.evaluate(LINES)["loss"][0][1] == list(range(1, 30))
        assert "multimodal_encoder_epoch_2.pt" in opened.page.locator("#map").inner_text()
        opened.check()


def test_a_report_that_fails_fails_no_run(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def fail(*_: object) -> None:
        raise ValueError("for the test")

    monkeypatch.setattr(WRITE_PAGE, fail)
    assert train_main(settings(graph, tmp_path / "run", "--max_steps=20", "--report")) == 0
    [line] = [line for line in capsys.readouterr().out.splitlines() if "ValueError: for the test" in line]
    assert f"mmgraph report {tmp_path / 'run'}" in line and not (tmp_path / "run/report.html").exists()
    assert (tmp_path / "run/checkpoints/multimodal_encoder_final.pt").is_file()


def test_few_steps_embed_no_graph(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    made: list[object] = []
    monkeypatch.setattr(REPORT_AT_THE_END, lambda *given: made.append(given))
    assert train_main(settings(graph, tmp_path / "run", "--max_steps=1", "--report")) == 0  # 24 ends of 40 nodes
    assert capsys.readouterr().out.count(f"mmgraph report {tmp_path / 'run'}") == 1
    assert not made and not (tmp_path / "run/report.html").exists()
    assert train_main(settings(graph, tmp_path / "run", "--max_steps=2", "--report")) == 0  # 48 ends
    assert len(made) == 1


def test_a_rank_that_fails_in_the_report_fails_no_run(graph: Path, tmp_path: Path) -> None:
    """Rank 1 cannot import what a report needs, or fails to embed its nodes: both ranks end well, with one line."""
    script = tmp_path / "run.py"
    script.write_text(
        "import os, runpy, sys\nimport pytest\nwhat = sys.argv.pop(1)\n"
        "if os.environ['RANK'] == '1' and what == 'import':\n    sys.modules['bokeh'] = None\n"
        "if os.environ['RANK'] == '1' and what == 'embed':\n"
        f"    pytest.MonkeyPatch().setattr({EMBED_SHARD_OF_REPORT!r}, lambda *_: 1 / 0)\n"
        f"runpy.run_path({str(REPOSITORY / 'launch.py')!r}, run_name='__main__')\n"
    )
    for what, told in (("import", "ModuleNotFoundError"), ("embed", "ZeroDivisionError")):
        done = run_warm(
            [str(script), what, *settings(graph, tmp_path / what, "--max_steps=20", "--report")], "cpu_2proc.yaml"
        )
        assert done.returncode == 0, done.stderr[-2000:]
        [line] = [line for line in done.stdout.splitlines() if f"mmgraph report {tmp_path / what}" in line]
        assert f"rank 1: {told}" in line and "Traceback" not in done.stderr
        assert (tmp_path / what / "checkpoints/multimodal_encoder_final.pt").is_file()


def test_embeddings_that_are_not_finite(
    runs: Path, browser: Browser, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The page has the rest, also of the run beside it."""
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


def test_colours_are_a_runs_own(runs: Path, browser: Browser, tmp_path: Path) -> None:
    """Also where the first of several runs has evaluated nothing; and the dashed line is the one that is told."""
    path = tmp_path / "page.html"
    assert main(["report", *(str(runs / name) for name in ("plain", "evaluated", "ranks")), "--output", str(path)]) == 0
    with Opened(browser, path) as opened:
        style = "(all) => all.map((one) => [one.innerText.trim(), one.querySelector('span').style.borderTopColor])"
        of_ranks = dict(opened.page.locator("#held-out .legend li").evaluate_all(style))
        of_runs = dict(opened.page.locator("#training .legend li").evaluate_all(style))
        for label, colour in of_ranks.items():
            assert colour == of_runs[label.partition(":")[0]]
        lines = opened.page.evaluate(LINES)
        for metric in ("mrr", "hits@1", "hits@3", "hits@10"):
            assert [label for label, *_ in lines[f"eval/{metric}"]] == list(of_ranks)
        opened.check()


def test_an_older_run_with_gaps(runs: Path, browser: Browser, tmp_path: Path) -> None:
    """Settings it did not know, a metric it never told, losses that were not finite, a table from mmgraph evaluate."""
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
        told = {row[0] for row in opened.table("settings") if row[1] != row[2]}
        assert told <= {"report_to"}
        captions = opened.page.locator("#held-out .caption").all_inner_texts()
        first, second = (re.findall(r"\d+", caption) for caption in captions[:2])
        assert first and second == ["30", *first], captions  # the step, where it is known
        opened.check()


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
    shutil.copytree(runs / "plain", copy)  # the page of two runs shows its name in legends, headings and tables
    assert main(["report", str(runs / "plain"), str(copy), f"--output={output}"]) == 0
    check_page(browser, output)


def test_a_run_that_is_asked_to_stop_makes_no_report(
    graph: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Though the signal comes in the last save, when all steps are done."""
    save = resolve_name(targets.SAVE)
    made: list[object] = []

    def stopped(self: Any) -> None:
        save(self)
        if targets.finished(self) and not targets.stop_requested(self):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.5)

    monkeypatch.setattr(targets.SAVE, stopped)
    monkeypatch.setattr(REPORT_AT_THE_END, lambda *given: made.append(given))
    assert train_main(settings(graph, tmp_path / "run", "--max_steps=20", "--report")) == 0
    assert str(tmp_path / "run/checkpoints/multimodal_encoder_final.pt") in capsys.readouterr().out
    assert not made and not (tmp_path / "run/report.html").exists()
    assert (tmp_path / "run/checkpoints/multimodal_encoder_final.pt").is_file()


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1])
def test_a_signal_ends_a_report(graph: Path, tmp_path: Path, number: signal.Signals) -> None:
    """At once, with all of the run saved, and nothing half written."""
    script = tmp_path / "run.py"
    script.write_text(
        "import runpy, time\nimport pytest\n"
        "slow = lambda *_: (print('reporting', flush=True), time.sleep(60))\n"
        f"pytest.MonkeyPatch().setattr({WRITE_PAGE!r}, slow)\n"
        f"runpy.run_path({str(REPOSITORY / 'launch.py')!r}, run_name='__main__')\n"
    )
    command = [sys.executable, str(script), *settings(graph, tmp_path / "run", "--max_steps=20", "--report")]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert process.stdout is not None
    for line in process.stdout:
        if line.startswith("reporting"):
            break
    sent = time.monotonic()
    os.kill(process.pid, number)
    rest = process.stdout.read()
    assert process.wait(timeout=30) == 0 and time.monotonic() - sent < 10
    [line] = [line for line in rest.splitlines() if f"mmgraph report {tmp_path / 'run'}" in line]
    assert "Error" not in line and "Traceback" not in rest
    assert (tmp_path / "run/checkpoints/multimodal_encoder_final.pt").is_file()
    assert not list((tmp_path / "run").glob("*report*"))


@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 40, 500])
def test_places_of_any_number_of_nodes(count: int) -> None:
    vectors = np.random.default_rng(0).normal(size=(count, 16)).astype(np.float32)
    for some in (vectors, np.ones_like(vectors)):
        places = arrange(some / np.linalg.norm(some, axis=1, keepdims=True), seed=1)
        assert places.shape == (count, 2) and places.min() >= 0 and places.max() <= 1
        assert np.array_equal(places, arrange(some / np.linalg.norm(some, axis=1, keepdims=True), seed=1))


def test_places_keep_groups_together() -> None:
    """Two far groups on the map stay two groups."""
    generator = np.random.default_rng(0)
    centres = generator.normal(size=(2, 32))
    vectors = np.repeat(centres, 60, axis=0) + 0.1 * generator.normal(size=(120, 32))
    places = arrange((vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32), seed=0)
    distances = np.linalg.norm(places[:, None] - places[None], axis=2)
    np.fill_diagonal(distances, np.inf)
    assert ((distances.argmin(axis=1) < 60) == (np.arange(120) < 60)).all()


def test_thinned_curves() -> None:
    steps = np.arange(1, 2501, dtype=float)
    values = np.sin(steps)
    values[10:14] = np.nan
    at, means, size = thinned({"step": steps, "loss": values}, "loss", 1000)
    assert size == 3 and at.tolist() == [*range(3, 2500, 3), 2500]
    expected = [np.nanmean(values[i : i + 3]) if np.isfinite(values[i : i + 3]).any() else np.nan
                for i in range(0, 2500, 3)]  # fmt: skip
    assert np.array_equal(means, np.array(expected), equal_nan=True) or np.allclose(
        means, expected, rtol=1e-12, equal_nan=True
    )
    assert thinned({"step": steps[:1000], "loss": values[:1000]}, "loss", 1000)[2] == 1


def test_a_long_run(runs: Path, browser: Browser, tmp_path: Path) -> None:
    """100,000 steps: the page says that a point is a mean, and stays small."""
    copy = tmp_path / "run"
    shutil.copytree(runs / "plain", copy)
    row = read_metrics(copy)[0]
    generator = np.random.default_rng(0)
    losses = generator.random(100_000)
    with (copy / "metrics.jsonl").open("w") as file:
        for step, loss in enumerate(losses, 1):
            file.write(json.dumps({**row, "step": step, "loss": float(loss)}) + "\n")
    assert len(read_run(copy).steps["loss"]) == 100_000
    assert main(["report", str(copy)]) == 0
    assert (copy / "report.html").stat().st_size < 5_000_000
    with Opened(browser, copy / "report.html") as opened:
        [[_, at, values]] = opened.page.evaluate(LINES)["loss"]
        assert at == list(range(100, 100_001, 100))
        assert values == pytest.approx(losses.reshape(-1, 100).mean(axis=1), rel=1e-9)
        assert opened.numbers("training") == ["100"]  # steps that a point is the mean of


@pytest.mark.slow
def test_200000_nodes(browser: Browser, tmp_path: Path) -> None:
    """A real run of 200,000 nodes with pictures that do not compress: below 10 MB, and the sample is stated."""
    folder, count = graph_files(tmp_path / "graph"), 200_000
    generator = np.random.default_rng(0)
    for number in range(400):
        noise = generator.integers(0, 255, (120, 120, 3), np.uint8)
        Image.fromarray(noise).save(folder / f"images/noise{number}.png")
    words = generator.choice(["red", "green", "blue", "small"], (count, 6))
    rows = [(str(i), f"node {i}", " ".join(words[i]), f"images/noise{i % 400}.png") for i in range(count)]
    pd.DataFrame(rows, columns=["node_id", "short_name", "summary", "image_path"]).to_csv(
        folder / "nodes.csv", index=False
    )
    ends = generator.integers(0, count, (400_000, 2))
    pd.DataFrame(ends.astype(str), columns=["src_id", "dst_id"]).to_csv(folder / "edges.csv", index=False)
    build_towers(folder / "towers", ["red", "green", "blue", "small", "node 0 1 2 3 4 5 6 7 8 9"])
    train = settings(folder, tmp_path / "run", "--max_steps=200", "--global_batch_size=1024", "--report")
    launch("cpu.yaml", *train)
    check_page(browser, tmp_path / "run/report.html")
    size = (tmp_path / "run/report.html").stat().st_size
    with Opened(browser, tmp_path / "run/report.html") as opened:
        shown, total, seed, pictures = opened.numbers("map")[:4]
        assert (shown, total, seed) == ("2,000", "200,000", "42") and opened.numbers("gallery")[0] == "200,000"
    print(f"{size / 1e6:.1f} MB, {pictures} of 2,000 with their picture")
