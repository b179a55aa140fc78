"""Makes the page: of runs' folders, and at the end of a run."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mmgraph.checkpoints.files import final_file
from mmgraph.config import Config
from mmgraph.data.graph import Graph
from mmgraph.distributed.collectives import broadcast_from_main_process, on_main_process, raise_on_all_ranks
from mmgraph.errors import UserError
from mmgraph.inference.embeddings import NodeVectors, embed_all_nodes, normalize_rows
from mmgraph.inference.neighbor_search import Links, Query, embeddings_folder, load_links, resolve_query
from mmgraph.inference.node_outputs import NodeOutputs
from mmgraph.inference.node_sharding import embed_shard, gather_on_main_process
from mmgraph.inference.pretrained import Inference, last_checkpoint, open_checkpoint, settings_of
from mmgraph.models.multimodal_graph_encoder import TrainedModule
from mmgraph.report.figures import Figures, figures
from mmgraph.report.history import Run, read_run, read_runs
from mmgraph.report.nodes import MAP_NODES, Asked, NodesOfRun, show_nodes
from mmgraph.report.page import Shown, write_page
from mmgraph.utils.files import explain_disk_errors
from mmgraph.utils.log import log

KIND = "z_graph"
FILE = "report.html"


def report(
    folders: Sequence[Path], output: Path, given: Mapping[str, Any], accelerator: Accelerator, queries: Sequence[Query]
) -> None:
    """Write one page of some runs. Called by all ranks, which embed the nodes together.

    Args:
        folders: of the runs, ended or not; where the nodes of one cannot be embedded, the page says why.
        output: the HTML file.
        given: settings other than the runs'.
        queries: nodes for the gallery.

    Raises:
        UserError: a folder that is no run's; a query that finds nothing; the file cannot be written.
    """
    runs = raise_on_all_ranks(accelerator, lambda: read_runs(folders))
    target = raise_on_all_ranks(accelerator, lambda: _writable(output))
    shown = [_shown(run, given, accelerator, queries, MAP_NODES // len(runs)) for run in runs]

    def write() -> None:
        with explain_disk_errors(target.parent, "make room, or give --output"):
            write_page(target, shown)
        log(f"report: {output} ({target.stat().st_size / 1e6:.1f} MB)")

    on_main_process(accelerator, write)


def _writable(output: Path) -> Path:
    """The file itself, where the path is a link. Raises :class:`UserError` where no page can be put there."""
    target = output.resolve()
    if target.exists() and not target.is_file():
        raise UserError(f"--output {output}: is no regular file; give the name of one")
    if not target.parent.is_dir():
        raise UserError(f"--output {output}: there is no folder {target.parent}")
    if not os.access(target.parent, os.W_OK):
        raise UserError(f"--output {output}: {target.parent} cannot be written to; give another")
    return target


def _shown(run: Run, given: Mapping[str, Any], accelerator: Accelerator, queries: Sequence[Query], most: int) -> Shown:
    """A run with what is shown of its nodes, or why nothing is; on the main process."""
    try:
        checkpoint = broadcast_from_main_process(accelerator, lambda: last_checkpoint(run.folder))
        config = settings_of(checkpoint, dict(given))
        inference = open_checkpoint(checkpoint, config, accelerator)
        asked = raise_on_all_ranks(accelerator, lambda: [_asked(query, inference) for query in queries])
        found = embed_all_nodes(inference, config, accelerator, KIND, embeddings_folder(checkpoint))
    except UserError as error:
        if queries:
            raise
        log(f"{run.folder}: no map and no nearest nodes: {error}")
        return Shown(run, None, str(error))
    of_run = NodesOfRun(inference.nodes, inference.images, found, config.truncated_images, config.seed, checkpoint.name)

    def show() -> Shown:
        return Shown(run, show_nodes(of_run, asked, lambda rows: load_links(rows, inference, config), most), "")

    return raise_on_all_ranks(accelerator, show if accelerator.is_main_process else lambda: Shown(run, None, ""))


def _asked(query: Query, inference: Inference) -> Asked:
    wanted = resolve_query(query, inference, KIND)
    return Asked(wanted) if isinstance(wanted, int) else Asked(None, str(query), query.image, wanted)


def end_of_run(
    config: Config, accelerator: Accelerator, graph: Graph, module: TrainedModule, outputs: NodeOutputs
) -> Figures | None:
    """Write ``report.html`` into a run's folder.

    Called by all ranks, which embed the nodes together; then the main process works alone, and none waits for it.

    Args:
        module: what was trained, whole and in float32, on the device.
        outputs: of the graph's nodes.

    Returns:
        What trackers are to show of it; None on other ranks.
    """
    output = config.output_folder
    own = raise_on_all_ranks(accelerator, lambda: embed_shard(accelerator, module.embeddings, outputs, (KIND,)))
    vectors, image_status = (
        gather_on_main_process(accelerator, own[name], len(graph.nodes)) for name in (KIND, "image_status")
    )
    if not accelerator.is_main_process:
        return None
    run, name = read_run(output), final_file(output).name
    try:
        found = NodeVectors(normalize_rows(vectors), image_status.numpy())
        of_run = NodesOfRun(graph.nodes, graph.images, found, config.truncated_images, config.seed, name)
        shown = Shown(run, show_nodes(of_run, [], lambda rows: Links(rows, graph.rows, graph.held_out)), "")
    except UserError as error:  # embeddings that are not finite
        shown = Shown(run, None, str(error))
    write_page(output / FILE, [shown])
    log(f"report: {output / FILE}")
    return figures(shown)
