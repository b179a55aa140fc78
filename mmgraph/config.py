"""The settings of a run: one frozen dataclass, checked on construction."""

import dataclasses
from pathlib import Path
from typing import get_args, get_type_hints

import yaml

from mmgraph.errors import UserError
from mmgraph.flags.data import CacheFlags, DataFlags, background_color, column_names
from mmgraph.flags.output import OutputFlags
from mmgraph.flags.training import EvaluationFlags, TrainingFlags

BEST_METRICS = tuple(
    f"{embedding}/{metric}" for embedding in ("z_graph", "fused") for metric in ("mrr", "hits@1", "hits@3", "hits@10")
)


@dataclasses.dataclass(frozen=True)
class Config(OutputFlags, EvaluationFlags, CacheFlags, TrainingFlags, DataFlags):  # the last base has the first fields
    """The settings of a run.

    The defaults are those of the original trainer, the single-GPU research trainer that mmgraph grew from.

    Raises:
        UserError: a value is out of its range, or flags conflict.
    """

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if value is None and field.default is None:
                continue
            for valid in field.metadata["ranges"]:
                if not valid.contains(value):
                    raise UserError(f"--{field.name} {value}: must be {valid.description}")
        if self.eval_fraction and self.eval_edges is not None:
            raise UserError(
                "--eval_fraction and --eval_edges both define the edges to evaluate on: set only one of them"
            )
        background_color(self.background)
        column_names(self.text_columns)
        self._check_best()
        if self.fused_dim % 8:
            raise UserError(f"--fused_dim {self.fused_dim}: must be a multiple of 8, the number of attention heads")

    def _check_best(self) -> None:
        if self.keep_best is not None and self.keep_best not in BEST_METRICS:
            raise UserError(f"--keep_best {self.keep_best}: must be one of {', '.join(BEST_METRICS)}")
        if not self.evaluates and (self.keep_best is not None or self.early_stopping_patience is not None):
            flag = "keep_best" if self.keep_best is not None else "early_stopping_patience"
            raise UserError(f"--{flag} needs edges to evaluate on: set --eval_fraction or --eval_edges")

    @property
    def evaluates(self) -> bool:
        """Whether the run has edges to evaluate on."""
        return self.eval_fraction > 0 or self.eval_edges is not None

    @property
    def output_folder(self) -> Path:
        """The output folder of the run."""
        name = self.run_name or Path(self.nodes).resolve().parent.name
        return Path(self.output_dir) if self.output_dir else Path("runs") / name

    def save(self, path: Path) -> None:
        """Write the settings as YAML that ``--config`` can read."""
        path.write_text(yaml.safe_dump(dataclasses.asdict(self), sort_keys=False), encoding="utf-8")


def _value_types() -> dict[str, type]:
    types = {}
    for name, hint in get_type_hints(Config).items():
        first = next(iter(get_args(hint)), hint)  # int for "int | None"
        types[name] = str if isinstance(first, str) else first  # str for a Literal of texts
    return types


VALUE_TYPES = _value_types()  # name of each flag -> type of its value: str, int, float or bool
_FIELDS = dataclasses.fields(Config)
COMMON, INHERITED, FIXED_ON_RESUME = (
    tuple(field.name for field in _FIELDS if field.metadata[key]) for key in ("common", "inherited", "fixed")
)
