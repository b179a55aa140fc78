"""Reads a run's folder: its settings, the metrics of all steps and evaluations, and the environment of each start."""

import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from mmgraph.arguments import parse_settings
from mmgraph.errors import UserError
from mmgraph.evaluation.evaluator import Table
from mmgraph.utils.environment import read_starts
from mmgraph.utils.error_text import one_line

RANKS = {"mrr": "MRR", "hits@1": "Hits@1", "hits@3": "Hits@3", "hits@10": "Hits@10"}
Columns = dict[str, np.ndarray]


class Run(NamedTuple):
    """The contents of a run's folder."""

    name: str
    folder: Path
    settings: dict[str, Any]
    steps: Columns  # by name in metrics.jsonl, (S,) float64 each; a missing value is NaN
    evaluations: Columns  # (E,) float64 each, for ``step``, ``eval/...`` and ``eval_sampled/...``
    table: Table | None  # the last evaluation, including relations and retrieval
    starts: list[dict[str, Any]]  # see mmgraph.utils.environment.record_start


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """Read several runs with :func:`read_run`. If several runs have the same name, use their folders as names."""
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    return [run._replace(name=str(run.folder)) if names.count(run.name) > 1 else run for run in runs]


def read_run(folder: Path) -> Run:
    """Read a run's folder. The run may still be in progress.

    Raises:
        UserError: ``folder`` is not a run's folder, or one of its files is damaged.
    """
    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"{folder}: not a run's folder (it has no config.yaml); give the output folder of a run")
    try:
        settings = parse_settings(config.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{config}: cannot be read: {one_line(error)}") from None
    steps, evaluations = _read_metrics(folder / "metrics.jsonl")
    name = str(settings.get("run_name") or folder.resolve().name)
    return Run(name, folder, settings, steps, evaluations, _read_table(folder / "evaluation.json"), read_starts(folder))


def _read_metrics(path: Path) -> tuple[Columns, Columns]:
    steps, evaluations = _Columns(), _Columns()
    for row in _rows(path):
        evaluated = {name: value for name, value in row.items() if name.startswith(("eval/", "eval_sampled/"))}
        if "loss" in row:
            steps.add({name: value for name, value in row.items() if name not in evaluated})
        if evaluated:
            evaluations.add({"step": row["step"], **evaluated})
    return steps.arrays(), evaluations.arrays()


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    if not path.is_file():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                row = json.loads(line)
                row["step"] = int(row["step"])
            except (ValueError, TypeError, KeyError, OverflowError, RecursionError):
                if not line.endswith(b"\n"):  # the run is still writing this line
                    return
                raise UserError(f"{path}, line {number}: not a JSON object with a step number") from None
            yield row


class _Columns:
    """Collects rows of numbers as columns of float64. A value then takes only 8 bytes, which matters for long runs."""

    def __init__(self) -> None:
        self.columns, self.length = dict[str, "array[float]"](), 0

    def add(self, row: dict[str, Any]) -> None:
        """Append a row. Missing values and values that are not numbers become NaN."""
        for name, value in row.items():
            column = self.columns.get(name)
            if column is None:
                column = self.columns[name] = array("d", [np.nan]) * self.length
            column.append(float(value) if isinstance(value, int | float) else np.nan)
        self.length += 1
        for column in self.columns.values():
            if len(column) < self.length:
                column.append(np.nan)

    def arrays(self) -> Columns:
        return {name: np.array(column) for name, column in self.columns.items()}


def _read_table(path: Path) -> Table | None:
    if not path.is_file():
        return None
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
        _check_table(table)
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a valid evaluation ({type(error).__name__}: {error})") from None
    return table


def _check_table(table: Table) -> None:
    """Check that a table has the values that a page needs.

    :meth:`mmgraph.evaluation.evaluator.Evaluation.evaluate` returns such a table.

    Raises:
        ValueError: the table has no embeddings.
        KeyError, TypeError, AttributeError: a value is missing or has the wrong type.
    """
    names = list(table["embeddings"])
    if not names:
        raise ValueError("no embeddings")
    numbers = [table["edges"], table["nodes"], table.get("step", 0)]
    for name in names:
        numbers += [table[group][name][metric] for group in ("embeddings", "sampled") for metric in RANKS]
        numbers += [values[name] for values in table["relations"].values()]
    numbers += [values["edges"] for values in table["relations"].values()]
    for group in ("retrieval", "retrieval_shuffled"):
        numbers += [table[group][key] for key in ("images", "r@1", "r@10") if table.get(group)]
    if not all(isinstance(number, int | float) for number in numbers):
        raise TypeError("a value is not a number")


def thinned(columns: Columns, name: str, max_points: int) -> tuple[np.ndarray, np.ndarray, int]:
    """Reduce a column to at most ``max_points`` points. Each point averages the same number of consecutive steps.

    Returns:
        The last step of each point, (P,); the mean of the finite values of each point, (P,), which is NaN if there are
        none; and the number of steps per point. The last point may have fewer steps.
    """
    steps, values = columns["step"], columns[name]
    size = -(-len(steps) // max_points) or 1
    if size == 1:
        return steps, values, 1
    ends = np.minimum(np.arange(1, -(-len(steps) // size) + 1) * size, len(steps))
    padded = np.full(len(ends) * size, np.nan)
    padded[: len(values)] = values
    parts = padded.reshape(-1, size)
    counts = np.isfinite(parts).sum(1)
    means = np.where(counts > 0, np.nansum(parts, axis=1) / np.maximum(counts, 1), np.nan)
    return steps[ends - 1], means, size
