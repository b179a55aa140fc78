"""Draws Bokeh charts of runs: metrics of each step, MRR and Hits of each evaluation, and the map of nodes."""

import json
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from bokeh.embed import json_item
from bokeh.models import (
    BasicTickFormatter,
    ColumnDataSource,
    DataRange1d,
    HoverTool,
    PanTool,
    Range1d,
    ResetTool,
    WheelZoomTool,
)
from bokeh.plotting import figure

from mmgraph.evaluation.evaluator import TRAINED
from mmgraph.evaluation.verdict import BASELINES
from mmgraph.losses.objective import GRAPH_CHANCE, LABELS, TOTAL
from mmgraph.report.history import RANKS, Run, thinned

MAX_POINTS = 1_000  # largest number of points in a curve
FEW_POINTS = 50  # a solid line of MRR or Hits with fewer points has a marker at each point
COLOURS = ("#3b82f6", "#f97316", "#10b981", "#a855f7", "#ef4444", "#eab308", "#06b6d4", "#ec4899")
CURVES = {  # name in metrics.jsonl -> title of the chart
    TOTAL: "loss",
    **{name: f"{label} loss" for name, label in LABELS.items()},
    "lr": "learning rate",
    "edges_per_s": "throughput, edges/s",
    "data_wait_s": "wait for data, s",
    "grad_norm": "gradient norm",
    "peak_memory_gb": "peak memory, GB",
    "false_negatives_graph": "false negatives masked per query, graph loss",
    "false_negatives_mm": "false negatives masked per query, text-image loss",
}
FROM_ZERO = ("lr", "edges_per_s", "data_wait_s", "peak_memory_gb")  # charts whose y axis includes 0


class Line(NamedTuple):
    """A line of a chart."""

    label: str
    steps: np.ndarray
    values: np.ndarray
    colour: str
    dashed: bool = False
    marked: bool = False


class Chart(NamedTuple):
    """A chart to embed in a page."""

    key: str
    title: str
    item: str  # JSON for Bokeh.embed.embed_item, escaped for a script element


def curves(runs: Sequence[Run]) -> tuple[list[Chart], int]:
    """Build a chart for each metric of :data:`CURVES` that at least one run has recorded.

    Returns:
        The charts, and the largest number of steps that one point averages.
    """
    charts, max_steps = [], 1
    for key, title in CURVES.items():
        lines = []
        for run, colour in zip(runs, colours(len(runs)), strict=True):
            if np.isfinite(run.steps.get(key, np.empty(0))).any():
                steps, values, size = thinned(run.steps, key, MAX_POINTS)
                max_steps = max(max_steps, size)
                lines.append(Line(run.name, steps, values, colour, marked=len(steps) == 1))
                if key == "loss_graph":
                    lines += _chance(run, steps, colour)
        if lines:
            charts.append(_chart(key, title, lines))
    return charts, max_steps


def _chance(run: Run, steps: np.ndarray, colour: str) -> list[Line]:
    """Return the line of the graph loss that embeddings have that are all equal, if the run's settings tell it."""
    values = np.full(len(steps), np.nan)
    batch_size = run.settings.get("global_batch_size")
    if isinstance(batch_size, int) and batch_size > 0:
        values[:] = math.log(batch_size)
    if GRAPH_CHANCE in run.steps:  # fewer candidates, because false negatives are masked
        _, masked, _ = thinned(run.steps, GRAPH_CHANCE, MAX_POINTS)
        values = np.where(np.isfinite(masked), masked, values)
    return [Line(f"{run.name}: chance", steps, values, colour, dashed=True)] if np.isfinite(values).any() else []


class RankLine(NamedTuple):
    """A line in the charts of MRR and Hits. It shows one embedding of one run."""

    run: Run
    embedding: str  # name of the embedding
    label: str
    colour: str

    @property
    def dashed(self) -> bool:
        return self.embedding in BASELINES


def rank_lines(runs: Sequence[Run]) -> list[RankLine]:
    """Choose the lines of the charts of MRR and Hits.

    For a single run, there is a line for each embedding. For several runs, each run has a line for ``z_graph`` and a
    line for the baseline that has the highest MRR in the run's last evaluation.
    """
    if len(runs) == 1:
        names = [name for name in (*TRAINED, *BASELINES) if f"eval/{name}/mrr" in runs[0].evaluations]
        return [RankLine(runs[0], name, name, colour) for name, colour in zip(names, COLOURS, strict=False)]
    lines = []
    for run, colour in zip(runs, colours(len(runs)), strict=True):
        last = {name: run.evaluations[f"eval/{name}/mrr"][-1] for name in ("z_graph", *BASELINES)
                if f"eval/{name}/mrr" in run.evaluations}  # fmt: skip
        best = max((name for name in last if name in BASELINES), key=lambda name: float(last[name]), default="")
        lines += [RankLine(run, name, f"{run.name}: {name}", colour) for name in last if name in ("z_graph", best)]
    return lines


def ranks(lines: Sequence[RankLine]) -> list[Chart]:
    """Build the charts of MRR and Hits during training."""
    charts = []
    for metric, title in RANKS.items():
        drawn = []
        for line in lines:
            columns = line.run.evaluations
            values = columns.get(f"eval/{line.embedding}/{metric}", np.empty(0))
            if np.isfinite(values).any():
                marked = len(values) == 1 or (len(values) < FEW_POINTS and not line.dashed)
                drawn.append(Line(line.label, columns["step"], values, line.colour, line.dashed, marked))
        if drawn:
            charts.append(_chart(f"eval/{metric}", title, drawn))
    return charts


def colours(count: int) -> list[str]:
    """Return ``count`` CSS colors. After ``len(COLOURS)`` colors, they repeat."""
    return [COLOURS[number % len(COLOURS)] for number in range(count)]


def _chart(key: str, title: str, lines: Sequence[Line]) -> Chart:
    plot = figure(height=220, sizing_mode="stretch_width", tools="", toolbar_location=None, name=key)
    for line in lines:
        source = ColumnDataSource({"step": line.steps, "value": line.values})
        dash = "dashed" if line.dashed else "solid"
        drawn = plot.line("step", "value", source=source, color=line.colour, line_width=1.8, line_dash=dash,
                          name=line.label)  # fmt: skip
        if line.marked:
            plot.scatter("step", "value", source=source, color=line.colour, size=5)
        tips = [("step", "@step{0,0}"), (line.label, "@value{0.0000e+0}" if key == "lr" else "@value{0,0.0000}")]
        plot.add_tools(HoverTool(renderers=[drawn], tooltips=tips, mode="vline"))
    low, high = _extent(lines, from_zero=key in FROM_ZERO or key.startswith("eval/"))
    plot.y_range = Range1d(start=low, end=high)
    plot.yaxis.formatter = BasicTickFormatter(precision=1) if key == "lr" else BasicTickFormatter()
    plot.xaxis.axis_label = "step"
    return Chart(key, title, _embedded(plot))


def _extent(lines: Sequence[Line], from_zero: bool) -> tuple[float, float]:
    """Return the limits of a y axis.

    The limits are those of the values, with a margin of 5 % of their range. With ``from_zero``, the axis includes 0.
    """
    values = np.concatenate([line.values[np.isfinite(line.values)] for line in lines])
    low, high = float(values.min()), float(values.max())
    margin = 0.05 * (high - low) or 0.05 * abs(high) or 1.0
    return (min(0.0, low) if from_zero else low - margin), high + margin


def node_map(key: str, positions: np.ndarray, names: Sequence[str], pictures: Sequence[str]) -> Chart:
    """Draw M nodes at their positions. A node is drawn as its image, or as a dot if ``pictures`` has no image for it.

    Args:
        key: name of the chart.
        positions: (M, 2), x and y of each node.
        names: M texts for the tooltips.
        pictures: M ``data:`` URIs; an empty string for a node that is drawn as a dot.
    """
    plot = figure(height=560, sizing_mode="stretch_width", tools="", name=key)
    plot.x_range, plot.y_range = DataRange1d(range_padding=0.04), DataRange1d(range_padding=0.04)
    pan, zoom = PanTool(), WheelZoomTool(modifiers={"ctrl": True})
    plot.add_tools(pan, zoom, ResetTool())
    plot.toolbar.active_drag, plot.toolbar.active_scroll, plot.toolbar.logo = pan, zoom, None
    pictured = np.array([bool(picture) for picture in pictures], bool)
    for rows in (np.flatnonzero(~pictured), np.flatnonzero(pictured)):
        source = ColumnDataSource({
            "x": positions[rows, 0], "y": positions[rows, 1],
            "name": [names[row] for row in rows.tolist()], "picture": [pictures[row] for row in rows.tolist()],
        })  # fmt: skip
        _draw_nodes(plot, source, pictured=bool(len(rows)) and bool(pictured[rows[0]]))
    plot.axis.visible = plot.grid.visible = False
    return Chart(key, "map", _embedded(plot))


def _draw_nodes(plot: Any, source: ColumnDataSource, pictured: bool) -> None:
    tip = "<div>@name</div>"
    if pictured:
        plot.image_url("picture", "x", "y", 26, 26, w_units="screen", h_units="screen", anchor="center", source=source)
        tip = f'<img src="@picture" alt="" width="72">{tip}'
    # The hover tool does not react to images, so an invisible dot of the same size lies over each image.
    size, alpha = (26, 0.0) if pictured else (6, 0.6)
    dots = plot.scatter("x", "y", source=source, size=size, color=COLOURS[0], alpha=alpha)
    plot.add_tools(HoverTool(renderers=[dots], tooltips=tip, limit=2))


def _embedded(plot: Any) -> str:
    plot.background_fill_color = plot.border_fill_color = None
    plot.outline_line_color = None
    # A node's name may contain "</script" or "<!--". In a script element, both would change how the page is parsed.
    return json.dumps(json_item(plot)).replace("<", "\\u003c")
