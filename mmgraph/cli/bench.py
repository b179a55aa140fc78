"""The command line of ``mmgraph bench``."""

import argparse
from pathlib import Path

from mmgraph.errors import UserError


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """What is measured, and how; what the parser does not know is the run's, as ``launch.py`` takes it."""
    parser.set_defaults(run=_bench)
    kinds = parser.add_subparsers(metavar="WHAT", required=True, dest="what")

    step = kinds.add_parser("step", help="the original's kind of step, the live and the stored one, by phase")
    data = kinds.add_parser("data", help="decoding, tokenising, cache hits, and the memory of tables")
    data.add_argument("--tables", action="store_true", help="only the memory of tables, over an epoch")
    scale = kinds.add_parser("scale", help="one run of N processes against N runs, one thread each")
    scale.add_argument("--processes", type=positive, default=2, help="up to this many (2)")
    scale.add_argument("--steps", type=positive, default=8, help="of a run (8)")
    loss = kinds.add_parser("loss", help="InfoNCE in parts against the plain one, time and memory")
    loss.add_argument("--sizes", type=positive, nargs="+", default=[1024, 4096, 8192], help="edges (1024 4096 8192)")
    study = kinds.add_parser(
        "study", help="what training is worth on held-out edges: batch sizes, negatives, baselines"
    )
    study.add_argument("--batch_sizes", "--batch-sizes", type=positive, nargs="+", default=[64, 256, 1024])
    study.add_argument("--seeds", type=positive, default=3, help="runs of each kind, from --seed on (3)")
    study.add_argument(
        "--variant", action="append", default=[], help='flags of further runs, as in --variant="--temperature 0.2"'
    )
    study.add_argument(
        "--at_once", "--at-once", type=positive, default=2, help="runs at a time, of one thread each (2)"
    )
    study.add_argument("--folder", type=Path, help="keep the runs there, for a second start to find (default: nowhere)")
    study.add_argument("--json", type=Path, help="file to write the figures to")
    for kind, rounds in ((step, 7), (data, 1), (scale, 5), (loss, 5)):
        kind.add_argument("--repeats", type=positive, default=rounds, help=f"rounds that medians are of ({rounds})")
        kind.add_argument("--json", type=Path, help="file to write the figures to")

    graph = kinds.add_parser("graph", help="make a graph to measure on, and towers of ViT-B/32's size")
    graph.add_argument("folder", type=Path, help="where to")
    graph.add_argument("--structure", type=Path, help="edge table (src_id, dst_id) to take the edges from")
    graph.add_argument("--num_nodes", "--num-nodes", type=positive, default=10_000, help="else (10,000)")
    graph.add_argument("--num_edges", "--num-edges", type=positive, default=100_000, help="else (100,000)")
    graph.add_argument("--num_images", "--num-images", type=not_negative, help="distinct pictures (one a node)")


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be above 0")
    return number


def not_negative(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must be 0 or more")
    return number


def _bench(given: argparse.Namespace) -> None:
    if given.what == "graph":
        from mmgraph.bench.graph import build_graph

        if given.flags:
            raise UserError(f"unknown argument {given.flags[0]} (see mmgraph bench graph --help)")
        build_graph(given.folder, given.structure, given.num_nodes, given.num_edges, given.num_images)
        return
    from mmgraph.arguments import parse_config

    config = parse_config(given.flags)
    if given.what == "scale":
        from mmgraph.bench.scale import bench_scale

        bench_scale(config, given.processes, given.steps, given.repeats, given.json)
    elif given.what == "loss":
        from mmgraph.bench.loss import bench_loss

        bench_loss(config, given.sizes, given.repeats, given.json)
    elif given.what == "data":
        from mmgraph.bench.data import bench_data

        bench_data(config, given.tables, given.json)
    else:
        from mmgraph.bench.step import bench_step
        from mmgraph.bench.study import bench_study
        from mmgraph.cli.start import open_graph

        accelerator, graph = open_graph(config)
        if given.what == "study":
            runs = given.batch_sizes, given.seeds, given.variant, given.at_once, given.folder
            bench_study(config, graph, *runs, given.json)
            return
        bench_step(config, accelerator, graph, given.repeats, given.json)
