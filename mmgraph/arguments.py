"""Parse the command line of a run: flags and YAML to a :class:`~mmgraph.config.Config`."""

import copy
import dataclasses
import difflib
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from mmgraph.config import COMMON, VALUE_TYPES, Config
from mmgraph.errors import UserError
from mmgraph.flags.data import DEMO_FOLDER
from mmgraph.utils.fields import GROUPS
from mmgraph.utils.log import is_main_process

SETTINGS = {**VALUE_TYPES, "batch_size": int}  # names that a YAML file may have -> type of the value
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
    "num_workers": 0,  # all images (72 pixels) fit in the cache, so workers would only add start-up time
    "cache_size": 2048,
}


class _Parser(HfArgumentParser):
    """Parses the flags of ``Config``. On a wrong flag, raises :class:`UserError` instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see --help)")

    @staticmethod
    def _parse_dataclass_field(parser: ArgumentParser, field: dataclasses.Field) -> None:
        """Add the flag of a field.

        The base class passes all metadata to ``add_argument``, which rejects unknown keys. So this method keeps only
        the keys that ``add_argument`` knows.
        """
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
                action.help = "turn off the flag above"
            if not every_flag and action.dest not in {*COMMON, "help", "help_all", "config"}:
                action.help = SUPPRESS
            if action.default is None or action.default is False:
                action.default = SUPPRESS  # do not print "(default: None)"
            action.option_strings = [o for o in action.option_strings if "-" not in o[2:]]  # hide the alias --a-b
        self.print_help()


def _build_parser() -> _Parser:
    parser = _Parser(
        prog="accelerate launch launch.py",
        add_help=False,
        allow_abbrev=False,
        usage="%(prog)s [--config FILE] [--flags]",
        description="Train a multimodal graph node encoder. Flags can be written with dashes or underscores.",
    )
    parser._optionals.title = "start"
    parser.add_argument("--config", metavar="FILE", help="YAML file of flags; the command line overrides it")
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
    """Return a mapping of names to values as command-line flags. Values that are None are skipped."""
    return [f"--{name}={value}" for name, value in settings.items() if value is not None]


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        settings = parse_settings(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"--config {path}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise UserError(f"--config {path}: not valid YAML: {' '.join(str(error).split())}") from None
    except ValueError as error:
        raise UserError(f"--config {path}: {error}") from None
    for name, value in settings.items():
        if name not in SETTINGS:
            near = difflib.get_close_matches(str(name), SETTINGS, 1)
            raise UserError(f"--config {path}: unknown key '{name}'" + (f", did you mean '{near[0]}'?" if near else ""))
        if isinstance(value, dict | list):
            raise UserError(f"--config {path}: '{name}' must be a single value")
    return settings


def parse_settings(text: str) -> dict[str, Any]:
    """Parse the YAML text of a run's settings. Each value gets the type of its flag.

    YAML itself would read ``tower_cache: off`` as False, ``run_name: 007`` as 7 and ``seed: 010`` as 8. Here the value
    of a text flag is the text in the file, and a number is read as on the command line.

    Returns:
        The values by name. Names that are not flags are included, with YAML's types.

    Raises:
        yaml.YAMLError: the text is not valid YAML.
        ValueError: the text is not a mapping, or a name occurs twice.
    """
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        if not isinstance(root, yaml.MappingNode):
            content = None if root is None else _constructed(loader, root)
            if content is None:
                return {}
            raise ValueError(f"must contain 'flag: value' lines, not a {type(content).__name__}")
        settings: dict[str, Any] = {}
        for key, node in root.value:
            if not isinstance(key, yaml.ScalarNode):
                raise ValueError("must contain 'flag: value' lines; a key is a list or a mapping")
            name = _constructed(loader, key)
            if name in settings:
                raise ValueError(f"'{name}' occurs twice; remove one of the lines")
            settings[name] = _typed(SETTINGS.get(name), node, _constructed(loader, node))
        return settings
    finally:
        loader.dispose()


def _constructed(loader: yaml.SafeLoader, node: yaml.Node) -> Any:
    """Return YAML's value of a node; for text that only looks like a date, such as 2026-31-12, the text."""
    try:
        return loader.construct_object(node, deep=True)
    except ValueError:
        return node.value


def _typed(value_type: type | None, node: yaml.Node, value: Any) -> Any:
    """Return the value of a YAML node as ``value_type``; if that is not possible, its text, which the flag refuses."""
    if value is None or value_type in (None, bool) or not isinstance(node, yaml.ScalarNode):
        return value
    try:
        return value_type(node.value)
    except ValueError:
        return node.value


def build_config(settings: Mapping[str, Any]) -> Config:
    """Build a Config from a mapping of names to values, such as a YAML file. A value of None selects the default.

    Raises:
        UserError: an unknown name or an invalid value.
    """
    parsed = _build_parser().parse(as_arguments(settings))
    return Config(**{field.name: getattr(parsed, field.name) for field in dataclasses.fields(Config)})


def parse_config(arguments: list[str]) -> Config:
    """Build the settings from command-line arguments and the YAML file of ``--config``.

    Raises:
        UserError: an unknown or malformed flag, key or file.
        SystemExit: after ``--help`` or ``--help_all``.
    """
    parser = _build_parser()
    parsed = parser.parse(arguments)
    if parsed.help or parsed.help_all:
        if is_main_process():
            parser.show_help(parsed.help_all)
        raise SystemExit(0)
    from_file: list[str] = []
    if parsed.config is not None:
        from_file = as_arguments(_read_yaml(parsed.config))
        try:
            parser.parse(from_file)
        except UserError as error:
            raise UserError(f"--config {parsed.config}: {error}") from None
    parsed = parser.parse(from_file + arguments)
    if parsed.demo:
        demo = {**DEMO_SETTINGS, "eval_edges": None} if parsed.eval_fraction else DEMO_SETTINGS
        parsed = parser.parse(as_arguments(demo) + from_file + arguments)
        if parsed.nodes != DEMO_SETTINGS["nodes"] or parsed.edges != DEMO_SETTINGS["edges"]:
            raise UserError("--demo trains on the demo graph: remove --nodes and --edges, or remove --demo")
    return Config(**{field.name: getattr(parsed, field.name) for field in dataclasses.fields(Config)})
