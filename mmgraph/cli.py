"""The command lines: ``launch.py`` trains, ``mmgraph VERB`` does the rest. Errors become one line here."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mmgraph.errors import UserError
from mmgraph.log import is_main_process

WRONG_USAGE = 2


def train_main(arguments: Sequence[str] | None = None) -> int:
    """Train. Returns the exit code: 0, 2 for wrong usage or bad input, 143 for a run that was stopped."""
    return _run(lambda: _train(list(sys.argv[1:] if arguments is None else arguments)))


def main(arguments: Sequence[str] | None = None) -> int:
    """``mmgraph VERB``: demo, encode, convert."""
    return _run(lambda: _verb(list(sys.argv[1:] if arguments is None else arguments)))


def _train(arguments: list[str]) -> int:
    from mmgraph.config import parse_config

    config = parse_config(arguments)

    from mmgraph.demo import build_demo
    from mmgraph.graph import load_graph
    from mmgraph.log import log
    from mmgraph.trainer import Trainer
    from mmgraph.world import build_accelerator, check_batch_size, describe, on_main_process, together

    accelerator = build_accelerator()
    if config.demo:
        on_main_process(accelerator, lambda: build_demo(Path(config.nodes).parent))
    graph = together(accelerator, lambda: load_graph(config))
    check_batch_size(config.global_batch_size, len(graph.rows), accelerator.num_processes)
    log(describe(accelerator, config.global_batch_size))
    if config.check:
        log(f"checked: {len(graph.nodes):,} nodes, {len(graph.rows):,} edges; nothing was trained")
        return 0
    try:
        return Trainer(config, accelerator, graph).run()
    finally:
        accelerator.end_training()


def _run(action: Callable[[], int]) -> int:
    """Call ``action``; what a user can cause ends in one line, from the main process alone."""
    try:
        return action()
    except UserError as error:
        if is_main_process():
            print(f"mmgraph: error: {error}", file=sys.stderr)
        return WRONG_USAGE
    except KeyboardInterrupt:
        return 130
