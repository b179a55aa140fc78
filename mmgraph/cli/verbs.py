"""``mmgraph VERB``: everything but training."""

import argparse
from pathlib import Path
from typing import Any, NoReturn, get_args, get_type_hints

from mmgraph.cli.bench import add_bench_arguments, not_negative, positive
from mmgraph.config import Config
from mmgraph.errors import UserError
from mmgraph.utils.log import is_main_process

CHECKPOINT = "a run's folder, or an epoch or final file"
RUN_FLAGS = {  # flags of Config that replace a setting of the checkpoint's run, and their help
    "nodes": "node table (default: the run's)",
    "image_root": "folder that image paths start from (default: the run's)",
    "model_name": "CLIP towers the checkpoint was trained with (default: the run's)",
    "confine_images": "refuse image paths that leave the image root",
}
SPLIT_FLAGS = {  # likewise, for the edges to rank
    "edges": "edge table that was trained on (default: the run's)",
    "eval_edges": "edge table to rank (default: the run's)",
    "eval_fraction": "share of the edges that the run held out",
    "seed": "of the split, and of what is drawn (default: the run's)",
}


def run_verb(arguments: list[str]) -> int:
    """Run a verb. Returns the exit code."""
    given, flags = _build_parser().parse_known_args(arguments)
    if flags and not hasattr(given, "flags"):
        raise UserError(f"unknown argument {flags[0]} (see mmgraph {arguments[0]} --help)")
    given.flags = flags
    given.run(given)
    return 0


class _Parser(argparse.ArgumentParser):
    """A wrong flag is one line, not a usage dump."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _build_parser() -> _Parser:
    parser = _Parser(prog="mmgraph", description="Multimodal graph node encoders. accelerate launch launch.py trains.")
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for verb, help, add_arguments in (
        ("demo", "build the emoji demo graph", _add_demo_arguments),
        ("cache", "build the tower store of a run; takes the flags of launch.py", _add_cache_arguments),
        ("encode", "write the embeddings of all nodes", _add_encode_arguments),
        ("evaluate", "rank held-out edges by a checkpoint's embeddings, or by features", _add_evaluate_arguments),
        ("neighbors", "the nodes nearest to a node, a text or an image", _add_neighbors_arguments),
        ("report", "one HTML page of a run, or of several side by side", _add_report_arguments),
        ("bench", "measure this machine on a graph; takes the flags of launch.py too", _add_bench_arguments),
        ("convert", "checkpoint between .pt and .safetensors, nothing lost", _add_convert_arguments),
    ):
        add_arguments(verbs.add_parser(verb, help=help))
    return parser


def _spellings(name: str) -> list[str]:
    """A flag with underscores, and with dashes."""
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def _add_config_flags(parser: argparse.ArgumentParser, helps: dict[str, str]) -> None:
    """Add flags of Config with its types. A flag that is not given is None: the run's setting then holds."""
    types = get_type_hints(Config)
    for name, help in helps.items():
        if types[name] is bool:
            parser.add_argument(*_spellings(name), action="store_true", default=None, help=help)
        else:
            kind = next(iter(get_args(types[name])), types[name])  # of "str | None": str
            parser.add_argument(*_spellings(name), type=kind, metavar=name.rsplit("_", 1)[-1].upper(), help=help)


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every verb that reads a checkpoint."""
    _add_config_flags(parser, RUN_FLAGS)
    help = "DataLoader workers, where towers run (0)"  # the run's value is not used
    parser.add_argument(*_spellings("num_workers"), type=not_negative, default=0, metavar="N", help=help)


def _of_run(given: argparse.Namespace) -> dict[str, Any]:
    """The settings that replace the run's; those not given are None."""
    names = (*RUN_FLAGS, *SPLIT_FLAGS, "num_workers")
    return {name: value for name, value in vars(given).items() if name in names}


def _add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="where to")
    parser.set_defaults(run=_demo)


def _demo(given: argparse.Namespace) -> None:
    from mmgraph.demo.graph import build_demo

    if is_main_process():
        build_demo(given.folder)


def _add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_cache, flags=None)  # with "flags", unknown ones are passed on as the run's


def _cache(given: argparse.Namespace) -> None:
    from mmgraph.arguments import parse_config

    config = parse_config(given.flags)

    from mmgraph.cli.start import open_graph
    from mmgraph.towers.cached import build_store

    accelerator, graph = open_graph(config)
    build_store(config, accelerator, graph)
    accelerator.end_training()


def _add_encode_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help=CHECKPOINT)
    _add_run_arguments(parser)
    folder_help = "default: features in the run's folder"
    parser.add_argument(*_spellings("output_dir"), type=Path, metavar="DIR", help=folder_help)
    parser.add_argument("--features", nargs="+", help="z_graph, fused, text_only, image_only, concat (all)")
    parser.add_argument("--format", default="pt", help="pt, safetensors, parquet or npy (pt)")
    parser.set_defaults(run=_encode)


def _encode(given: argparse.Namespace) -> None:
    from mmgraph.distributed.launch import build_accelerator
    from mmgraph.inference.encode import FEATURES, encode
    from mmgraph.inference.pretrained import find_checkpoint, run_settings, settings_of

    checkpoint = find_checkpoint(given.source)
    config = settings_of(checkpoint, _of_run(given))
    beside = checkpoint.parent.parent / "features" if run_settings(checkpoint) else Path("features")
    accelerator = build_accelerator()
    encode(checkpoint, config, accelerator, given.output_dir or beside, given.features or FEATURES, given.format)
    accelerator.end_training()


def _add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    sources = "a run's folder, an epoch or final file; or feature files"
    parser.add_argument("source", type=Path, nargs="+", help=sources)
    _add_run_arguments(parser)
    _add_config_flags(parser, SPLIT_FLAGS)
    parser.add_argument("--json", type=Path, metavar="JSON", help="file to write all figures to")
    parser.set_defaults(run=_evaluate)


def _evaluate(given: argparse.Namespace) -> None:
    from mmgraph.distributed.launch import build_accelerator
    from mmgraph.evaluation.command import evaluate, find_features
    from mmgraph.inference.pretrained import find_checkpoint, settings_of

    features = find_features(given.source)
    if not features and len(given.source) > 1:
        raise UserError("evaluate takes one run or checkpoint at a time")
    checkpoint = None if features else find_checkpoint(given.source[0])
    config = settings_of(checkpoint or features[0], _of_run(given))
    accelerator = build_accelerator()
    evaluate(checkpoint, features, config, accelerator, given.json)
    accelerator.end_training()


def _add_neighbors_arguments(parser: argparse.ArgumentParser) -> None:
    newest = "(default: the run below runs/ that ended last)"
    parser.add_argument("source", type=Path, nargs="?", help=f"{CHECKPOINT} {newest}")
    parser.add_argument("--node", metavar="NAME", help="node_id, or short_name, of a node of the graph")
    parser.add_argument("--text", help="text of a node that is not in the graph")
    parser.add_argument("--image", metavar="FILE", help="image of a node that is not in the graph")
    parser.add_argument(*_spellings("top_k"), type=positive, default=10, metavar="K", help="how many (10)")
    parser.add_argument("--embedding", default="z_graph", help="z_graph, fused, text_only, image_only or concat")
    _add_run_arguments(parser)
    parser.set_defaults(run=_neighbors)


def _neighbors(given: argparse.Namespace) -> None:
    from mmgraph.distributed.collectives import broadcast_from_main_process
    from mmgraph.distributed.launch import build_accelerator
    from mmgraph.inference.encode import FEATURES
    from mmgraph.inference.neighbor_search import neighbors, query_of
    from mmgraph.inference.pretrained import find_checkpoint, last_checkpoint, newest_run, settings_of

    query = query_of(given.node, given.text, given.image)
    if given.embedding not in FEATURES:
        raise UserError(f"--embedding {given.embedding}: must be one of {', '.join(FEATURES)}")
    source = given.source or newest_run()
    accelerator = build_accelerator()
    find = last_checkpoint if source.is_dir() else find_checkpoint
    checkpoint = broadcast_from_main_process(accelerator, lambda: find(source))  # a run may be writing them
    config = settings_of(checkpoint, _of_run(given))
    neighbors(checkpoint, config, accelerator, query, given.embedding, given.top_k)
    accelerator.end_training()


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, nargs="*", metavar="RUN", help="folders of runs (the one that ended last)")
    page = "the page (report.html in the run's folder, or here)"
    parser.add_argument("--output", type=Path, metavar="FILE", help=page)
    for name, help in (
        ("node", "node_id or short_name of a node to show with its nearest; may be given several times"),
        ("text", "text of a node that is not in the graph, to show with its nearest; likewise"),
        ("image", "image file of a node that is not in the graph; likewise"),
    ):
        parser.add_argument(f"--{name}", action="append", default=[], metavar=name.upper(), help=help)
    _add_run_arguments(parser)
    parser.set_defaults(run=_report)


def _report(given: argparse.Namespace) -> None:
    from mmgraph.distributed.launch import build_accelerator
    from mmgraph.inference.neighbor_search import query_of
    from mmgraph.inference.pretrained import newest_run
    from mmgraph.report.make import FILE, report

    runs = given.source or [newest_run()]
    names = ("node", "text", "image")
    queries = [query_of(**{**dict.fromkeys(names), name: value}) for name in names for value in getattr(given, name)]
    output = given.output or (runs[0] / FILE if len(runs) == 1 else Path(FILE))
    accelerator = build_accelerator()
    report(runs, output, _of_run(given), accelerator, queries)
    accelerator.end_training()


def _add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    add_bench_arguments(parser)
    parser.set_defaults(flags=None)


def _add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.set_defaults(run=_convert)


def _convert(given: argparse.Namespace) -> None:
    from mmgraph.checkpoints.convert import convert

    if is_main_process():
        convert(given.source, given.target)
