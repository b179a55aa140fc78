"""The command line of ``mmgraph VERB``: everything except training."""

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from mmgraph.cli.bench import add_bench_arguments, not_negative, positive
from mmgraph.config import VALUE_TYPES
from mmgraph.errors import UserError
from mmgraph.utils.log import is_main_process

if TYPE_CHECKING:
    from accelerate import Accelerator

CHECKPOINT = "folder of a run, or a checkpoint file (.pt)"
RUN_FLAGS = {  # flags of Config that override a setting of the checkpoint's run, and their help
    "nodes": "node table (default: the run's)",
    "image_root": "base folder of relative image paths (default: the run's)",
    "model_name": "CLIP towers that the checkpoint was trained with (default: the run's)",
    "confine_images": "refuse image paths that leave the image root",
}
SPLIT_FLAGS = {  # flags of Config that override the edges to rank and their split, and their help
    "edges": "edge table used in training (default: the run's)",
    "eval_edges": "edge table to rank (default: the run's)",
    "eval_fraction": "fraction of the edges that the run held out (default: the run's)",
    "seed": "seed of the split and of random draws (default: the run's)",
}


def run_verb(arguments: list[str]) -> int:
    """Run a verb and return the exit code."""
    args, flags = _build_parser().parse_known_args(arguments)
    if flags and not hasattr(args, "flags"):
        raise UserError(f"unknown argument {flags[0]} (see mmgraph {arguments[0]} --help)")
    args.flags = flags
    args.run(args)
    return 0


class _Parser(argparse.ArgumentParser):
    """Raises :class:`UserError` on a wrong flag instead of printing the usage."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message} (see {self.prog} --help)")


def _build_parser() -> _Parser:
    parser = _Parser(
        prog="mmgraph",
        description="Work with multimodal graph node encoders. To train one, run accelerate launch launch.py.",
    )
    verbs = parser.add_subparsers(metavar="VERB", required=True)
    for verb, help, add_arguments in (
        ("demo", "build the emoji demo graph", _add_demo_arguments),
        ("cache", "build the tower store of a run; takes the flags of launch.py", _add_cache_arguments),
        ("encode", "write the embeddings of all nodes", _add_encode_arguments),
        ("evaluate", "rank held-out edges with a checkpoint or with feature files", _add_evaluate_arguments),
        ("neighbors", "find the nodes nearest to a node, a text or an image", _add_neighbors_arguments),
        ("report", "write an HTML report of a run, or of several side by side", _add_report_arguments),
        ("split", "write the edges that a run was trained on as a table", _add_split_arguments),
        ("bench", "run a benchmark on this machine; also takes the flags of launch.py", _add_bench_arguments),
        ("convert", "convert a checkpoint between .pt and .safetensors without loss", _add_convert_arguments),
    ):
        add_arguments(verbs.add_parser(verb, help=help))
    return parser


def _spellings(name: str) -> list[str]:
    """Return the spellings of a flag, with underscores and with dashes."""
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def _add_config_flags(parser: argparse.ArgumentParser, helps: dict[str, str]) -> None:
    """Add flags of Config, with the types of its fields. A flag that is not set is None and keeps the run's setting."""
    for name, help in helps.items():
        if VALUE_TYPES[name] is bool:
            parser.add_argument(*_spellings(name), action="store_true", default=None, help=help)
        else:
            metavar = name.rsplit("_", 1)[-1].upper()
            parser.add_argument(*_spellings(name), type=VALUE_TYPES[name], metavar=metavar, help=help)


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the flags of every verb that reads a checkpoint."""
    _add_config_flags(parser, RUN_FLAGS)
    help = "DataLoader workers, used if the towers run live (default: 0)"  # not the run's value
    parser.add_argument(*_spellings("num_workers"), type=not_negative, default=0, metavar="N", help=help)


def _overrides(args: argparse.Namespace) -> dict[str, Any]:
    """Return the flags that override the run's settings; flags that are not set are None."""
    names = (*RUN_FLAGS, *SPLIT_FLAGS, "num_workers")
    return {name: value for name, value in vars(args).items() if name in names}


def _find_checkpoint(source: Path, accelerator: "Accelerator") -> Path:
    """Find the checkpoint of ``source`` on the main process.

    A run may be writing checkpoints at the same time, so that ranks could find different ones.
    """
    from mmgraph.distributed.collectives import broadcast_from_main_process
    from mmgraph.inference.pretrained import find_checkpoint

    return broadcast_from_main_process(accelerator, lambda: find_checkpoint(source))


def _add_demo_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, help="output folder")
    parser.set_defaults(run=_demo)


def _demo(args: argparse.Namespace) -> None:
    from mmgraph.demo.graph import build_demo

    if is_main_process():
        build_demo(args.folder)


def _add_cache_arguments(parser: argparse.ArgumentParser) -> None:
    parser.set_defaults(run=_cache, flags=None)  # an attribute "flags" lets run_verb accept the flags of launch.py


def _cache(args: argparse.Namespace) -> None:
    from mmgraph.arguments import parse_config

    config = parse_config(args.flags)

    from mmgraph.cli.start import open_graph
    from mmgraph.towers.cached import build_store

    accelerator, graph = open_graph(config)
    build_store(config, accelerator, graph)
    accelerator.end_training()


def _add_encode_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, help=CHECKPOINT)
    _add_run_arguments(parser)
    folder_help = "output folder (default: RUN/features, or ./features for a file outside of a run)"
    parser.add_argument(*_spellings("output_dir"), type=Path, metavar="DIR", help=folder_help)
    parser.add_argument(
        "--features",
        nargs="+",
        help="embeddings to write: z_graph, fused, text_only, image_only, concat (default: all)",
    )
    parser.add_argument("--format", default="pt", help="file format: pt, safetensors, parquet or npy (default: pt)")
    parser.set_defaults(run=_encode)


def _encode(args: argparse.Namespace) -> None:
    from mmgraph.distributed.collectives import broadcast_from_main_process
    from mmgraph.distributed.launch import build_accelerator
    from mmgraph.inference.encode import FEATURES, default_output, encode
    from mmgraph.inference.pretrained import load_run_config

    accelerator = build_accelerator()
    checkpoint = _find_checkpoint(args.source, accelerator)
    config = load_run_config(checkpoint, _overrides(args))
    output = args.output_dir or broadcast_from_main_process(accelerator, lambda: default_output(checkpoint, config))
    encode(checkpoint, config, accelerator, output, args.features or FEATURES, args.format)
    accelerator.end_training()


def _add_evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    sources = "folder of a run, a checkpoint file (.pt), or feature files"
    parser.add_argument("source", type=Path, nargs="+", help=sources)
    _add_run_arguments(parser)
    _add_config_flags(parser, SPLIT_FLAGS)
    parser.add_argument("--json", type=Path, metavar="JSON", help="JSON file to write all figures to")
    parser.set_defaults(run=_evaluate)


def _evaluate(args: argparse.Namespace) -> None:
    from mmgraph.distributed.launch import build_accelerator
    from mmgraph.evaluation.command import evaluate, find_features
    from mmgraph.inference.pretrained import load_run_config

    features = find_features(args.source)
    if not features and len(args.source) > 1:
        raise UserError("evaluate takes one run or checkpoint at a time: run the command once for each")
    accelerator = build_accelerator()
    checkpoint = None if features else _find_checkpoint(args.source[0], accelerator)
    config = load_run_config(checkpoint or features[0], _overrides(args))
    evaluate(checkpoint, features, config, accelerator, args.json, args.eval_edges)
    accelerator.end_training()


def _add_neighbors_arguments(parser: argparse.ArgumentParser) -> None:
    newest = "(default: the run in runs/ that finished last)"
    parser.add_argument("source", type=Path, nargs="?", help=f"{CHECKPOINT} {newest}")
    parser.add_argument("--node", metavar="NAME", help="node_id or short_name of a node in the graph")
    parser.add_argument("--text", help="text of a node that is not in the graph")
    parser.add_argument("--image", metavar="FILE", help="image file of a node that is not in the graph")
    parser.add_argument(
        *_spellings("top_k"), type=positive, default=10, metavar="K", help="number of nodes to print (default: 10)"
    )
    parser.add_argument(
        "--embedding",
        default="z_graph",
        help="embedding to compare: z_graph, fused, text_only, image_only or concat (default: z_graph)",
    )
    _add_run_arguments(parser)
    parser.set_defaults(run=_neighbors)


def _neighbors(args: argparse.Namespace) -> None:
    from mmgraph.checkpoints.newest import newest_run
    from mmgraph.distributed.launch import build_accelerator
    from mmgraph.inference.encode import FEATURES
    from mmgraph.inference.neighbor_search import neighbors, query_of
    from mmgraph.inference.pretrained import load_run_config

    query = query_of(args.node, args.text, args.image)
    if args.embedding not in FEATURES:
        raise UserError(f"--embedding {args.embedding}: must be one of {', '.join(FEATURES)}")
    source = args.source or newest_run(Path("runs"))
    accelerator = build_accelerator()
    checkpoint = _find_checkpoint(source, accelerator)
    config = load_run_config(checkpoint, _overrides(args))
    neighbors(checkpoint, config, accelerator, query, args.embedding, args.top_k)
    accelerator.end_training()


def _add_report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "source",
        type=Path,
        nargs="*",
        metavar="RUN",
        help="folders of runs (default: the run in runs/ that finished last)",
    )
    page = "HTML file to write (default: report.html in the run's folder; ./report.html for several runs)"
    parser.add_argument("--output", type=Path, metavar="FILE", help=page)
    for name, help in (
        ("node", "node_id or short_name of a node to show with its nearest neighbors; repeatable"),
        ("text", "text of a node that is not in the graph, to show with its nearest neighbors; repeatable"),
        ("image", "image file of a node that is not in the graph, to show with its nearest neighbors; repeatable"),
    ):
        parser.add_argument(f"--{name}", action="append", default=[], metavar=name.upper(), help=help)
    _add_run_arguments(parser)
    parser.set_defaults(run=_report)


def _report(args: argparse.Namespace) -> None:
    from mmgraph.checkpoints.newest import newest_run
    from mmgraph.distributed.launch import build_accelerator
    from mmgraph.inference.neighbor_search import query_of
    from mmgraph.report.make import FILE, report

    runs = args.source or [newest_run(Path("runs"))]
    names = ("node", "text", "image")
    queries = [query_of(**{**dict.fromkeys(names), name: value}) for name in names for value in getattr(args, name)]
    output = args.output or (runs[0] / FILE if len(runs) == 1 else Path(FILE))
    accelerator = build_accelerator()
    report(runs, output, _overrides(args), accelerator, queries)
    accelerator.end_training()


def _add_split_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path, metavar="RUN", help="folder of a run")
    parser.add_argument("output", type=Path, metavar="FILE", help="table to write: .csv, .parquet or .arrow")
    parser.add_argument(
        "--edges", metavar="EDGES", help="the run's edge table (default: its path in the run's settings)"
    )
    parser.set_defaults(run=_split)


def _split(args: argparse.Namespace) -> None:
    from mmgraph.data.run_split import read_split
    from mmgraph.data.training_edges import write_training_edges
    from mmgraph.flags.data import DEFAULT_TABLES
    from mmgraph.inference.pretrained import read_settings

    split, settings = read_split(args.source), read_settings(args.source)
    if split is None or settings is None:
        raise UserError(f"{args.source}: not the folder of a run that has kept its split (older versions kept none)")
    if is_main_process():
        write_training_edges(split, args.edges or settings.get("edges", DEFAULT_TABLES[1]), args.output)


def _add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    add_bench_arguments(parser)
    parser.set_defaults(flags=None)


def _add_convert_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("source", type=Path)
    parser.add_argument("target", type=Path)
    parser.set_defaults(run=_convert)


def _convert(args: argparse.Namespace) -> None:
    from mmgraph.checkpoints.convert import convert

    if is_main_process():
        convert(args.source, args.target)
