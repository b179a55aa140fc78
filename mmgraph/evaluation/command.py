"""Evaluates a checkpoint or feature files on held-out edges, and prints the table."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from accelerate import Accelerator

from mmgraph.checkpoints.files import has_checkpoint, load_safely
from mmgraph.config import Config
from mmgraph.data.adjacency import Adjacency, pair_keys
from mmgraph.data.node_table import NodeTable
from mmgraph.data.readers import fingerprint
from mmgraph.data.run_split import read_split
from mmgraph.data.table_cache import open_nodes
from mmgraph.data.tables import find_ids
from mmgraph.distributed.collectives import on_main_process, raise_on_all_ranks
from mmgraph.errors import UserError
from mmgraph.evaluation.evaluator import Evaluation, Table
from mmgraph.inference.feature_files import FORMATS, read_features
from mmgraph.inference.feature_origin import check_origin
from mmgraph.inference.pretrained import open_checkpoint, run_folder
from mmgraph.inference.run_edges import load_run_edges
from mmgraph.utils.files import explain_disk_errors, write_durably
from mmgraph.utils.log import log
from mmgraph.utils.text_table import text_table

MAX_RELATIONS = 20  # rows of the printed table


def find_features(sources: Sequence[Path]) -> list[Path]:
    """Return the feature files that are in ``sources``. If ``sources`` has a run or a checkpoint, the list is empty.

    Args:
        sources: files or folders.

    Raises:
        UserError: feature files are mixed with runs, checkpoints or other files.
    """
    features: list[Path] = []
    others = 0
    for source in sources:
        if source.suffix == ".json" and source.with_suffix("").suffix[1:] in FORMATS:
            continue  # the origin of a feature file, for example from the shell pattern features/*
        if source.is_dir() and not has_checkpoint(source):
            in_folder = sorted(path for path in source.glob("features_*") if path.suffix[1:] in FORMATS)
            features += in_folder
            others += not in_folder
        elif source.suffix[1:] in FORMATS and not _is_checkpoint(source):
            features.append(source)
        else:
            others += 1
    if features and others:
        raise UserError(
            "cannot mix feature files with other sources; give one run or checkpoint, or only feature files"
        )
    return features


def _common_run(files: Sequence[Path]) -> Path | None:
    """Return the folder of the run that checkpoint or feature files belong to; None for files outside of a run.

    Raises:
        UserError: the files belong to runs that have held out different edges.
    """
    folders = [folder for folder in map(run_folder, files) if folder is not None]
    splits = [(folder, split) for folder, split in ((folder, read_split(folder)) for folder in folders) if split]
    for folder, split in splits[1:]:
        if split.held_out_fingerprint != splits[0][1].held_out_fingerprint:
            raise UserError(f"{splits[0][0]} and {folder} have held out different edges; evaluate them one at a time")
    return folders[0] if folders else None


def _is_checkpoint(path: Path) -> bool:
    """Return whether a ``.pt`` file holds a dict, as a checkpoint does. A feature file holds one tensor.

    A file that cannot be loaded counts as a checkpoint unless its name starts with ``features_``.
    """
    if path.suffix != ".pt" or not path.is_file():
        return False
    try:
        return isinstance(load_safely(path, mmap=True), dict)
    except Exception:  # the file is read again later, and that call reports the error
        return not path.name.startswith("features_")


def evaluate(
    checkpoint: Path | None,
    features: Sequence[Path],
    config: Config,
    accelerator: Accelerator,
    path: Path | None,
    eval_edges: str | None = None,
) -> None:
    """Rank held-out edges by a checkpoint's embeddings or by feature files. All processes must call this function.

    Only the main process prints the table.

    Args:
        checkpoint: an epoch or final file, written by mmgraph or the original trainer; None to rank by ``features``.
        features: feature files, in any of :data:`mmgraph.inference.feature_files.FORMATS`. They are ignored if
            ``checkpoint`` is not None.
        config: settings that name the graph and the edges to rank.
        path: JSON file to write the table to; None writes no file.
        eval_edges: table of other edges to rank than the run's, if the user named one.

    Raises:
        UserError: there are no edges to rank, or a file does not fit the graph.
    """
    if not config.evaluates:
        raise UserError(
            "no edges to rank: set --eval_edges to an edge table, or --eval_fraction to its value in the run"
        )
    digest = raise_on_all_ranks(accelerator, lambda: fingerprint(config.nodes))
    nodes = raise_on_all_ranks(accelerator, lambda: open_nodes(config.nodes, digest))
    folder = raise_on_all_ranks(accelerator, lambda: _common_run([checkpoint] if checkpoint else features))
    edges = raise_on_all_ranks(accelerator, lambda: load_run_edges(folder, config, nodes, digest, eval_edges))
    if edges.note:
        log(edges.note)
    if edges.held_out is None:
        raise UserError(f"{folder}: the run held out no edges; rank other edges with --eval_edges")
    trained, known = (
        None if rows is None else Adjacency(torch.from_numpy(pair_keys(rows, len(nodes))), len(nodes))
        for rows in (edges.trained, edges.known)
    )
    trained = trained or Adjacency(torch.empty(0, dtype=torch.int64), len(nodes))
    evaluation = Evaluation(accelerator, trained, edges.held_out, config.seed, known)
    if checkpoint is not None:
        inference = open_checkpoint(checkpoint, config, accelerator)
        table = evaluation.evaluate(inference.module.embeddings, inference.outputs)
    else:
        ranks = {}
        names = [file.stem.removeprefix("features_") for file in features]
        for name, file in zip(names, features, strict=True):
            vectors = raise_on_all_ranks(accelerator, partial(_features_of, file, nodes, digest, config.nodes))
            unique = names.count(name) == 1 and name != "random"
            ranks[name if unique else str(file)] = evaluation.ranks(vectors)
        table = evaluation.table({**ranks, "random": evaluation.random_ranks()})
    on_main_process(accelerator, lambda: _print_table(table, path))


def _features_of(path: Path, nodes: NodeTable, nodes_fingerprint: str, nodes_path: str) -> torch.Tensor:
    """Return a file's vectors, (N, d), in the order of the node table."""
    vectors, ids = read_features(path)
    count = len(nodes)
    if len(vectors) != count:
        raise UserError(
            f"{path} has {len(vectors):,} vectors, but {nodes_path} has {count:,} nodes; give files of the same graph"
        )
    if ids is None:
        check_origin(path, nodes, nodes_fingerprint, nodes_path)
        return vectors
    with nodes.column("node_id") as column:
        rows = find_ids(pa.chunked_array([pa.array(ids, pa.large_string())]), column.cast(pa.large_string()))
    if (rows < 0).any():
        raise UserError(
            f"{path} has no vector for node '{nodes.ids([int(rows.argmin())])[0]}'; give files of the same graph"
        )
    return vectors[torch.from_numpy(rows)]


def _print_table(table: Table, path: Path | None) -> None:
    log(f"{table['edges']:,} held-out edges; both ends of each are ranked among {table['nodes']:,} nodes")
    header = ("", "MRR", "Hits@1", "Hits@3", "Hits@10", "100 sampled: MRR", "Hits@10")
    rows = [
        (name, *_digits(values.values()), *_digits([table["sampled"][name][key] for key in ("mrr", "hits@10")]))
        for name, values in table["embeddings"].items()
    ]
    for line in text_table([header, *rows], "<" + ">" * (len(header) - 1)):
        log(line)
    for key, note in (("retrieval", ""), ("retrieval_shuffled", ", shuffled between nodes")):
        if values := table.get(key):
            log(
                f"retrieval of the image that each text was fused with, among {values['images']:,} images{note}: "
                f"R@1 {values['r@1']:.4f}, R@10 {values['r@10']:.4f}"
            )
    if table["relations"]:
        by_size = sorted(table["relations"].items(), key=lambda item: -item[1]["edges"])
        columns = list(by_size[0][1])
        shown = [
            (name, f"{v['edges']:,}", *_digits([v[c] for c in columns[1:]])) for name, v in by_size[:MAX_RELATIONS]
        ]
        for line in text_table([("MRR by relation", *columns), *shown], "<" + ">" * len(columns)):
            log(line)
        if len(by_size) > MAX_RELATIONS:
            log(f"and {len(by_size) - MAX_RELATIONS:,} more relations with fewer edges (--json writes all relations)")
    if path is not None:
        content = json.dumps(table, indent=1) + "\n"
        with explain_disk_errors(path, "set --json to a file in an existing folder with free disk space"):
            write_durably(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))
        log(f"wrote the table to {path}")


def _digits(values: Any) -> list[str]:
    return [f"{value:.4f}" for value in values]
