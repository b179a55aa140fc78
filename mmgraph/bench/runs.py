"""Starts ``launch.py`` or ``mmgraph cache`` in separate processes, for benchmarks."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from mmgraph.arguments import as_arguments
from mmgraph.config import Config
from mmgraph.errors import UserError
from mmgraph.utils.files import write_durably

SCRIPT = """import sys
from mmgraph.cli import leave, main, train_main
leave(main(sys.argv[1:]) if sys.argv[1] == "cache" else train_main(sys.argv[1:]))
"""

Process = subprocess.Popen[bytes]


def flags(config: Config, **others: Any) -> list[str]:
    """Return the settings of a run as flags. The run writes no report, because benchmarks do not measure reports.

    Args:
        config: the settings.
        others: settings that replace those of ``config``.
    """
    return as_arguments({**dataclasses.asdict(config), "report": False, **others})


def launch(folder: Path, name: str, arguments: list[str], processes: int, threads: int | None) -> Process:
    """Start a run. Its output goes to ``folder/<name>.log``.

    Args:
        folder: folder for the log file and the script that is run.
        name: name of the log file, without its suffix.
        arguments: arguments of ``launch.py``, or ``cache`` followed by the arguments of ``mmgraph cache``.
        processes: number of processes.
        threads: threads of each process; None keeps the default.
    """
    script = folder / "run.py"
    if not script.exists():  # an existing script is kept, because another run may be reading it
        write_durably(script, lambda path: path.write_text(SCRIPT), shared=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(script), *arguments]
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    with (folder / f"{name}.log").open("w") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def finish(process: Process, log_file: Path) -> None:
    """Wait for a run to end.

    Raises:
        UserError: the run failed. The message has the run's error message; if there is none, the last line of its log.
    """
    if process.wait() != 0:
        lines = log_file.read_text().splitlines()
        messages = [line for line in lines if line.startswith("mmgraph: error:")] or lines[-1:]
        raise UserError(f"bench: a run failed: {' '.join(messages[:1])} (its log is {log_file})")
