"""The command line of ``launch.py``."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mmgraph.training.trainer import Run


def run_training(arguments: list[str]) -> int:
    """Train a model and return the exit code."""
    from mmgraph.arguments import parse_config
    from mmgraph.distributed.signals import follow_launcher

    follow_launcher()
    config = parse_config(arguments)

    from mmgraph.cli.start import open_graph
    from mmgraph.training.build import build_run
    from mmgraph.training.preflight import check_run
    from mmgraph.utils.log import log

    accelerator, graph = open_graph(config)
    check_run(config, accelerator, graph)
    if config.check:
        log(f"check passed: {len(graph.nodes):,} nodes, {len(graph.rows):,} edges; nothing was trained")
        return 0
    run = build_run(config, accelerator, graph)
    code = run.train(at_end=write_report if config.report else None)
    accelerator.end_training()  # not called after an error, because it may wait for a dead rank
    return code


def write_report(run: "Run") -> None:
    """Write ``report.html`` at the end of a run and send its figures to the trackers. Called by all ranks.

    The run is already saved, so an error of the report is only logged.
    """
    from mmgraph.distributed.collectives import raise_on_all_ranks
    from mmgraph.utils.error_text import describe_error
    from mmgraph.utils.log import log

    nodes, edges_seen = len(run.graph.nodes), run.progress.step * run.config.global_batch_size
    hint = f"to write one, run mmgraph report {run.config.output_folder}"
    if run.evaluation is None and 2 * edges_seen < nodes:
        log(f"no report: the run was too short to see each node once; {hint} (this embeds all nodes)")
        return
    log(f"report: embedding {nodes:,} nodes; Ctrl-C skips the report")
    try:
        with run.signals.interruptible():
            make = raise_on_all_ranks(run.accelerator, _import_report)
            module = run.checkpointer.full_module()
            figures = make.end_of_run(run.config, run.accelerator, run.graph, module, run.outputs)
            if figures is not None:
                page = run.config.output_folder / make.FILE
                run.run_log.trackers.show(run.progress.step, figures.pictures, figures.tables, page)
    except Exception as error:
        log(f"no report ({describe_error(error)}); {hint}")
    except KeyboardInterrupt:
        log(f"no report (interrupted); {hint}")


def _import_report():  # type: ignore[no-untyped-def]  # a module
    from mmgraph.report import make  # imported late: the import of scikit-learn and Bokeh takes seconds

    return make
