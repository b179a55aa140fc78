"""Report pages of runs of several kinds."""

import json
import math
import re
import shutil
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import graph_files, read_metrics, settings
from launches import launch
from pages import LINES, Opened, check_page
from PIL import Image
from playwright.sync_api import Browser

from mmgraph.cli import main
from mmgraph.demo.towers import build_towers
from mmgraph.report.history import read_run


def test_a_run_without_evaluation_and_of_one_epoch(runs: Path, browser: Browser) -> None:
    check_page(browser, runs / "plain/report.html")
    with Opened(browser, runs / "plain/report.html") as opened:
        text = opened.page.locator("#held-out").inner_text()
        assert "plain" in text and "--eval_fraction" in text and "--eval_edges" in text
        assert opened.numbers("map")[:2] == ["40", "40"]  # nodes on the map, and how many have an image
        assert "1 of 1" in opened.page.locator(".tiles dd").all_inner_texts()  # epochs
        assert not opened.page.locator("table[data-table=evaluation]").count()


def test_two_runs_side_by_side(runs: Path, browser: Browser, tmp_path: Path) -> None:
    path = tmp_path / "both.html"
    assert main(["report", str(runs / "evaluated"), str(runs / "plain"), "--output", str(path)]) == 0
    with Opened(browser, path, scheme="dark") as opened:
        opened.check()
        lines = opened.page.evaluate(LINES)
        for name, position in (("evaluated", 0), ("plain", 1)):
            label, at, values = lines["loss"][position]
            rows = [row for row in read_metrics(runs / name) if "loss" in row]
            assert (label, at, values) == (name, [row["step"] for row in rows], [row["loss"] for row in rows])
        maps = [place.bounding_box() for place in opened.page.locator(".chart.map").all()]
        assert len(maps) == 2 and maps[0] and maps[1] and maps[0]["y"] == maps[1]["y"]  # side by side
        rows = {row[0]: row[1:] for row in opened.table("settings")}
        different = [name for name in rows if rows[name][0] != rows[name][1]]
        assert list(rows)[:3] == different[:3]  # settings that differ come first
        assert rows["learning_rate"] == ["0.001", "0.003"]
    with Opened(browser, path, 390) as opened:
        opened.check()
        maps = [place.bounding_box() for place in opened.page.locator(".chart.map").all()]
        assert maps[0] and maps[1] and maps[0]["y"] < maps[1]["y"]  # one below the other


# Returns the names of the dashed lines of the chart of the graph loss.
DASHED = """() => Bokeh.documents.flatMap((document) => document.roots())
  .find((root) => root.name === "loss_graph").renderers
  .filter((renderer) => renderer.name && renderer.glyph.line_dash.value.length).map((renderer) => renderer.name)"""


def test_verdict_and_chance(runs: Path, browser: Browser, tmp_path: Path) -> None:
    """A run that was evaluated has a verdict. The chart of the graph loss has the chance of each run, dashed.

    Chance is ln(batch size), or the value in the row of a step that masked false negatives.
    """
    masked = Path(shutil.copytree(runs / "evaluated", tmp_path / "masked"))
    rows = [json.loads(line) for line in (masked / "metrics.jsonl").read_text().splitlines()]
    chance = [1.5 + row["step"] / 100 if row["step"] > 10 else None for row in rows if "loss" in row]
    for row in rows:
        row |= {"chance_graph": 1.5 + row["step"] / 100} if row["step"] > 10 else {}
    (masked / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["report", str(masked), str(runs / "plain"), "--output", str(tmp_path / "page.html")]) == 0
    with Opened(browser, tmp_path / "page.html") as opened:
        opened.check()
        lines = {label: values for label, _, values in opened.page.evaluate(LINES)["loss_graph"]}
        assert list(lines) == ["masked", "masked: chance", "plain", "plain: chance"]
        assert lines["masked: chance"] == [math.log(12) if value is None else value for value in chance]
        assert lines["plain: chance"] == [math.log(12)] * len(lines["plain"])
        assert opened.page.evaluate(DASHED) == ["masked: chance", "plain: chance"]
        assert "the dashed line is chance" in opened.page.locator("#training p.note").first.inner_text()
        [verdict] = opened.page.locator("p.note", has_text="Verdict at step").all_inner_texts()
        table = json.loads((masked / "evaluation.json").read_text())
        assert verdict.startswith(f"Verdict at step {table['step']}: ")
        assert f"{table['embeddings']['z_graph']['mrr']:.4f}" in verdict and "before training" in verdict


def test_over_ranks(runs: Path, browser: Browser) -> None:
    """The report of a run on two ranks has the same nearest nodes as on one process."""
    pages = {}
    for name in ("evaluated", "ranks"):
        with Opened(browser, runs / name / "report.html") as opened:
            pages[name] = opened.page.locator("article ol").all_inner_texts()
            opened.check()
    assert pages["evaluated"] == pages["ranks"]
    [start] = json.loads((runs / "ranks/environment.json").read_text())
    assert start["processes"] == 2


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
        assert opened.numbers("map")[:2] == ["40", "0"]  # nodes on the map, and how many have an image
        assert opened.page.locator(".no-picture").count() >= 12 and not opened.page.locator("img").count()


def test_bad_images_by_status(graph: Path, browser: Browser, tmp_path: Path) -> None:
    folder = tmp_path / "graph"
    shutil.copytree(graph, folder, ignore=shutil.ignore_patterns("mmgraph_cache"))
    (folder / "images/3.png").unlink()
    (folder / "images/8.png").write_text("no picture")
    content = (folder / "images/9.png").read_bytes()
    (folder / "images/9.png").write_bytes(content[: len(content) // 2])
    launch("cpu.yaml", *settings(folder, tmp_path / "run", "--max_steps=20", "--report"))
    with Opened(browser, tmp_path / "run/report.html") as opened:
        statuses = {row[0]: row[1:] for row in opened.table("images")}
        assert {name: cells[0] for name, cells in statuses.items()} == {
            "complete": "37", "file not found": "1", "unreadable": "1", "truncated": "1",
        }  # fmt: skip
        assert statuses["file not found"][1] == "003: images\\3.png"
        opened.check()


def test_colors_of_runs(runs: Path, browser: Browser, tmp_path: Path) -> None:
    """A run has the same color in all charts, even if the first run has no evaluation.

    The lines of a chart are in the order of the legend.
    """
    path = tmp_path / "page.html"
    assert main(["report", *(str(runs / name) for name in ("plain", "evaluated", "ranks")), "--output", str(path)]) == 0
    with Opened(browser, path) as opened:
        style = "(all) => all.map((item) => [item.innerText.trim(), item.querySelector('span').style.borderTopColor])"
        line_colors = dict(opened.page.locator("#held-out .legend li").evaluate_all(style))
        run_colors = dict(opened.page.locator("#training .legend li").evaluate_all(style))
        for label, color in line_colors.items():
            assert color == run_colors[label.partition(":")[0]]
        lines = opened.page.evaluate(LINES)
        for metric in ("mrr", "hits@1", "hits@3", "hits@10"):
            assert [label for label, *_ in lines[f"eval/{metric}"]] == list(line_colors)
        opened.check()


def test_a_running_run(runs: Path, browser: Browser, tmp_path: Path) -> None:
    """The last row of metrics.jsonl is incomplete, and the newest checkpoint is from the end of an epoch."""
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


@pytest.mark.slow
def test_a_long_run(runs: Path, browser: Browser, tmp_path: Path) -> None:
    """With 100,000 steps, the page stays small and states that each point is a mean."""
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
        assert opened.numbers("training") == ["100"]  # the number of steps per point


def test_nearest_nodes_against_brute_force(
    graph: Path, runs: Path, browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    run, features = str(runs / "evaluated"), tmp_path / "features"
    assert main(["encode", run, "--features", "z_graph", "--format", "npy", "--output_dir", str(features)]) == 0
    vectors = np.load(features / "features_z_graph.npy").astype(np.float64)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    nodes = pd.read_csv(graph / "nodes.csv", dtype=str, keep_default_na=False)
    rows = {node_id: row for row, node_id in enumerate(nodes["node_id"])}
    edges = {name: pd.read_csv(runs / f"{name}.csv", dtype=str) for name in ("edges", "eval_edges")}
    pairs = {name: set(zip(table["src_id"], table["dst_id"], strict=True)) for name, table in edges.items()}
    assert main(["report", run, "--output", "page.html", "--node", "node 3", "--text", "a red apple"]) == 0
    labels = set()
    with Opened(browser, tmp_path / "page.html") as opened:
        entries = opened.page.locator("article").all()
        assert len(entries) == 12
        assert "node 3" in entries[0].inner_text() and "a red apple" in entries[1].inner_text()
        assert entries[1].locator(".node .id").inner_text() not in rows  # the text is not a node of the graph
        for entry in [entries[0], *entries[2:]]:
            node_id = entry.locator(".node .id").inner_text()
            row = rows[node_id]
            scores = vectors @ vectors[row]
            scores[row] = -2
            titles = [name.get_attribute("title") or "" for name in entry.locator("li .name").all()]
            neighbors = [title.rsplit("(", 1)[1][:-1] for title in titles]
            assert len(neighbors) == 8
            assert scores[[rows[other] for other in neighbors]] == pytest.approx(np.sort(scores)[::-1][:8], abs=1e-6)
            similarities = entry.locator("li .similarity").all_inner_texts()
            assert similarities == [f"{scores[rows[other]]:.3f}" for other in neighbors]
            for item, other in zip(entry.locator("li").all(), neighbors, strict=True):
                both = {(node_id, other), (other, node_id)}  # an edge in either direction
                label = "trained" if both & pairs["edges"] else "held out" if both & pairs["eval_edges"] else ""
                assert "".join(item.locator(".edge").all_inner_texts()) == label
                labels.add(label)
        opened.check()
    assert labels == {"trained", "held out", ""}


@pytest.mark.slow
def test_report_at_the_end_equals_a_later_one(
    runs: Path, browser: Browser, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``mmgraph report`` without arguments reports on the run in runs/ that ended last, with the same text."""
    shutil.copytree(runs / "evaluated", tmp_path / "runs/evaluated")
    monkeypatch.chdir(tmp_path)
    assert main(["report", "--output", "later.html"]) == 0
    texts = []
    for path in (runs / "evaluated/report.html", tmp_path / "later.html"):
        with Opened(browser, path) as opened:
            texts.append(re.sub(r"Written [^.]*\.", "", opened.page.locator("body").inner_text()))
    assert texts[0] == texts[1]


@pytest.mark.slow
def test_200000_nodes(browser: Browser, tmp_path: Path) -> None:
    """With 200,000 nodes and images that do not compress, the page is below 10 MB and states the size of its sample."""
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
    print(f"{size / 1e6:.1f} MB, {pictures} of 2,000 with their image")
