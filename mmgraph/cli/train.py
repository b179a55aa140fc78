"""``launch.py``: train."""


def run_training(arguments: list[str]) -> int:
    """Train. Returns the exit code."""
    from mmgraph.distributed.signals import follow_launcher
    from mmgraph.flags import parse_config

    follow_launcher()
    config = parse_config(arguments)

    from mmgraph.cli.start import open_graph
    from mmgraph.training.preflight import check_run
    from mmgraph.training.trainer import Trainer
    from mmgraph.utils.log import log

    accelerator, graph = open_graph(config)
    check_run(config, accelerator, graph)
    if config.check:
        log(f"checked: {len(graph.nodes):,} nodes, {len(graph.rows):,} edges; nothing was trained")
        return 0
    code = Trainer(config, accelerator, graph).run()
    accelerator.end_training()  # not after an error: leaving the group may wait for a rank that is gone
    return code
