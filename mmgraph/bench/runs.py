"""Real runs of ``launch.py`` and ``mmgraph cache`` in processes of their own, for benches to compare."""

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
    """A run's settings as flags, some of them others; without a report, which is not what is measured."""
    return as_arguments({**dataclasses.asdict(config), "report": False, **others})


def launch(folder: Path, name: str, arguments: list[str], processes: int, threads: int | None) -> Process:
    """Start a run, whose output goes to ``folder/<name>.log``.

    Args:
        arguments: of ``launch.py``; or ``cache`` and its own.
        threads: of each process.
    """
    script = folder / "run.py"
    if not script.exists():  # another run may be about to read it
        write_durably(script, lambda path: path.write_text(SCRIPT), shared=True)
    launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(script), *arguments]
    environment = {**os.environ, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    with (folder / f"{name}.log").open("w") as file:
        return subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)


def finish(process: Process, log_file: Path) -> None:
    """Wait for a run. Raises :class:`UserError` with its last words where it failed."""
    if process.wait() != 0:
        lines = log_file.read_text().splitlines()
        said = [line for line in lines if line.startswith("mmgraph: error:")] or lines[-1:]
        raise UserError(f"bench: a run failed: {' '.join(said[:1])} (see {log_file})")
