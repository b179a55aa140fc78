"""Open and check report pages in a headless browser, and train the runs that the reports show."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import pytest
from conftest import settings
from launches import launch

if TYPE_CHECKING:  # a machine without Playwright can run the other tests
    from playwright.sync_api import Browser, Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


MAX_BYTES = 10_000_000


LOOKS = [(width, scheme) for width in (390, 1600) for scheme in ("light", "dark")]


# Decodes every image of the page, to find damaged ones. The images of the map are drawn on a canvas, not in <img>.
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


# Finds text that is too small or has too little contrast (WCAG 2's contrast ratio), and elements wider than the window.
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


# Returns a dict from the name of each chart to its lines: [label, steps, values] of each line.
LINES = """() => Object.fromEntries(Bokeh.documents.flatMap((document) => document.roots()).map((root) => [root.name,
  root.renderers.filter((renderer) => renderer.name).map((renderer) =>
    [renderer.name, [...renderer.data_source.get_array("step")], [...renderer.data_source.get_array("value")]])]))"""


@pytest.fixture(scope="session")
def browser() -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("there is no chromium here (Debian: apt install chromium)")
    sync_playwright = pytest.importorskip("playwright.sync_api").sync_playwright
    with sync_playwright() as playwright:
        # Without a sandbox, because Chromium's sandbox does not work for root in a container.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


class Opened:
    """A page in an offline browser window, with its console warnings, errors and requests."""

    def __init__(self, browser: Browser, path: Path, width: int = 1600, scheme: Any = "light"):
        self.context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme, offline=True)
        self.page: Page = self.context.new_page()
        self.messages: list[str] = []
        self.requests: list[str] = []
        self.page.on(
            "console", lambda message: message.type in ("error", "warning") and self.messages.append(message.text)
        )
        self.page.on("pageerror", lambda error: self.messages.append(str(error)))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(path.absolute().as_uri())
        self.page.wait_for_selector("html[data-drawn]", timeout=60_000)
        self.page.wait_for_timeout(300)

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()

    def check(self) -> int:
        """Check the page: no messages, no requests for other files, readable texts and undamaged images.

        Returns:
            The number of images.
        """
        count, failed = self.page.evaluate(PICTURES)
        assert not self.messages and failed == 0
        assert [url for url in self.requests if not url.startswith("data:")] == [self.page.url]
        assert self.page.evaluate(READABLE) == []
        return int(count)

    def table(self, name: str, number: int = 0) -> list[list[str]]:
        """Return the cells of a table's body."""
        table = self.page.locator(f"table[data-table={name}]").nth(number)
        return [row.locator("th, td").all_inner_texts() for row in table.locator("tbody tr").all()]

    def numbers(self, place: str) -> list[str]:
        """Return the numbers in the first note of a section."""
        return re.findall(r"\d+(?:,\d+)*", self.page.locator(f"#{place} .note").first.inner_text())


def check_page(browser: Browser, path: Path) -> None:
    """Check a page on a phone in light colors, and on a wide screen in dark colors."""
    assert path.stat().st_size < MAX_BYTES
    for width, scheme in (LOOKS[0], LOOKS[-1]):
        with Opened(browser, path, width, scheme) as opened:
            opened.check()


@pytest.fixture(scope="session")
def runs(graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs on the small graph.

    Returns:
        A folder with the runs ``evaluated`` (evaluates every 10 of its 30 steps), ``plain`` (one epoch, no evaluation)
        and ``ranks`` (30 steps on two ranks), and with ``edges.csv`` and ``eval_edges.csv``.
    """
    folder = tmp_path_factory.mktemp("runs")
    edges = pd.read_csv(graph / "edges.csv", dtype=str)
    edges[:180].to_csv(folder / "edges.csv", index=False)
    edges[180:].to_csv(folder / "eval_edges.csv", index=False)
    tables = [f"--edges={folder / 'edges.csv'}", f"--eval_edges={folder / 'eval_edges.csv'}"]
    for name, config, flags in (
        ("evaluated", "cpu.yaml", ["--max_steps=30", "--eval_every=10", *tables]),
        ("plain", "cpu.yaml", ["--epochs=1", "--learning_rate=3e-3"]),
        ("ranks", "cpu_2proc.yaml", ["--max_steps=30", *tables]),
    ):
        launch(config, *settings(graph, folder / name, "--report", "--report_to=none", *flags))
    return folder
