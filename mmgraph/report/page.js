// Draws the charts in the page's colors. Style sheets do not apply to them, because Bokeh draws on a canvas.
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
    if (touch && root.toolbar) root.toolbar.active_drag = null;  // a touch must scroll the page, not move the map
  }
  paint();
  dark.addEventListener("change", paint);
  document.documentElement.dataset.drawn = "true";
}

draw();
