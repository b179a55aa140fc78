"""The page: what runs tell and what their nodes look like, in one file that needs nothing else."""

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
from mmgraph.report.charts import BASELINES, Chart, colours, curves, node_map, rank_lines, ranks
from mmgraph.report.history import RANKS, Run
from mmgraph.report.nodes import Node, Nodes
from mmgraph.report.pictures import as_uri
from mmgraph.towers.clip import has_random_weights
from mmgraph.utils.files import write_durably

MAP_PICTURE_BYTES = 3_000_000  # of all maps of a page: what does not fit is a dot
SUMMARY_STEPS = 100  # the last ones, whose mean loss and median rate are told


class Shown(NamedTuple):
    """A run on a page."""

    run: Run
    nodes: Nodes | None
    reason: str  # why there are no nodes


def write_page(path: Path, shown: Sequence[Shown]) -> None:
    """Write a page of some runs, whole or not at all."""
    content = page(shown)
    write_durably(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))


def page(shown: Sequence[Shown]) -> str:
    """One HTML document with all that it needs in it. Everything from tables and names is escaped."""
    environment = Environment(
        loader=PackageLoader("mmgraph.report", ""), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True,
    )  # fmt: skip
    environment.filters |= {"uri": as_uri, "digits": digits}
    runs = [one.run for one in shown]
    charts, steps_a_point = curves(runs)
    lines = rank_lines(runs)
    rank_charts = ranks(lines)
    maps = [node_map_of(number, one.nodes, len(shown)) for number, one in enumerate(shown)]
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
        stand_ins=[run.name for run in runs if has_random_weights(str(run.settings.get("model_name")))],
        summaries=[_summary(run) for run in runs],
        written=time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
        style=files("mmgraph.report").joinpath("page.css").read_text(encoding="utf-8"),
        script=files("mmgraph.report").joinpath("page.js").read_text(encoding="utf-8"),
        bokeh="\n".join(Resources(mode="inline", components=["bokeh"]).js_raw),
    )


def digits(value: float) -> str:
    """A metric as ``mmgraph evaluate`` prints it."""
    return f"{value:.4f}"


def node_map_of(number: int, nodes: Nodes | None, runs: int) -> tuple[Chart, int] | None:
    """The map of a run's nodes, and how many of them have their picture on it."""
    if nodes is None:
        return None
    room, uris = MAP_PICTURE_BYTES // runs, []
    for node in nodes.map:
        uri = as_uri(node.picture) if node.picture is not None else ""
        uris.append(uri if len(uri) <= room else "")
        room -= len(uris[-1])
    names = [_called(node) for node in nodes.map]
    return node_map(f"map-{number}", nodes.places, names, uris), sum(map(bool, uris))


def _called(node: Node) -> str:
    return node.name if node.name == node.node_id else f"{node.name} ({node.node_id})"


def _summary(run: Run) -> list[tuple[str, str]]:
    """What a reader wants to know first."""
    steps = run.steps
    if not steps:
        return [("steps", "none yet")]
    found = [("steps", f"{int(steps['step'][-1]):,}")]
    if "epoch" in steps:
        found.append(("epoch", f"{int(steps['epoch'][-1]):,} of {run.settings.get('epochs', '?')}"))
    for key, what, mean, show in (
        ("loss", "loss, mean", np.mean, digits),
        ("edges_per_s", "edges/s, median", np.median, lambda value: f"{value:,.0f}"),
    ):
        values = steps.get(key, np.empty(0))[-SUMMARY_STEPS:]
        values = values[np.isfinite(values)]
        if len(values):
            found.append((f"{what} of the last {len(values)} steps", show(float(mean(values)))))
    if run.table is not None:
        embeddings = run.table["embeddings"]
        name = "z_graph" if "z_graph" in embeddings else next(iter(embeddings))
        at = f", step {run.table['step']:,}" if "step" in run.table else ""
        found.append((f"MRR of {name}{at}", digits(embeddings[name]["mrr"])))
        others = {name: embeddings[name]["mrr"] for name in BASELINES if name in embeddings}
        if others:
            best = max(others, key=lambda name: others[name])
            found.append((f"MRR of the best baseline, {best}", digits(others[best])))
    return found


def _table(table: Table) -> Iterator[tuple[str, bool, list[float]]]:
    """Rows of the last evaluation: embeddings, whether they are a baseline; MRR and Hits, then of 100 negatives."""
    for name, values in table["embeddings"].items():
        sampled = table["sampled"][name]
        yield name, name in BASELINES, [*(values[metric] for metric in RANKS), sampled["mrr"], sampled["hits@10"]]


def relations_of(table: Table | None) -> tuple[list[str], list[tuple[str, int, list[float]]]] | None:
    """Names of embeddings, and for each relation, the largest first, its edges and MRRs."""
    if table is None or not table.get("relations"):
        return None
    names = list(table["embeddings"])
    rows = [(name, values["edges"], [values[kind] for kind in names]) for name, values in table["relations"].items()]
    return names, sorted(rows, key=lambda row: -row[1])


def _settings(runs: Sequence[Run]) -> list[tuple[str, str, list[str], str]]:
    """Name, what it is for, value of each run, and whether it ``differs``, is ``changed`` from the default, or not."""
    fields = {field.name: field for field in dataclasses.fields(Config)}
    found = []
    for name in dict.fromkeys(name for run in runs for name in run.settings):
        field = fields.get(name)  # of a newer version, where an older run has none
        values = [run.settings.get(name, field.default if field else None) for run in runs]
        changed = field is None or any(value != field.default for value in values)
        kind = "differs" if any(value != values[0] for value in values) else "changed" if changed else "default"
        found.append((name, field.metadata["help"] if field else "", [_plain(value) for value in values], kind))
    return sorted(found, key=lambda row: row[3] != "differs")


def _plain(value: Any) -> str:
    if value is None:
        return "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)


def _start(starts: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, list[tuple[str, str]]]]:
    """Each start of a run: a title, and what it ran on."""
    for start in starts:
        versions, step = start.get("versions"), start.get("from_step")
        own = {name.replace("_", " "): value for name, value in start.items() if name not in ("versions", "from_step")}
        rows = {"started": own.pop("time", None), **own, **(versions if isinstance(versions, dict) else {})}
        title = f"from step {step:,}" if isinstance(step, int) else "of a run"
        yield title, [(name, str(value)) for name, value in rows.items() if value is not None]
