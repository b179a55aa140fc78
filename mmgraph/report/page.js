// Draws the charts, in the colours of the page: Bokeh paints on a canvas, which style sheets do not reach.
"use strict";

const dark = matchMedia("(prefers-color-scheme: dark)");

function paint() {
  const style = getComputedStyle(document.documentElement);
  const [muted, line] = ["--muted", "--line"].map((name) => style.getPropertyValue(name).trim());
  const colours = {
    major_label_text_color: muted, axis_label_text_color: muted, axis_line_color: line, major_tick_line_color: line,
    minor_tick_line_color: null, grid_line_color: line,
  };
  for (const view of Bokeh.documents.flatMap((document) => document.roots())) {
    for (const model of [...(view.below ?? []), ...(view.left ?? []), ...(view.center ?? [])]) {
      model.setv(Object.fromEntries(Object.entries(colours).filter(([name]) => name in model.properties)));
    }
  }
}

async function draw() {
  const touch = matchMedia("(pointer: coarse)").matches;
  for (const place of document.querySelectorAll("[data-chart]")) {
    const item = JSON.parse(document.querySelector(`[data-item="${CSS.escape(place.dataset.chart)}"]`).textContent);
    await Bokeh.embed.embed_item(item, place);
  }
  for (const root of Bokeh.documents.flatMap((document) => document.roots())) {
    if (touch && root.toolbar) root.toolbar.active_drag = null;  // a finger that scrolls the page must not move the map
  }
  paint();
  dark.addEventListener("change", paint);
  document.documentElement.dataset.drawn = "true";
}

draw();
