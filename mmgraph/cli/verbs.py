"""``mmgraph VERB``: everything but training."""

import argparse
from pathlib import Path
from typing import Any, NoReturn

from mmgraph.cli.bench import add_bench_arguments, not_negative, positive
from mmgraph.errors import UserError
from mmgraph.utils.log import is_main_process


def run_verb(arguments: list[str]) -> int:
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

    demo = verbs.add_parser("demo", help="build the emoji demo graph")
    demo.add_argument("folder", type=Path, help="where to")
    demo.set_defaults(run=_demo)

    cache = verbs.add_parser("cache", help="build the tower store of a run; takes the flags of launch.py")
    cache.set_defaults(run=_cache, flags=None)

    encode = verbs.add_parser("encode", help="write the embeddings of all nodes")
    encode.add_argument("source", type=Path, help="a run's folder, or an epoch or final file")
    _add_run_arguments(encode)
    encode.add_argument(*_flag("output_dir"), type=Path, metavar="DIR", help="default: features in the run's folder")
    encode.add_argument("--features", nargs="+", help="z_graph, fused, text_only, image_only, concat (all)")
    encode.add_argument("--format", default="pt", help="pt, safetensors, parquet or npy (pt)")
    encode.set_defaults(run=_encode)

    evaluate = verbs.add_parser("evaluate", help="rank held-out edges by a checkpoint's embeddings, or by features")
    evaluate.add_argument(
        "source", type=Path, nargs="+", help="a run's folder, an epoch or final file; or feature files"
    )
    _add_run_arguments(evaluate)
    for name, kind, help in (
        ("edges", str, "edge table that was trained on (default: the run's)"),
        ("eval_edges", str, "edge table to rank (default: the run's)"),
        ("eval_fraction", float, "share of the edges that the run held out"),
        ("seed", int, "of the split, and of what is drawn (default: the run's)"),
        ("json", Path, "file to write all figures to"),
    ):
        evaluate.add_argument(*_flag(name), type=kind, metavar=name.rsplit("_", 1)[-1].upper(), help=help)
    evaluate.set_defaults(run=_evaluate)

    neighbors = verbs.add_parser("neighbors", help="the nodes nearest to a node, a text or an image")
    neighbors.add_argument(
        "source",
        type=Path,
        nargs="?",
        help="a run's folder, or an epoch or final file (default: the run below runs/ that ended last)",
    )
    neighbors.add_argument("--node", metavar="NAME", help="node_id, or short_name, of a node of the graph")
    neighbors.add_argument("--text", help="text of a node that is not in the graph")
    neighbors.add_argument("--image", metavar="FILE", help="image of a node that is not in the graph")
    neighbors.add_argument(*_flag("top_k"), type=positive, default=10, metavar="K", help="how many (10)")
    neighbors.add_argument("--embedding", default="z_graph", help="z_graph, fused, text_only, image_only or concat")
    _add_run_arguments(neighbors)
    neighbors.set_defaults(run=_neighbors)

    report = verbs.add_parser("report", help="one HTML page of a run, or of several side by side")
    report.add_argument("source", type=Path, nargs="*", metavar="RUN", help="folders of runs (the one that ended last)")
    report.add_argument(
        "--output", type=Path, metavar="FILE", help="the page (report.html in the run's folder, or here)"
    )
    for name, help in (
        ("node", "node_id or short_name of a node to show with its nearest; may be given several times"),
        ("text", "text of a node that is not in the graph, to show with its nearest; likewise"),
        ("image", "image file of a node that is not in the graph; likewise"),
    ):
        report.add_argument(f"--{name}", action="append", default=[], metavar=name.upper(), help=help)
    _add_run_arguments(report)
    report.set_defaults(run=_report)

    bench = verbs.add_parser("bench", help="measure this machine on a graph; takes the flags of launch.py too")
    add_bench_arguments(bench)
    bench.set_defaults(flags=None)

    convert = verbs.add_parser("convert", help="checkpoint between .pt and .safetensors, nothing lost")
    convert.add_argument("source", type=Path)
    convert.add_argument("target", type=Path)
    convert.set_defaults(run=_convert)
    return parser


def _add_run_arguments(parser: argparse.ArgumentParser) -> None:
    for name, help in (
        ("nodes", "node table (default: the run's)"),
        ("image_root", "folder that image paths start from (default: the run's)"),
        ("model_name", "CLIP towers the checkpoint was trained with (default: the run's)"),
    ):
        parser.add_argument(*_flag(name), metavar=name.rsplit("_", 1)[-1].upper(), help=help)
    parser.add_argument(
        *_flag("confine_images"), action="store_true", default=None, help="refuse image paths that leave the image root"
    )
    parser.add_argument(
        *_flag("num_workers"),
        type=not_negative,
        default=0,
        metavar="N",
        help="DataLoader workers, where towers run (0)",
    )


def _flag(name: str) -> list[str]:
    """A flag with underscores, and with dashes."""
    return list(dict.fromkeys((f"--{name}", f"--{name.replace('_', '-')}")))


def _demo(given: argparse.Namespace) -> None:
    from mmgraph.demo.graph import build_demo

    if is_main_process():
        build_demo(given.folder)


def _cache(given: argparse.Namespace) -> None:
    from mmgraph.flags import parse_config

    config = parse_config(given.flags)

    from mmgraph.cli.start import open_graph
    from mmgraph.towers.cached import build_store

    accelerator, graph = open_graph(config)
    build_store(config, accelerator, graph)
    accelerator.end_training()


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


def _evaluate(given: argparse.Namespace) -> None:
    from mmgraph.distributed.launch import build_accelerator
    from mmgraph.evaluation.command import evaluate, find_features
    from mmgraph.inference.pretrained import find_checkpoint, settings_of

    features = find_features(given.source)
    if not features and len(given.source) > 1:
        raise UserError("evaluate takes one run or checkpoint at a time")
    checkpoint = None if features else find_checkpoint(given.source[0])
    more = {name: getattr(given, name) for name in ("edges", "eval_edges", "eval_fraction", "seed")}
    config = settings_of(checkpoint or features[0], {**_of_run(given), **more})
    accelerator = build_accelerator()
    evaluate(checkpoint, features, config, accelerator, given.json)
    accelerator.end_training()


def _neighbors(given: argparse.Namespace) -> None:
    from mmgraph.distributed.collectives import from_main_process
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
    checkpoint = from_main_process(accelerator, lambda: find(source))  # a run may be writing them
    config = settings_of(checkpoint, _of_run(given))
    neighbors(checkpoint, config, accelerator, query, given.embedding, given.top_k)
    accelerator.end_training()


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


def _of_run(given: argparse.Namespace) -> dict[str, Any]:
    return {
        name: getattr(given, name) for name in ("nodes", "image_root", "confine_images", "model_name", "num_workers")
    }


def _convert(given: argparse.Namespace) -> None:
    from mmgraph.checkpoints.convert import convert

    if is_main_process():
        convert(given.source, given.target)
