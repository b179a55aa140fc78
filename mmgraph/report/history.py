"""What a run's folder tells: its settings, every step, every evaluation, and what it ran on."""

import json
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import yaml

from mmgraph.errors import UserError
from mmgraph.evaluation.evaluator import Table
from mmgraph.utils.environment import read_starts

RANKS = {"mrr": "MRR", "hits@1": "Hits@1", "hits@3": "Hits@3", "hits@10": "Hits@10"}
Columns = dict[str, np.ndarray]


class Run(NamedTuple):
    """A run as its folder has it."""

    name: str
    folder: Path
    settings: dict[str, Any]
    steps: Columns  # (S,) float64 each, by the name in metrics.jsonl; NaN where a step has none
    evaluations: Columns  # (E,) float64 each: ``step``, and ``eval/...``
    table: Table | None  # the last evaluation whole
    starts: list[dict[str, Any]]  # see mmgraph.utils.environment.record_start


def read_runs(folders: Sequence[Path]) -> list[Run]:
    """:func:`read_run` of some, by their folders where two have one name."""
    runs = [read_run(folder) for folder in folders]
    names = [run.name for run in runs]
    return [run._replace(name=str(run.folder)) if names.count(run.name) > 1 else run for run in runs]


def read_run(folder: Path) -> Run:
    """Read a run's folder, while it runs or after.

    Raises:
        UserError: it is none; or a file of it is damaged.
    """
    config = folder / "config.yaml"
    if not config.is_file():
        raise UserError(f"{folder}: no run's folder (there is no config.yaml in it)")
    try:
        settings = yaml.safe_load(config.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError, RecursionError) as error:
        raise UserError(f"{config}: cannot be read: {' '.join(str(error).split())}") from None
    if not isinstance(settings, dict):
        raise UserError(f"{config}: must hold 'flag: value' lines")
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
                if not line.endswith(b"\n"):  # the run is writing it
                    return
                raise UserError(f"{path}, line {number}: no row of a step") from None
            yield row


class _Columns:
    """Rows of numbers as columns: 8 bytes a number, of however many steps."""

    def __init__(self) -> None:
        self.columns, self.length = dict[str, "array[float]"](), 0

    def add(self, row: dict[str, Any]) -> None:
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
        raise UserError(f"{path}: not an evaluation ({type(error).__name__}: {error})") from None
    return table


def _check_table(table: Table) -> None:
    """Raise what a table that is not as :meth:`mmgraph.evaluation.evaluator.Evaluation.table` makes it raises."""
    kinds = list(table["embeddings"])
    if not kinds:
        raise ValueError("of no embeddings")
    numbers = [table["edges"], table["nodes"], table.get("step", 0)]
    for kind in kinds:
        numbers += [table[group][kind][metric] for group in ("embeddings", "sampled") for metric in RANKS]
        numbers += [values[kind] for values in table["relations"].values()]
    numbers += [values["edges"] for values in table["relations"].values()]
    for name in ("retrieval", "retrieval_shuffled"):
        numbers += [table[name][key] for key in ("images", "r@1", "r@10") if table.get(name)]
    if not all(isinstance(number, int | float) for number in numbers):
        raise TypeError("a figure is no number")


def thinned(columns: Columns, name: str, most: int) -> tuple[np.ndarray, np.ndarray, int]:
    """A column over the steps as at most ``most`` points, each the mean of as many steps in a row.

    Returns:
        (P,) steps, each the last of its point; (P,) means, of what there is; how many steps a point is of.
    """
    steps, values = columns["step"], columns[name]
    size = -(-len(steps) // most) or 1
    if size == 1:
        return steps, values, 1
    ends = np.minimum(np.arange(1, -(-len(steps) // size) + 1) * size, len(steps))
    padded = np.full(len(ends) * size, np.nan)
    padded[: len(values)] = values
    parts = padded.reshape(-1, size)
    counts = np.isfinite(parts).sum(1)
    means = np.where(counts > 0, np.nansum(parts, axis=1) / np.maximum(counts, 1), np.nan)
    return steps[ends - 1], means, size
