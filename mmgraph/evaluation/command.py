"""The table of held-out edges for any checkpoint, or any files of features."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from accelerate import Accelerator

from mmgraph.checkpoints.files import final_file, load_safely
from mmgraph.config import Config
from mmgraph.data.adjacency import Adjacency, pair_keys
from mmgraph.data.graph import Graph, load_graph
from mmgraph.data.tables import find_ids
from mmgraph.distributed.collectives import on_main_process, raise_on_all_ranks
from mmgraph.errors import UserError
from mmgraph.evaluation.evaluator import Evaluation, Table
from mmgraph.inference.feature_files import FORMATS, read_features
from mmgraph.inference.pretrained import open_checkpoint
from mmgraph.utils.files import explain_disk_errors, write_durably
from mmgraph.utils.log import log
from mmgraph.utils.text_table import text_table

MAX_RELATIONS = 20  # in the printed table


def find_features(sources: Sequence[Path]) -> list[Path]:
    """The files of features that are meant: themselves, or those in a folder; none where a checkpoint is.

    Raises:
        UserError: checkpoints and features are mixed.
    """
    found: list[Path] = []
    others = 0
    for source in sources:
        if source.is_dir() and not final_file(source).is_file():
            in_folder = sorted(path for path in source.glob("features_*") if path.suffix[1:] in FORMATS)
            found += in_folder
            others += not in_folder
        elif source.suffix[1:] in FORMATS and not _is_checkpoint(source):
            found.append(source)
        else:
            others += 1
    if found and others:
        raise UserError("give one run or checkpoint, or files of features")
    return found


def _is_checkpoint(path: Path) -> bool:
    """Whether a file is named as one of the original's checkpoints, or holds several tensors; features are one."""
    if path.suffix != ".pt" or not path.is_file():
        return False
    try:
        return isinstance(load_safely(path, mmap=True), dict)
    except Exception:  # as whichever reads it will say
        return not path.name.startswith("features_")


def evaluate(
    checkpoint: Path | None, features: Sequence[Path], config: Config, accelerator: Accelerator, path: Path | None
) -> None:
    """Rank held-out edges by a checkpoint's embeddings, or by features, and print the table. Called by all ranks.

    Args:
        checkpoint: an epoch or final file, of mmgraph or the original; or
        features: files of any of :data:`mmgraph.inference.feature_files.FORMATS`.
        config: names the graph, and the edges to rank.
        path: JSON to write the table to.

    Raises:
        UserError: no edges to evaluate on, or files that do not fit the graph.
    """
    if not config.evaluates:
        raise UserError("which edges? give --eval_edges FILE, or --eval_fraction as the run had it")
    graph = raise_on_all_ranks(accelerator, lambda: load_graph(config))
    assert graph.held_out is not None
    trained = Adjacency(torch.from_numpy(pair_keys(graph.rows, len(graph.nodes))), len(graph.nodes))
    evaluation = Evaluation(accelerator, trained, graph.held_out, config.seed)
    if checkpoint is not None:
        inference = open_checkpoint(checkpoint, config, accelerator)
        table = evaluation.evaluate(inference.module.embeddings, inference.outputs)
    else:
        ranks = {}
        names = [file.stem.removeprefix("features_") for file in features]
        for name, file in zip(names, features, strict=True):
            vectors = raise_on_all_ranks(accelerator, partial(_features_of, file, graph, config.nodes))
            alone = names.count(name) == 1 and name != "random"
            ranks[name if alone else str(file)] = evaluation.ranks(vectors)
        table = evaluation.table({**ranks, "random": evaluation.random_ranks()})
    on_main_process(accelerator, lambda: _tell(table, path))


def _features_of(path: Path, graph: Graph, nodes_path: str) -> torch.Tensor:
    """A file's vectors in the order of the nodes."""
    vectors, ids = read_features(path)
    count = len(graph.nodes)
    if len(vectors) != count:
        raise UserError(f"{path} has {len(vectors):,} vectors, and {nodes_path} has {count:,} nodes")
    if ids is None:
        return vectors
    with graph.nodes.column("node_id") as column:
        rows = find_ids(pa.chunked_array([pa.array(ids, pa.large_string())]), column.cast(pa.large_string()))
    if (rows < 0).any():
        raise UserError(f"{path} has no vector of node '{graph.nodes.ids([int(rows.argmin())])[0]}'")
    return vectors[torch.from_numpy(rows)]


def _tell(table: Table, path: Path | None) -> None:
    log(f"{table['edges']:,} held-out edges, each asked in both directions, among {table['nodes']:,} nodes")
    header = ("", "MRR", "Hits@1", "Hits@3", "Hits@10", "of 100 sampled: MRR", "Hits@10")
    rows = [
        (name, *_digits(values.values()), *_digits([table["sampled"][name][key] for key in ("mrr", "hits@10")]))
        for name, values in table["embeddings"].items()
    ]
    for line in text_table([header, *rows], "<" + ">" * (len(header) - 1)):
        log(line)
    for key, what in (("retrieval", ""), ("retrieval_shuffled", ", each that of another node")):
        if values := table.get(key):
            log(
                f"a text finds the image that it was fused with, among {values['images']:,}{what}: "
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
            log(f"and {len(by_size) - MAX_RELATIONS:,} relations of fewer edges (--json has all)")
    if path is not None:
        content = json.dumps(table, indent=1) + "\n"
        with explain_disk_errors(path, "give --json a file in a folder that exists and has room"):
            write_durably(path, lambda temporary: temporary.write_text(content, encoding="utf-8"))
        log(f"written: {path}")


def _digits(values: Any) -> list[str]:
    return [f"{value:.4f}" for value in values]
