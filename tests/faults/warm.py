"""A process that has imported everything, and forks: a run that costs a second to start, not ten.

Reads a JSON object a line: ``arguments`` of launch.py, ``ranks``, ``environment``, ``faults`` as [name, settings] pairs
of functions in :mod:`injection`, ``output`` (a path for what each rank prints; the rank's number is put behind it) and
``timeout``. Answers with a JSON list: the exit codes of the ranks, negative for a signal, None for one that did not
end; and how many of the processes that they started were left behind.
"""

import json
import os
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from pathlib import Path
from typing import Any, NoReturn

import injection
import targets
import tensorboard  # noqa: F401
import torch
import transformers
import wandb  # noqa: F401

from mmgraph import cli
from mmgraph.training import build  # noqa: F401


def main() -> None:
    # What is imported at first use, imported once.
    from accelerate import tracking  # noqa: F401
    from torch.utils import tensorboard as writer  # noqa: F401

    transformers.CLIPTextModel, transformers.CLIPVisionModel, transformers.CLIPTokenizerFast  # noqa: B018
    print("ready", flush=True)
    for line in sys.stdin:
        print(json.dumps(serve(**json.loads(line))), flush=True)


def family(leaders: list[int]) -> list[int]:
    """The processes of the sessions that ``leaders`` began."""
    found = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if os.getsid(int(entry.name)) in leaders:
                    found.append(int(entry.name))
    return found


def serve(
    arguments: list[str],
    ranks: int,
    environment: dict[str, str],
    faults: list[tuple[str, dict[str, Any]]],
    output: str,
    timeout: float,
) -> list[Any]:
    port = free_port()
    children = [start(rank, ranks, port, arguments, environment, faults, f"{output}.{rank}") for rank in range(ranks)]
    codes: dict[int, int | None] = {}
    deadline = time.monotonic() + timeout
    while len(codes) < ranks:
        for child in children:
            if child not in codes:
                found, status = os.waitpid(child, os.WNOHANG)
                if found:
                    codes[child] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > deadline:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    codes[child] = None
        time.sleep(0.01)
    ended = time.monotonic()
    while (orphans := family(children)) and time.monotonic() < ended + 15:
        time.sleep(0.05)
    for orphan in orphans:
        os.kill(orphan, signal.SIGKILL)
    return [[codes[child] for child in children], len(orphans)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def start(
    rank: int,
    ranks: int,
    port: int,
    arguments: list[str],
    environment: dict[str, str],
    faults: list[tuple[str, dict[str, Any]]],
    output: str,
) -> int:
    child = os.fork()
    if child:
        return child
    os.setsid()
    descriptor = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    null = os.open(os.devnull, os.O_RDONLY)
    for source, target in ((null, 0), (descriptor, 1), (descriptor, 2)):
        os.dup2(source, target)
    os.environ.update(environment)
    if ranks > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "ACCELERATE_USE_CPU": "true",
        }  # fmt: skip
    torch.set_num_threads(1)
    targets.put(targets.OTHERS_WAIT_SECONDS, 0)  # there is no launcher to end the others
    return run(arguments, faults, rank)


def run(arguments: list[str], faults: list[tuple[str, dict[str, Any]]], rank: int) -> NoReturn:
    try:
        for name, settings in faults:
            if settings.pop("rank", rank) == rank:
                getattr(injection, name)(**settings)
        code = cli.train_main(arguments)
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    except BaseException:
        traceback.print_exc()
        code = 1
    os.environ.setdefault("RANK", "0")  # ends as a launched rank does
    cli.leave(code)


if __name__ == "__main__":
    main()
