"""The report of the demo in a browser, compared with the files of the run."""

import json
import re
from pathlib import Path

import pytest
from conftest import read_metrics
from launches import launch
from pages import LINES, LOOKS, MAX_BYTES, Opened
from PIL import Image
from playwright.sync_api import Browser, Page

from mmgraph.cli import main

pytestmark = pytest.mark.slow  # the page of a small graph is tested in test_page.py


@pytest.fixture(scope="module")
def demo_and_output(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Run 30 steps of the demo. Returns a folder with data/demo and runs/demo, and the output of the run."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, launch("cpu.yaml", "--demo", "--eval_every=15", "--max_steps=30", cwd=folder).stdout


@pytest.fixture(scope="module")
def demo(demo_and_output: tuple[Path, str]) -> Path:
    return demo_and_output[0]


def test_printed_lines(demo_and_output: tuple[Path, str]) -> None:
    demo, output = demo_and_output
    lines = output.splitlines()
    # The run logs once that the towers have random weights.
    assert sum("--model_name openai/clip-vit-base-patch32" in line for line in lines) == 1
    assert "data/demo" in lines[0] and (demo / "data/demo/nodes.csv").is_file()
    for line, path in ((lines[-3], "checkpoints/multimodal_encoder_final.pt"), (lines[-1], "report.html")):
        assert f"runs/demo/{path}" in line and (demo / "runs/demo" / path).is_file()


def test_the_demo_in_a_browser(demo: Path, browser: Browser) -> None:
    path = demo / "runs/demo/report.html"
    assert path.stat().st_size < MAX_BYTES
    for width, scheme in LOOKS:
        with Opened(browser, path, width, scheme) as opened:
            assert opened.check() > 1906 + 12 * 5  # images of the map and of the gallery
            box = opened.page.locator(".chart.map").bounding_box()
            assert box is not None and box["width"] <= width and box["height"] >= 400
            colours = Image.open(_screenshot(opened.page, demo / "map.png")).convert("RGB").getcolors(1 << 20)
            assert colours is None or len(colours) > 1000  # images, not dots
            ground = opened.page.evaluate("getComputedStyle(document.body).backgroundColor")
            assert (max(map(int, re.findall(r"\d+", ground))) < 60) == (scheme == "dark")


def _screenshot(page: Page, path: Path) -> Path:
    page.locator(".chart.map").screenshot(path=path)
    return path


def test_tooltip_of_an_image(demo: Path, browser: Browser) -> None:
    with Opened(browser, demo / "runs/demo/report.html") as opened:
        chart = opened.page.locator(".chart.map")
        chart.scroll_into_view_if_needed()
        place = opened.page.evaluate("""() => {
          const root = Bokeh.documents.flatMap((d) => d.roots()).find((root) => root.name === "map-0");
          const source = root.renderers.map((one) => one.data_source)
            .find((one) => one.columns().includes("picture") && one.get("picture").length);
          const [x, y] = ["x", "y"].map((name) => source.get_array(name));
          const far = x.map((_, i) => Math.min(...x.map((_, j) => i === j ? 9 : Math.hypot(x[i] - x[j], y[i] - y[j]))));
          const one = far.indexOf(Math.max(...far));  // an image that no other image covers
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


def test_values_equal_the_files(demo: Path, browser: Browser, monkeypatch: pytest.MonkeyPatch) -> None:
    """Charts equal metrics.jsonl, tables equal the result of ``mmgraph evaluate``, and settings equal config.yaml."""
    monkeypatch.chdir(demo)
    assert main(["evaluate", "runs/demo", "--json", "table.json"]) == 0
    table, rows = json.loads((demo / "table.json").read_text()), read_metrics(demo / "runs/demo")
    steps = [row for row in rows if row["step"] > 0]
    evaluations = [row for row in rows if "eval/z_graph/mrr" in row]
    assert [row["step"] for row in evaluations] == [0, 15, 30]
    with Opened(browser, demo / "runs/demo/report.html") as opened:
        lines = opened.page.evaluate(LINES)
        for name in ("loss", "loss_mm", "loss_graph", "lr", "edges_per_s", "data_wait_s", "grad_norm"):
            [label, at, values], *others = lines[name]
            assert [other[0] for other in others] == (["demo: chance"] if name == "loss_graph" else []), name
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
        assert [row[:2] for row in opened.table("images")] == [["transparent", "1,906"]]  # each emoji has such pixels
        text = opened.page.locator("main").inner_text()
        assert f"R@1 {table['retrieval']['r@1']:.4f}" in text and f"{table['retrieval_shuffled']['r@1']:.4f}" in text
        [start] = json.loads((demo / "runs/demo/environment.json").read_text())
        assert start["versions"]["torch"] in text and start["cpu"] in text and start["from_step"] == 0
