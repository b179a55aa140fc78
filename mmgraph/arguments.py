"""The command line of a run: flags and YAML to a :class:`~mmgraph.config.Config`."""

import copy
import dataclasses
import difflib
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from mmgraph.config import COMMON, DEMO_FOLDER, Config
from mmgraph.errors import UserError
from mmgraph.utils.fields import GROUPS
from mmgraph.utils.log import is_main_process

DEMO_SETTINGS: dict[str, Any] = {
    "nodes": str(DEMO_FOLDER / "nodes.csv"),
    "edges": str(DEMO_FOLDER / "edges.csv"),
    "eval_edges": str(DEMO_FOLDER / "eval_edges.csv"),
    "model_name": str(DEMO_FOLDER / "towers"),
    "run_name": "demo",
    "fused_dim": 128,
    "proj_dim": 128,
    "epochs": 4,
    "learning_rate": 1e-3,
    "num_workers": 0,  # 72-pixel images, all of them cached: workers would only cost their start
    "cache_size": 2048,
}


class _Parser(HfArgumentParser):
    """Flags from the dataclass; a wrong one is a :class:`UserError` instead of a usage dump."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")

    @staticmethod
    def _parse_dataclass_field(parser: ArgumentParser, field: dataclasses.Field) -> None:
        """Add a field's flag. The base class passes all metadata to ``add_argument``, which rejects other keys."""
        field = copy.copy(field)
        field.metadata = {key: field.metadata[key] for key in ("help", "aliases")}  # type: ignore[assignment]
        HfArgumentParser._parse_dataclass_field(parser, field)

    def parse(self, arguments: list[str]) -> Namespace:
        namespace, unknown = self.parse_known_args(arguments)
        if unknown:
            flag = unknown[0].split("=")[0]
            near = difflib.get_close_matches(
                flag.replace("-", "_"), [f"__{f.name}" for f in dataclasses.fields(Config)], 1
            )
            self.error(f"unknown argument {flag}" + (f", did you mean --{near[0][2:]}?" if near else ""))
        return namespace

    def show_help(self, every_flag: bool) -> None:
        for action in self._actions:
            if action.option_strings[0].startswith("--no_"):
                action.help = "leave that out"
            if not every_flag and action.dest not in {*COMMON, "help", "help_all", "config"}:
                action.help = SUPPRESS
            if action.default is None or action.default is False:
                action.default = SUPPRESS  # "(default: None)" says nothing
            action.option_strings = [o for o in action.option_strings if "-" not in o[2:]]  # --a-b is the same as --a_b
        self.print_help()


def _build_parser() -> _Parser:
    parser = _Parser(
        prog="accelerate launch launch.py",
        add_help=False,
        allow_abbrev=False,
        usage="%(prog)s [--config FILE] [--flags]",
        description="Train a multimodal graph node encoder. Flags may be written with - or _.",
    )
    parser._optionals.title = "start"
    parser.add_argument("--config", metavar="FILE", help="YAML of flags and values; flags given beside it win")
    parser.add_argument("--help", action="store_true", default=False, help="show the common flags")
    parser.add_argument("--help_all", "--help-all", action="store_true", default=False, help="show all flags")
    parser._add_dataclass_arguments(Config)  # type: ignore[arg-type]
    group_of = {field.name: field.metadata["group"] for field in dataclasses.fields(Config)}
    for title in GROUPS:
        group = parser.add_argument_group(title)
        for action in [a for a in parser._optionals._group_actions if group_of.get(a.dest) == title]:
            parser._optionals._group_actions.remove(action)
            group._group_actions.append(action)
            action.metavar = action.metavar or (None if action.choices else action.dest.rsplit("_", 1)[-1].upper())
    return parser


def as_arguments(settings: Mapping[str, Any]) -> list[str]:
    """Settings by name as flags; those that are None are left out."""
    return [f"--{name}={value}" for name, value in settings.items() if value is not None]


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        settings = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        raise UserError(f"--config {path}: must hold 'flag: value' lines, not a {type(settings).__name__}")
    known = {field.name for field in dataclasses.fields(Config)} | {"batch_size"}
    for name, value in settings.items():
        if name not in known:
            near = difflib.get_close_matches(str(name), known, 1)
            raise UserError(f"--config {path}: unknown key '{name}'" + (f", did you mean '{near[0]}'?" if near else ""))
        if isinstance(value, dict | list):
            raise UserError(f"--config {path}: '{name}' must be a single value")
    return settings


def config_of(settings: Mapping[str, Any]) -> Config:
    """Settings by name, as a file has them; those that are None are left out. Raises :class:`UserError` on bad ones."""
    given = _build_parser().parse(as_arguments(settings))
    return Config(**{field.name: getattr(given, field.name) for field in dataclasses.fields(Config)})


def parse_config(arguments: list[str]) -> Config:
    """Build the settings from command-line arguments (and the YAML that ``--config`` names).

    Raises:
        UserError: an unknown or malformed flag, key or file.
        SystemExit: after ``--help`` and ``--help_all``.
    """
    parser = _build_parser()
    given = parser.parse(arguments)
    if given.help or given.help_all:
        if is_main_process():
            parser.show_help(given.help_all)
        raise SystemExit(0)
    from_file: list[str] = []
    if given.config is not None:
        from_file = as_arguments(_read_yaml(given.config))
        try:
            parser.parse(from_file)
        except UserError as error:
            raise UserError(f"--config {given.config}: {error}") from None
    given = parser.parse(from_file + arguments)
    if given.demo:
        demo = {**DEMO_SETTINGS, "eval_edges": None} if given.eval_fraction else DEMO_SETTINGS
        given = parser.parse(as_arguments(demo) + from_file + arguments)
        if given.nodes != DEMO_SETTINGS["nodes"] or given.edges != DEMO_SETTINGS["edges"]:
            raise UserError("--demo trains on the demo graph: leave out --nodes and --edges, or leave out --demo")
    return Config(**{field.name: getattr(given, field.name) for field in dataclasses.fields(Config)})
