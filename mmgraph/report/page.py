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
from mmgraph.evaluation import TRAINED, Table
from mmgraph.files import write_durably
from mmgraph.report.charts import BASELINES, COLOURS, RANKS, Chart, best_baseline, colours, curves, node_map, ranks
from mmgraph.report.history import Run
from mmgraph.report.nodes import Node, Nodes
from mmgraph.report.pictures import as_uri

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
    rank_charts = ranks(runs)
    maps = [node_map_of(number, one.nodes, len(shown)) for number, one in enumerate(shown)]
    everything = [*charts, *rank_charts, *(chart for chart, _ in filter(None, maps))]
    template = environment.get_template("page.html")
    return template.render(
        shown=list(zip(shown, colours(len(shown)), maps, strict=True)),
        curves=charts,
        steps_a_point=steps_a_point,
        ranks=rank_charts,
        rank_legend=_rank_legend(runs),
        charts=everything,
        settings=_settings(runs),
        starts=[(run.name, list(_start(run.starts))) for run in runs],
        tables=[(run, run.table and list(_table(run.table)), relations_of(run.table)) for run in runs],
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


def _rank_legend(runs: Sequence[Run]) -> list[tuple[str, str, bool]]:
    """Label, colour, and whether the line is dashed."""
    evaluated = [run for run in runs if "eval/z_graph/mrr" in run.evaluations]
    if len(evaluated) == 1:
        names = (*TRAINED, *BASELINES)
        return [(name, colour, name in BASELINES) for name, colour in zip(names, COLOURS, strict=False)]
    found = []
    for run, colour in zip(evaluated, colours(len(evaluated)), strict=True):
        found += [(f"{run.name}: z_graph", colour, False), (f"{run.name}: {best_baseline(run)}", colour, True)]
    return found


def _summary(run: Run) -> list[tuple[str, str]]:
    """What a reader wants to know first."""
    steps = run.steps
    if not steps:
        return [("steps", "none yet")]
    last = slice(-SUMMARY_STEPS, None)
    found = [
        ("steps", f"{int(steps['step'][-1]):,}"),
        ("epoch", f"{int(steps['epoch'][-1]):,} of {run.settings.get('epochs', '?')}"),
        (f"loss, mean of the last {len(steps['loss'][last])} steps", digits(float(np.nanmean(steps["loss"][last])))),
        ("edges/s, median of these", f"{float(np.nanmedian(steps['edges_per_s'][last])):,.0f}"),
    ]
    if run.table is not None:
        embeddings = run.table["embeddings"]
        name = "z_graph" if "z_graph" in embeddings else next(iter(embeddings))
        found.append((f"MRR of {name}", digits(embeddings[name]["mrr"])))
        others = {name: embeddings[name]["mrr"] for name in BASELINES if name in embeddings}
        if others:
            best = max(others, key=lambda name: others[name])
            found.append((f"MRR of the best baseline, {best}", digits(others[best])))
    return found


def _table(table: Table) -> Iterator[tuple[str, bool, list[float]]]:
    """Rows of the last evaluation: embeddings, whether they are a baseline, and the figures of :data:`HEADER`."""
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
        values = [run.settings.get(name) for run in runs]
        field = fields.get(name)
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
        versions = start.get("versions") or {}
        own = {name.replace("_", " "): value for name, value in start.items() if name not in ("versions", "from_step")}
        rows = [(name, str(value)) for name, value in {**own, **versions}.items() if value is not None]
        yield f"from step {start.get('from_step', 0):,}", rows
