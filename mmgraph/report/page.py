"""Builds the report page: one self-contained HTML file that shows runs and their nodes."""

import dataclasses
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from bokeh.resources import Resources
from jinja2 import Environment, PackageLoader, StrictUndefined

from mmgraph.config import Config
from mmgraph.evaluation.evaluator import Table
from mmgraph.evaluation.verdict import BASELINES, EMBEDDING, Verdict, judge
from mmgraph.report.charts import Chart, colours, curves, node_map, rank_lines, ranks
from mmgraph.report.history import RANKS, Run
from mmgraph.report.nodes import Node, Nodes
from mmgraph.report.pictures import as_uri
from mmgraph.towers.clip import has_random_weights
from mmgraph.utils.files import write_durably

# Maximum size of the images in all maps of a page together. A node whose image does not fit is drawn as a dot.
MAP_PICTURE_BYTES = 3_000_000
SUMMARY_STEPS = 100  # the summary shows the mean loss and the median throughput of this many last steps


class Shown(NamedTuple):
    """A run and its nodes, as shown on a page."""

    run: Run
    nodes: Nodes | None
    reason: str  # why the nodes cannot be shown; empty if they can


def write_page(path: Path, shown: Sequence[Shown]) -> None:
    """Write a page about several runs. The write is atomic."""
    content = page(shown)
    write_durably(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))


def page(shown: Sequence[Shown]) -> str:
    """Return a page as a self-contained HTML document. All names, texts and values are escaped."""
    environment = Environment(
        loader=PackageLoader("mmgraph.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"uri": as_uri, "digits": digits}
    runs = [entry.run for entry in shown]
    charts, steps_a_point = curves(runs)
    lines = rank_lines(runs)
    rank_charts = ranks(lines)
    maps = [node_map_of(number, entry.nodes, len(shown)) for number, entry in enumerate(shown)]
    everything = [*charts, *rank_charts, *(chart for chart, _ in filter(None, maps))]
    template = environment.get_template("page.html")
    return template.render(
        shown=list(zip(shown, colours(len(shown)), maps, strict=True)),
        curves=charts,
        steps_a_point=steps_a_point,
        ranks=rank_charts,
        rank_legend=lines,
        charts=everything,
        settings=_settings(runs),
        starts=[(run.name, list(_start(run.starts))) for run in runs],
        tables=[(run, run.table and list(_table(run.table)), relations_of(run.table)) for run in runs],
        random_towers=[run.name for run in runs if has_random_weights(str(run.settings.get("model_name")))],
        summaries=[(_summary(run), _verdict(run)) for run in runs],
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        style=files("mmgraph.report").joinpath("page.css").read_text(encoding="utf-8"),
        script=files("mmgraph.report").joinpath("page.js").read_text(encoding="utf-8"),
        bokeh="\n".join(Resources(mode="inline", components=["bokeh"]).js_raw),
    )


def digits(value: float) -> str:
    """Format a metric as ``mmgraph evaluate`` prints it."""
    return f"{value:.4f}"


def node_map_of(number: int, nodes: Nodes | None, runs: int) -> tuple[Chart, int] | None:
    """Draw the map of a run's nodes.

    Args:
        number: index of the run on the page.
        nodes: nodes of the run, or None if they cannot be shown.
        runs: number of runs on the page.

    Returns:
        The map, and the number of nodes that are drawn as images; None if ``nodes`` is None.
    """
    if nodes is None:
        return None
    budget, uris = MAP_PICTURE_BYTES // runs, []
    for node in nodes.map:
        uri = as_uri(node.picture) if node.picture is not None else ""
        uris.append(uri if len(uri) <= budget else "")
        budget -= len(uris[-1])
    names = [_label(node) for node in nodes.map]
    return node_map(f"map-{number}", nodes.positions, names, uris), sum(map(bool, uris))


def _label(node: Node) -> str:
    return node.name if node.name == node.node_id else f"{node.name} ({node.node_id})"


def _summary(run: Run) -> list[tuple[str, str]]:
    """Return the most important values of a run as pairs of label and value."""
    steps = run.steps
    if not steps:
        return [("steps", "none yet")]
    summary = [("steps", f"{int(steps['step'][-1]):,}")]
    if "epoch" in steps:
        summary.append(("epoch", f"{int(steps['epoch'][-1]):,} of {run.settings.get('epochs', '?')}"))
    for key, label, average, show in (
        ("loss", "mean loss", np.mean, digits),
        ("edges_per_s", "median edges/s", np.median, lambda value: f"{value:,.0f}"),
    ):
        values = steps.get(key, np.empty(0))[-SUMMARY_STEPS:]
        values = values[np.isfinite(values)]
        if len(values):
            summary.append((f"{label} of the last {len(values)} steps", show(float(average(values)))))
    if run.table is not None:
        embeddings = run.table["embeddings"]
        name = "z_graph" if "z_graph" in embeddings else next(iter(embeddings))
        at = f", step {run.table['step']:,}" if "step" in run.table else ""
        summary.append((f"MRR of {name}{at}", digits(embeddings[name]["mrr"])))
        baselines = {name: embeddings[name]["mrr"] for name in BASELINES if name in embeddings}
        if baselines:
            best = max(baselines, key=lambda name: baselines[name])
            summary.append((f"MRR of the best baseline, {best}", digits(baselines[best])))
    return summary


def _verdict(run: Run) -> Verdict | None:
    """Return the verdict on a run; None if it was not evaluated after training."""
    if run.table is None or not run.table.get("step") or EMBEDDING not in run.table["embeddings"]:
        return None
    columns = {name: values for name, values in run.evaluations.items() if name.startswith("eval/")}
    before = {name.split("/")[1]: float(values[0]) for name, values in columns.items() if name.endswith("/mrr")}
    at_start = len(run.evaluations.get("step", ())) and run.evaluations["step"][0] == 0
    return judge(run.table, before if at_start and EMBEDDING in before else None)


def _table(table: Table) -> Iterator[tuple[str, bool, list[float]]]:
    """Yield the rows of the evaluation table: name of the embedding, whether it is a baseline, and its values.

    The first values are MRR and Hits among all nodes. The last two are MRR and Hits@10 among 100 random nodes.
    """
    for name, values in table["embeddings"].items():
        sampled = table["sampled"][name]
        yield name, name in BASELINES, [*(values[metric] for metric in RANKS), sampled["mrr"], sampled["hits@10"]]


def relations_of(table: Table | None) -> tuple[list[str], list[tuple[str, int, list[float]]]] | None:
    """Return the names of the embeddings, and a row for each relation.

    A row has the name of the relation, its number of edges, and the MRR of each embedding. The rows are sorted by the
    number of edges, the largest first. If the table has no relations, the result is None.
    """
    if table is None or not table.get("relations"):
        return None
    names = list(table["embeddings"])
    rows = [
        (name, values["edges"], [values[embedding] for embedding in names])
        for name, values in table["relations"].items()
    ]
    return names, sorted(rows, key=lambda row: -row[1])


def _settings(runs: Sequence[Run]) -> list[tuple[str, str, list[str], str]]:
    """Return a row for each setting: name, help text, value in each run, and CSS class.

    The class is ``differs`` if the runs have different values. If all runs have the same value, the class is
    ``default`` for the default value, and ``changed`` for any other value. Rows of class ``differs`` are first.
    """
    fields = {field.name: field for field in dataclasses.fields(Config)}
    rows = []
    for name in dict.fromkeys(name for run in runs for name in run.settings):
        field = fields.get(name)  # None if this version does not have the setting
        # A run of an older version may lack a setting. The default is shown in its place.
        values = [run.settings.get(name, field.default if field else None) for run in runs]
        changed = field is None or any(value != field.default for value in values)
        css_class = "differs" if any(value != values[0] for value in values) else "changed" if changed else "default"
        rows.append((name, field.metadata["help"] if field else "", [_plain(value) for value in values], css_class))
    return sorted(rows, key=lambda row: row[3] != "differs")


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _start(starts: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Yield a title and the environment, as pairs of name and value, for each start of a run."""
    for start in starts:
        versions, step = start.get("versions"), start.get("from_step")
        facts = {
            name.replace("_", " "): value for name, value in start.items() if name not in ("versions", "from_step")
        }
        rows = {"started": facts.pop("time", None), **facts, **(versions if isinstance(versions, dict) else {})}
        title = f"from step {step:,}" if isinstance(step, int) else "at an unknown step"
        yield title, [(name, str(value)) for name, value in rows.items() if value is not None]
