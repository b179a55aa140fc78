"""Writes report pages from the folders of runs, or at the end of a training run."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mmgraph.checkpoints.files import final_file
from mmgraph.checkpoints.newest import last_checkpoint
from mmgraph.config import Config
from mmgraph.data.graph import Graph
from mmgraph.distributed.collectives import broadcast_from_main_process, on_main_process, raise_on_all_ranks
from mmgraph.errors import UserError
from mmgraph.inference.embeddings import NodeVectors, embed_all_nodes, normalize_rows
from mmgraph.inference.neighbor_search import Links, Query, embeddings_folder, load_links, resolve_query
from mmgraph.inference.node_outputs import NodeOutputs
from mmgraph.inference.node_sharding import embed_shard, gather_on_main_process
from mmgraph.inference.pretrained import Inference, load_run_config, open_checkpoint
from mmgraph.models.multimodal_graph_encoder import TrainedModule
from mmgraph.report.figures import Figures, figures
from mmgraph.report.history import Run, read_run, read_runs
from mmgraph.report.nodes import MAP_NODES, GalleryQuery, NodesOfRun, show_nodes
from mmgraph.report.page import Shown, write_page
from mmgraph.utils.files import explain_disk_errors
from mmgraph.utils.log import log

EMBEDDING = "z_graph"  # the embedding that the map and the nearest nodes are computed from
FILE = "report.html"


def report(
    folders: Sequence[Path],
    output: Path,
    overrides: Mapping[str, Any],
    accelerator: Accelerator,
    queries: Sequence[Query],
) -> None:
    """Write one page about several runs. All ranks must call this function, because each embeds a part of the nodes.

    Args:
        folders: folders of finished or unfinished runs. If the nodes of a run cannot be embedded, the page gives the
            reason.
        output: the HTML file.
        overrides: settings that replace the settings of the runs.
        accelerator: the Accelerator of this launch.
        queries: nodes to show at the start of the gallery.

    Raises:
        UserError: a folder is not a run's folder, ``output`` is not a usable path, a query cannot be resolved, or there
            are queries and the nodes of a run cannot be embedded.
        RunError: the file cannot be written.
    """
    runs = raise_on_all_ranks(accelerator, lambda: read_runs(folders))
    target = raise_on_all_ranks(accelerator, lambda: _writable(output))
    shown = [_shown(run, overrides, accelerator, queries, MAP_NODES // len(runs)) for run in runs]

    def write() -> None:
        with explain_disk_errors(target.parent, "free some disk space, or set --output to a file on another disk"):
            write_page(target, shown)
        log(f"report: {output} ({target.stat().st_size / 1e6:.1f} MB)")

    on_main_process(accelerator, write)


def _writable(output: Path) -> Path:
    """Return ``output`` with links resolved. Raises :class:`UserError` if a page cannot be written there."""
    target = output.resolve()
    if target.exists() and not target.is_file():
        raise UserError(f"--output {output}: not a regular file; choose another path")
    if not target.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {target.parent}; create it or choose another path")
    if not os.access(target.parent, os.W_OK):
        raise UserError(f"--output {output}: no permission to write to {target.parent}; choose another path")
    return target


def _shown(
    run: Run, overrides: Mapping[str, Any], accelerator: Accelerator, queries: Sequence[Query], max_nodes: int
) -> Shown:
    """Prepare a run for the page. The result has the run's nodes, or the reason why the nodes cannot be shown.

    All ranks must call this function. Only the main process gets the nodes.
    """
    try:
        checkpoint = broadcast_from_main_process(accelerator, lambda: last_checkpoint(run.folder))
        config = load_run_config(checkpoint, dict(overrides))
        inference = open_checkpoint(checkpoint, config, accelerator)
        resolved = raise_on_all_ranks(accelerator, lambda: [_resolve(query, inference) for query in queries])
        vectors = embed_all_nodes(inference, config, accelerator, EMBEDDING, embeddings_folder(checkpoint))
    except UserError as error:
        if queries:
            raise
        log(f"{run.folder}: the report has no map and no nearest nodes, because the nodes cannot be embedded: {error}")
        return Shown(run, None, str(error))
    run_nodes = NodesOfRun(
        inference.nodes, inference.images, vectors, inference.outputs.inputs.rules, config.seed, checkpoint.name
    )

    def links_of(rows: Sequence[int]) -> Links | None:
        return load_links(rows, inference, config, run.folder)

    def show() -> Shown:
        return Shown(run, show_nodes(run_nodes, resolved, links_of, max_nodes), "")

    return raise_on_all_ranks(accelerator, show if accelerator.is_main_process else lambda: Shown(run, None, ""))


def _resolve(query: Query, inference: Inference) -> GalleryQuery:
    target = resolve_query(query, inference, EMBEDDING)
    return GalleryQuery(target) if isinstance(target, int) else GalleryQuery(None, str(query), query.image, target)


def end_of_run(
    config: Config, accelerator: Accelerator, graph: Graph, module: TrainedModule, outputs: NodeOutputs
) -> Figures | None:
    """Write ``report.html`` into a run's folder.

    All ranks must call this function, because each embeds a part of the nodes. Then the main process writes the page.
    The other ranks do not wait for the page.

    Args:
        config: settings of the run.
        accelerator: the run's Accelerator.
        graph: the run's graph.
        module: the trained module with all parameters, in float32, on this rank's device.
        outputs: tower outputs of the graph's nodes.

    Returns:
        On the main process, the figures for trackers; on the other ranks, None.
    """
    output = config.output_folder
    shard = raise_on_all_ranks(accelerator, lambda: embed_shard(accelerator, module.embeddings, outputs, (EMBEDDING,)))
    vectors, image_status = (
        gather_on_main_process(accelerator, shard[name], len(graph.nodes)) for name in (EMBEDDING, "image_status")
    )
    if not accelerator.is_main_process:
        return None
    run, name = read_run(output), final_file(output).name
    try:
        node_vectors = NodeVectors(normalize_rows(vectors), image_status.numpy())
        run_nodes = NodesOfRun(graph.nodes, graph.images, node_vectors, outputs.inputs.rules, config.seed, name)
        shown = Shown(run, show_nodes(run_nodes, [], lambda rows: Links(rows, graph.rows, graph.held_out)), "")
    except UserError as error:  # an embedding is not finite
        shown = Shown(run, None, str(error))
    write_page(output / FILE, [shown])
    log(f"report: {output / FILE}")
    return figures(shown)
