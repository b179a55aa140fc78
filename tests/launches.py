"""Starts training runs and commands: through ``accelerate launch``, or in forks of a warm process."""

import atexit
import fcntl
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import (
    prepare_deepspeed_cmd_env,
    prepare_multi_gpu_env,
    prepare_simple_launcher_cmd_env,
)

TESTS = Path(__file__).parent
REPOSITORY = TESTS.parent
SCRIPT = str(REPOSITORY / "launch.py")
PARALLEL_RUNS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
# The sockets of warm servers. Processes that pytest-xdist starts inherit the variable, and so share the servers.
WARM_SERVERS = Path(os.environ.get("MMGRAPH_WARM_SERVERS") or tempfile.mkdtemp(prefix="mmgraph-warm-"))
if "MMGRAPH_WARM_SERVERS" not in os.environ:
    os.environ["MMGRAPH_WARM_SERVERS"] = str(WARM_SERVERS)
    OWNER = os.getpid()
    atexit.register(lambda: os.getpid() == OWNER and shutil.rmtree(WARM_SERVERS, ignore_errors=True))
Fault = tuple[str, dict[str, Any]]  # a function of faults/injection.py, and its arguments

# By default, ZeRO-3 does not partition parameters with fewer than 100,000 elements. These models have no larger ones.
ZERO3_JSON = Path(__file__).parent / "zero3_all_partitioned.json"
ZERO3 = f"deepspeed_zero3.yaml --num_processes 2 --mixed_precision no --deepspeed_config_file {ZERO3_JSON}"


def launch_command(config: str, *arguments: str) -> list[str]:
    """Return the command of a launch.

    Args:
        config: a file in accelerate_configs/, and then flags of the launcher.
        arguments: arguments of launch.py.
    """
    file, *flags = config.split()
    return [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file",
        str(REPOSITORY / "accelerate_configs" / file), *flags, SCRIPT, *arguments,
    ]  # fmt: skip


def run(command: list[str], cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a new process."""
    environment = {**os.environ, **environment}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


def accelerate_launch(config: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run launch.py through ``accelerate launch``, and check that it succeeds."""
    done = run(launch_command(config, *arguments))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return done


class Ended(NamedTuple):
    """How the ranks of a warm run ended."""

    codes: list[int | None]  # exit code of each rank; negative for a signal; None if it was killed at the timeout
    stdout: str  # of all ranks, in the order of the ranks
    stderr: str

    @property
    def returncode(self) -> int | None:
        """0 if all ranks succeeded, else the code of the first rank that failed."""
        return next((code for code in self.codes if code != 0), 0)

    @property
    def code(self) -> int | None:
        [code] = self.codes
        return code

    @property
    def said(self) -> str:
        return self.stdout + self.stderr


def launch(config: str, *arguments: str, cwd: Path | None = None) -> Ended:
    """Run launch.py in warm processes with the environment of ``accelerate launch``, and check that it succeeds."""
    ended = run_warm([SCRIPT, *arguments], config, cwd=cwd)
    assert not any(ended.codes), (ended.codes, ended.stdout[-3000:] + ended.stderr[-3000:])
    return ended


def run_warm(
    program: list[str],
    config: str = "cpu.yaml",
    faults: Sequence[Fault] = (),
    cwd: Path | None = None,
    timeout: float = 300,
    no_launcher: bool = False,
    **environment: str,
) -> Ended:
    """Run a script, or ``-m mmgraph``, in warm processes of one thread each.

    Args:
        program: a path or ``-m mmgraph``, and then arguments.
        config: as for :func:`launch_command`.
        faults: faults to inject. A setting ``rank`` limits a fault to this rank.
        cwd: working directory.
        timeout: seconds after which the ranks are killed.
        no_launcher: each rank prints its error immediately. A launcher would end the other ranks after the first error.
        environment: additional environment variables.
    """
    processes, variables = launch_environment(config)
    shared = {**os.environ, **variables, **environment}
    environments = [shared] if processes == 1 else [shared | rank_variables(i, processes) for i in range(processes)]
    for number, port in enumerate([free_port()] * processes if processes > 1 else []):
        environments[number]["MASTER_PORT"] = str(port)
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "program": program, "environments": environments, "cwd": str(cwd or Path.cwd()), "faults": faults,
            "output": f"{folder}/rank", "timeout": timeout, "no_launcher": no_launcher,
        }  # fmt: skip
        codes, orphans = serve(request, "ACCELERATE_USE_DEEPSPEED" in shared)
        assert not orphans, "processes left behind"
        stdout, stderr = (
            "".join(Path(f"{folder}/rank.{i}.{name}").read_text(errors="replace") for i in range(processes))
            for name in ("out", "err")
        )
        return Ended(codes, stdout, stderr)


def rank_variables(rank: int, processes: int) -> dict[str, str]:
    """Return the variables that torchrun sets for a rank, except for those of its store."""
    return {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(processes), "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
    }  # fmt: skip


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@cache
def launch_environment(config: str) -> tuple[int, dict[str, str]]:
    """Return the number of processes of a config, and the variables that ``accelerate launch`` sets for each."""
    arguments = launch_command_parser().parse_args(launch_command(config)[3:])
    arguments, defaults, from_config = _validate_launch_command(arguments)
    if arguments.use_deepspeed or arguments.multi_gpu:
        arguments.main_process_port = 0
    if arguments.use_deepspeed:
        fields = [*defaults.deepspeed_config, *(["mixed_precision"] if from_config else [])]
        arguments.deepspeed_fields_from_accelerate_config = ",".join(fields)
        _, environment = prepare_deepspeed_cmd_env(arguments)
    elif arguments.multi_gpu:
        environment = prepare_multi_gpu_env(arguments)
    else:
        _, environment = prepare_simple_launcher_cmd_env(arguments)
    added = {name: value for name, value in environment.items() if os.environ.get(name) != value}
    return arguments.num_processes if arguments.use_deepspeed or arguments.multi_gpu else 1, added


def serve(request: dict[str, Any], deepspeed: bool) -> tuple[list[int | None], int]:
    """Send a request to the server of :mod:`warm`, and return its answer. Start the server if it is not running."""
    path = WARM_SERVERS / ("deepspeed" if deepspeed else "plain")
    with (WARM_SERVERS / f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # tests run in several processes
        if not path.exists():
            _start_server(path)
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(json.dumps(request).encode() + b"\n")
        with connection.makefile() as answer:
            codes, orphans = json.loads(answer.readline())
            return codes, orphans


def _start_server(path: Path) -> None:
    server = subprocess.Popen(
        [sys.executable, str(TESTS / "warm.py"), str(path), str(WARM_SERVERS)],
        env={**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    while not path.exists():
        assert server.poll() is None, "the warm server did not start"
        time.sleep(0.05)
