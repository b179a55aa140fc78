"""A server that has imported everything and forks the ranks of a run: a run starts in a second instead of ten.

    python tests/warm.py SOCKET FOLDER

listens on a Unix socket. A client sends one JSON line, the arguments of :func:`serve`, and receives its result as one
JSON line. A socket named ``deepspeed`` gives a server that has imported DeepSpeed too. The server ends when FOLDER is
removed. launches.py starts it.
"""

import json
import os
import runpy
import signal
import socket
import sys
import time
import traceback
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

sys.path.append(str(Path(__file__).parent / "faults"))

import injection
import targets
import torch
import transformers

from mmgraph import cli
from mmgraph.bench import report  # noqa: F401
from mmgraph.training import build  # noqa: F401


def main() -> None:
    # Modules that mmgraph or its libraries import on first use. A machine may lack some of them.
    for name in (
        "tensorboard", "wandb", "accelerate.tracking", "torch.utils.tensorboard", "mmgraph.inference.encode",
        "mmgraph.report.make",
    ):  # fmt: skip
        with suppress(ModuleNotFoundError):
            import_module(name)
    transformers.CLIPTextModel, transformers.CLIPVisionModel, transformers.CLIPTokenizerFast  # noqa: B018
    if sys.argv[1].endswith("deepspeed"):
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed  # noqa: F401

        del os.environ["DS_ACCELERATOR"]
    listen(Path(sys.argv[1]), Path(sys.argv[2]))


def listen(path: Path, folder: Path) -> None:
    """Fork a process for each connection, until ``folder`` is removed."""
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(f"{path}.new")
    listener.listen()
    Path(f"{path}.new").rename(path)  # clients wait for this name
    listener.settimeout(1)
    while folder.exists():
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass
        with suppress(TimeoutError):
            connection, _ = listener.accept()
            if os.fork() == 0:
                listener.close()
                with connection.makefile("rw") as stream:
                    print(json.dumps(serve(**json.loads(stream.readline()))), file=stream, flush=True)
                os._exit(0)
            connection.close()


def serve(
    program: list[str],
    environments: list[dict[str, str]],
    cwd: str,
    faults: list[tuple[str, dict[str, Any]]],
    output: str,
    timeout: float,
    no_launcher: bool,
) -> list[Any]:
    """Run a program on one or more ranks and wait for all of them.

    Args:
        program: the path of a script, or ``-m mmgraph``; then its arguments.
        environments: the environment variables of each rank.
        cwd: the working directory.
        faults: pairs of a function in :mod:`injection` and its arguments.
        output: prefix of the output files: ``output.0.out`` and ``output.0.err`` for rank 0.
        timeout: seconds after which the ranks are killed.
        no_launcher: all ranks print an error immediately. By default, the main process prints it first.

    Returns:
        The exit codes of the ranks (negative for a signal, None for a rank that was killed at the timeout), and the
        number of their child processes that were still running afterwards.
    """
    children = [
        start(rank, program, environment, cwd, faults, f"{output}.{rank}", no_launcher)
        for rank, environment in enumerate(environments)
    ]
    codes: dict[int, int | None] = {}
    deadline = time.monotonic() + timeout
    while len(codes) < len(children):
        for child in children:
            if child not in codes:
                ended, status = os.waitpid(child, os.WNOHANG)
                if ended:
                    codes[child] = os.waitstatus_to_exitcode(status)
                elif time.monotonic() > deadline:
                    os.kill(child, signal.SIGKILL)
                    os.waitpid(child, 0)
                    codes[child] = None
        time.sleep(0.01)
    all_ended = time.monotonic()
    while (orphans := processes_of(children)) and time.monotonic() < all_ended + 15:
        time.sleep(0.05)
    for orphan in orphans:
        with suppress(ProcessLookupError):
            os.kill(orphan, signal.SIGKILL)
    return [[codes[child] for child in children], len(orphans)]


def processes_of(leaders: list[int]) -> list[int]:
    """Return the processes in the sessions that ``leaders`` created."""
    processes = []
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            with suppress(OSError):
                if os.getsid(int(entry.name)) in leaders:
                    processes.append(int(entry.name))
    return processes


def start(
    rank: int,
    program: list[str],
    environment: dict[str, str],
    cwd: str,
    faults: list[tuple[str, dict[str, Any]]],
    output: str,
    no_launcher: bool,
) -> int:
    """Fork a rank, and return its process id."""
    if child := os.fork():
        return child
    os.setsid()
    os.chdir(cwd)
    null = os.open(os.devnull, os.O_RDONLY)
    out, err = (os.open(f"{output}.{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666) for name in ("out", "err"))
    for source, target in ((null, 0), (out, 1), (err, 2)):
        os.dup2(source, target)
    os.environ.clear()
    os.environ.update(environment)
    torch.set_num_threads(1)
    if no_launcher:
        targets.put(targets.OTHERS_WAIT_SECONDS, 0)
    return run(program, faults, rank)


def run(program: list[str], faults: list[tuple[str, dict[str, Any]]], rank: int) -> NoReturn:
    code = 0
    try:
        for name, settings in faults:
            if settings.pop("rank", rank) == rank:
                getattr(injection, name)(**settings)
        if program[0] == "-m":
            sys.argv = program[1:]
            runpy.run_module(program[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv, sys.path[0] = program, str(Path(program[0]).parent)
            runpy.run_path(program[0], run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
    except BaseException:
        traceback.print_exc()
        code = 1
    os.environ.setdefault("RANK", "0")  # end without Python's teardown, like a launched rank
    cli.leave(code)


if __name__ == "__main__":
    main()
