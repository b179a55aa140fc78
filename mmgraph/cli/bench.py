"""The command line of ``mmgraph bench``."""

import argparse
import os
from pathlib import Path
from typing import Any

from mmgraph.bench import GPU_PARTS
from mmgraph.errors import UserError

MAX_WORKERS = 8  # default of bench gpu; each worker has batches of up to 1.2 GB in shared memory


def add_bench_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the benchmarks and their flags. Unknown flags are parsed as flags of ``launch.py``."""
    parser.set_defaults(run=_bench)
    benchmarks = parser.add_subparsers(metavar="WHAT", required=True, dest="what")

    step = benchmarks.add_parser(
        "step",
        help="time of a step and of its phases, for the original trainer, for live towers and for stored tokens",
    )
    data = benchmarks.add_parser(
        "data", help="time to decode and tokenize, hits of the image cache, and memory of the tables"
    )
    data.add_argument("--tables", action="store_true", help="measure only the memory of the tables, over an epoch")
    scale = benchmarks.add_parser(
        "scale",
        help="throughput of one run of N processes, compared with N simultaneous runs of one process each; each "
        "process has one thread",
    )
    scale.add_argument("--processes", type=positive, default=2, help="largest number of processes (default: 2)")
    scale.add_argument("--steps", type=positive, default=8, help="steps per run (default: 8)")
    loss = benchmarks.add_parser("loss", help="time and memory of InfoNCE in chunks, compared with plain InfoNCE")
    loss.add_argument(
        "--sizes", type=positive, nargs="+", default=[1024, 4096, 8192], help="batch sizes (default: 1024 4096 8192)"
    )
    study = benchmarks.add_parser(
        "study",
        help="MRR on held-out edges for each batch size and value of --false_negatives, compared with baselines",
    )
    study.add_argument("--batch_sizes", "--batch-sizes", type=positive, nargs="+", default=[64, 256, 1024])
    study.add_argument("--seeds", type=positive, default=3, help="seeds per setting, starting at --seed (default: 3)")
    study.add_argument(
        "--variant",
        action="append",
        default=[],
        help='flags of additional runs, such as --variant="--temperature 0.2"; repeatable',
    )
    study.add_argument(
        "--at_once",
        "--at-once",
        type=positive,
        default=2,
        help="concurrent runs, with one thread each (default: 2)",
    )
    study.add_argument(
        "--folder",
        type=Path,
        help="folder that keeps the runs, so that a later study can reuse them (default: a temporary folder)",
    )
    study.add_argument("--json", type=Path, help="JSON file to write the figures to")
    for benchmark, rounds in ((step, 7), (data, 1), (scale, 5), (loss, 5)):
        benchmark.add_argument(
            "--repeats",
            type=positive,
            default=rounds,
            help=f"number of rounds; figures are medians over the rounds (default: {rounds})",
        )
        benchmark.add_argument("--json", type=Path, help="JSON file to write the figures to")

    _add_gpu_arguments(benchmarks)
    graph = benchmarks.add_parser(
        "graph", help="build a graph for benchmarks, and towers with the size of ViT-B/32 and random weights"
    )
    graph.add_argument("folder", type=Path, help="output folder, new or empty")
    graph.add_argument(
        "--structure", type=Path, help="edge table (src_id, dst_id) to take the edges from (default: generated edges)"
    )
    graph.add_argument(
        "--num_nodes",
        "--num-nodes",
        type=positive,
        default=10_000,
        help="number of nodes, if --structure is not set (default: 10,000)",
    )
    graph.add_argument(
        "--num_edges",
        "--num-edges",
        type=positive,
        default=100_000,
        help="number of edges, if --structure is not set (default: 100,000)",
    )
    graph.add_argument(
        "--num_images", "--num-images", type=not_negative, help="number of unique images (default: one per node)"
    )


def _add_gpu_arguments(benchmarks: Any) -> None:
    gpu = benchmarks.add_parser(
        "gpu",
        help="measure a GPU in a few minutes, on a generated graph: steps, kernels, losses, tower store, evaluation",
    )
    add = gpu.add_argument
    add("--out", type=Path, default=Path("bench_gpu"), help="folder for the results; a part that has its result there "
        "is skipped (default: bench_gpu)")  # fmt: skip
    add("--parts", nargs="+", choices=GPU_PARTS, default=GPU_PARTS, help="parts to measure (default: all)")
    add("--device", choices=("cuda", "cpu"), default="cuda", help="device to measure (default: cuda)")
    add("--precision", choices=("bf16", "no", "fp16"), default="bf16", help="mixed precision (default: bf16)")
    add("--edges", type=positive, nargs="+", default=[64, 1024, 8192], help="edges per step (default: 64 1024 8192)")
    add("--loss_edges", "--loss-edges", type=positive, nargs="+", default=[1024, 8192, 65536],
        help="edges of the losses (default: 1024 8192 65536)")  # fmt: skip
    add("--store_nodes", "--store-nodes", type=positive, default=4096,
        help="nodes of the tower store that is built (default: 4096)")  # fmt: skip
    add("--eval_nodes", "--eval-nodes", type=positive, default=100_000,
        help="nodes of the evaluation (default: 100,000)")  # fmt: skip
    add("--folder", type=Path, help="folder that keeps the generated graph for later starts (default: a temporary one)")
    add("--small_towers", "--small-towers", action="store_true",
        help="use the small towers of the demo instead of towers with the size of ViT-B/32")  # fmt: skip


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


def _bench(args: argparse.Namespace) -> None:
    if args.what == "graph":
        from mmgraph.bench.graph import build_graph

        if args.flags:
            raise UserError(f"unknown argument {args.flags[0]} (see mmgraph bench graph --help)")
        build_graph(args.folder, args.structure, args.num_nodes, args.num_edges, args.num_images)
        return
    from mmgraph.arguments import parse_config

    if args.what == "gpu":
        from mmgraph.bench.gpu import Sizes, bench_gpu

        for flag in args.flags:
            if flag.split("=")[0].replace("-", "_") in ("__nodes", "__model_name", "__demo"):
                raise UserError(f"bench gpu: {flag} is not used, because the benchmark generates its graph and towers")
        # The last flag counts, so the user's number of workers replaces this one.
        config = parse_config([f"--num_workers={min(MAX_WORKERS, os.cpu_count() or 1)}", *args.flags])
        sizes = Sizes(args.edges, args.loss_edges, args.store_nodes, args.eval_nodes, not args.small_towers)
        bench_gpu(config, sizes, args.parts, args.out, args.folder, args.device, args.precision)
        return
    config = parse_config(args.flags)
    if args.what == "scale":
        from mmgraph.bench.scale import bench_scale

        bench_scale(config, args.processes, args.steps, args.repeats, args.json)
    elif args.what == "loss":
        from mmgraph.bench.loss import bench_loss

        bench_loss(config, args.sizes, args.repeats, args.json)
    elif args.what == "data":
        from mmgraph.bench.data import bench_data

        bench_data(config, args.tables, args.json)
    else:
        from mmgraph.bench.step import bench_step
        from mmgraph.bench.study import bench_study
        from mmgraph.cli.start import open_graph

        accelerator, graph = open_graph(config)
        if args.what == "study":
            runs = args.batch_sizes, args.seeds, args.variant, args.at_once, args.folder
            bench_study(config, graph, *runs, args.json)
            return
        bench_step(config, accelerator, graph, args.repeats, args.json)
