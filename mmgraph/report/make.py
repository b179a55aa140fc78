"""Makes the page: of runs' folders, and at the end of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from accelerate import Accelerator

from mmgraph import checkpoints
from mmgraph.config import Config
from mmgraph.errors import UserError
from mmgraph.files import told_of_disk
from mmgraph.graph import Graph
from mmgraph.inference import Inference, open_checkpoint, settings_of
from mmgraph.metrics import Figures
from mmgraph.models.multimodal_graph_encoder import TrainedModule
from mmgraph.nearest import Links, Query, asked_for, kept_in, links_of
from mmgraph.node_outputs import NodeOutputs
from mmgraph.node_vectors import NodeVectors, node_vectors, unit
from mmgraph.report.figures import figures
from mmgraph.report.history import Run, read_run, read_runs
from mmgraph.report.nodes import MAP_NODES, Asked, NodesOfRun, show_nodes
from mmgraph.report.page import Shown, write_page
from mmgraph.shares import embed_share, gather_shares
from mmgraph.text_log import log
from mmgraph.world import on_main_process, together

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
    together(accelerator, lambda: _check_output(output))
    runs = together(accelerator, lambda: read_runs(folders))
    shown = [_shown(run, given, accelerator, queries, MAP_NODES // len(runs)) for run in runs]

    def write() -> None:
        with told_of_disk(output.parent, "make room, or give --output"):
            write_page(output, shown)
        log(f"report: {output} ({output.stat().st_size / 1e6:.1f} MB)")

    on_main_process(accelerator, write)


def _check_output(output: Path) -> None:
    if output.is_dir():
        raise UserError(f"--output {output}: is a folder; give a file")
    if not output.absolute().parent.is_dir():
        raise UserError(f"--output {output}: no such folder as {output.parent}")


def _shown(run: Run, given: Mapping[str, Any], accelerator: Accelerator, queries: Sequence[Query], most: int) -> Shown:
    try:
        checkpoint = last_checkpoint(run.folder)
        config = settings_of(checkpoint, dict(given))
        inference = open_checkpoint(checkpoint, config, accelerator)
    except UserError as error:
        if queries:
            raise
        log(f"{run.folder}: no map and no nearest nodes: {error}")
        return Shown(run, None, str(error))
    asked = together(accelerator, lambda: [_asked(query, inference) for query in queries])
    found = node_vectors(inference, config, accelerator, KIND, kept_in(checkpoint))
    of_run = NodesOfRun(inference.nodes, inference.paths, found, config.truncated_images, config.seed, checkpoint.name)
    shown: list[Shown] = []

    def show() -> None:
        shown.append(Shown(run, show_nodes(of_run, asked, lambda rows: links_of(rows, inference, config), most), ""))

    on_main_process(accelerator, show)
    return shown[0] if shown else Shown(run, None, "")


def last_checkpoint(folder: Path) -> Path:
    """The final file of a run, else that of its last epoch. Raises :class:`UserError` where there is none."""
    final, epochs = checkpoints.final_file(folder), checkpoints.epoch_files(folder)
    if not final.is_file() and not epochs:
        raise UserError("it has written no checkpoint yet")
    return final if final.is_file() else epochs[-1]


def _asked(query: Query, inference: Inference) -> Asked:
    wanted = asked_for(query, inference, KIND)
    return Asked(wanted) if isinstance(wanted, int) else Asked(None, str(query), query.image, wanted)


def end_of_run(
    config: Config, accelerator: Accelerator, graph: Graph, module: TrainedModule, outputs: NodeOutputs
) -> Figures | None:
    """Write ``report.html`` into a run's folder; a failure to is a line, and ends nothing.

    Called by all ranks, which embed the nodes together; then the main process works alone, and none waits for it.

    Args:
        module: what was trained, whole and in float32, on the device.
        outputs: of the graph's nodes.

    Returns:
        What trackers are to show of it; None on other ranks, and where there is no page.
    """
    own = embed_share(accelerator, module.embeddings, outputs, (KIND,))
    vectors, causes = (gather_shares(accelerator, own[name], len(graph.nodes)) for name in (KIND, "causes"))
    if not accelerator.is_main_process:
        return None
    output = config.output_folder
    try:
        found = NodeVectors(unit(vectors), causes.cpu().numpy())
        name = checkpoints.final_file(output).name
        of_run = NodesOfRun(graph.nodes, graph.paths, found, config.truncated_images, config.seed, name)
        nodes = show_nodes(of_run, [], lambda rows: Links(rows, graph.rows, graph.held_out))
        shown = Shown(read_run(output), nodes, "")
        write_page(output / FILE, [shown])
        log(f"report: {output / FILE}")
        return figures(shown)
    except Exception as error:  # the run is done, whatever this is
        reason = " ".join(str(error).split())
        log(f"no report ({type(error).__name__}: {reason}); mmgraph report {output} makes one")
        return None
