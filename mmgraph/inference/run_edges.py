"""The edges of a run for the verbs: those that it trained on, and those that it held out, from the run's own split."""

from pathlib import Path
from typing import Any, NamedTuple

from mmgraph.checkpoints.resume_state import read_identity
from mmgraph.config import Config
from mmgraph.data.edge_table import EdgeTable, RemainingEdges
from mmgraph.data.graph import load_edges
from mmgraph.data.node_table import NodeTable
from mmgraph.data.readers import fingerprint
from mmgraph.data.run_split import HELD_OUT, RunSplit, read_split
from mmgraph.data.split import HeldOut, read_held_out
from mmgraph.data.table_cache import open_edges
from mmgraph.errors import UserError
from mmgraph.inference.pretrained import read_settings
from mmgraph.utils.log import log


class RunEdges(NamedTuple):
    """Edges of a graph, as pairs of node rows."""

    trained: EdgeTable | RemainingEdges | None  # the training edges; None: not known which edges these are
    held_out: HeldOut | None  # the edges to rank; None: there are none
    # All edges of the edge table, if all are known and therefore no candidates in a ranking. None: the others are.
    known: EdgeTable | None = None
    note: str = ""  # warning about the edges to rank


def load_run_edges(
    folder: Path | None, config: Config, nodes: NodeTable, nodes_fingerprint: str, eval_edges: str | None = None
) -> RunEdges:
    """Load the edges that a run trained on, and the edges to rank.

    The edges to rank are those that the run held out, also if the edge table has changed since. Then it is not known
    which of the table's edges the run trained on, and all of them count as known.

    Args:
        folder: folder of the run; None: there is no run, so the settings alone define the split.
        config: the run's settings, with the settings of the verb. If its edge table is another one than the run's, the
            settings define a split of that table.
        nodes: the node table.
        nodes_fingerprint: fingerprint of the node table.
        eval_edges: table of other edges to rank, if the user named one.

    Raises:
        UserError: as :func:`mmgraph.data.graph.load_edges`. Also if the settings draw a split of the run's edge table
            that is not the run's, or if a table has changed and the run has no split of its own.
    """
    split = None if folder is None else read_split(folder)
    if folder is None or split is None:
        if folder is not None and config.eval_fraction:
            _check_same_tables(folder, config, nodes_fingerprint)
        edges = load_edges(config, nodes, nodes_fingerprint)
        return RunEdges(edges.rows, edges.held_out)
    digest = fingerprint(config.edges)
    own = Path(str((read_settings(folder) or {}).get("edges")))
    if digest != split.edges_fingerprint and own.resolve() != Path(config.edges).resolve():
        edges = load_edges(config, nodes, nodes_fingerprint)
        note = (
            f"warning: {config.edges} is not the run's edge table; the run may have been trained on some of its edges"
        )
        return RunEdges(edges.rows, edges.held_out, note=note)
    return _edges_of_own_table(split, config, nodes, nodes_fingerprint, digest, eval_edges)


def _edges_of_own_table(
    split: RunSplit, config: Config, nodes: NodeTable, nodes_fingerprint: str, digest: str, eval_edges: str | None
) -> RunEdges:
    if config.eval_fraction and (config.eval_fraction, config.seed) != (split.eval_fraction, split.seed):
        raise UserError(
            f"--eval_fraction {config.eval_fraction:g} with --seed {config.seed} draws other edges than the run held "
            f"out (--eval_fraction {split.eval_fraction:g}, --seed {split.seed}), and the run was trained on them; "
            "leave out both flags, or rank other edges with --eval_edges"
        )
    table = open_edges(config.edges, digest, nodes, nodes_fingerprint)
    is_same = digest == split.edges_fingerprint
    trained = split.training_edges_of(table) if is_same else None
    if eval_edges is not None:
        note = "" if is_same else f"warning: {config.edges} has changed since the training; leaks cannot be counted"
        return RunEdges(trained, read_held_out(eval_edges, nodes, nodes_fingerprint), table.rows, note)
    changed = [] if is_same else [f"{config.edges} has changed since the training, so all its edges count as known"]
    ranked = config.eval_edges
    if ranked and Path(ranked).is_file() and fingerprint(ranked) != split.held_out_fingerprint:
        changed.append(f"{ranked} has changed since the training (--eval_edges ranks its edges)")
    note = f"warning: {'; '.join(changed)}; the edges to rank are those in {split.folder / HELD_OUT}" if changed else ""
    return RunEdges(trained, split.held_out(nodes), None if is_same else table.rows, note)


def _check_same_tables(folder: Path, config: Config, nodes_fingerprint: str) -> None:
    """Check that a run without a split of its own would draw the split that it was trained with.

    Raises:
        UserError: a table has changed since the run was trained.
    """
    identity: dict[str, Any] = read_identity(folder / "state")
    for name, path, digest in (
        ("nodes table", config.nodes, nodes_fingerprint),
        ("edges table", config.edges, fingerprint(config.edges)),
    ):
        if name not in identity:
            log(f"warning: {folder} has no resume state, so it is not known whether {path} has changed since the run")
        elif identity[name] != digest:
            raise UserError(
                f"{path} has changed since the run in {folder} was trained, and the run has no split/ because an older "
                "version trained it; so it is not known which edges it held out. Restore the table, or rank other "
                "edges with --eval_edges"
            )
