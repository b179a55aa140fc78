"""Flags of the output folder, of trackers and of processes."""

import dataclasses
from typing import Literal

from mmgraph.utils.fields import ABOVE_0, FROM_0, flag


@dataclasses.dataclass(frozen=True)
class OutputFlags:
    """Files of the run, trackers, and limits of waiting."""

    output_dir: str | None = flag(None, "output", "output folder of the run (default: runs/RUN_NAME)", common=True)
    run_name: str | None = flag(
        None, "output", "name of the run (default: demo with --demo, else the name of the node table's folder)"
    )
    resume: str = flag(
        "auto",
        "output",
        "auto: continue the run in the output folder, or start a new run if the folder contains none; never: fail if "
        "the output folder contains a run; the path of a state folder: resume from this state",
        common=True,
    )
    save_every: int = flag(500, "output", "steps between resume states; 0: only at evaluations and epoch ends", FROM_0)
    keep_last: int = flag(2, "output", "number of resume states to keep; epoch files are never removed", ABOVE_0)
    log_every: int = flag(50, "output", "steps between progress lines in the text log", ABOVE_0)
    log_buffer_size: int = flag(
        10, "output", "number of lines of the text log to collect before they are written to the file", ABOVE_0
    )
    report: bool = flag(True, "output", "write report.html to the output folder when training is done")
    report_to: Literal["auto", "wandb", "tensorboard", "all", "none"] = flag(
        "auto", "tracking", "experiment tracker; auto: wandb if an API key or a login exists, else none", common=True
    )
    project: str = flag("mmgraph", "tracking", "wandb project")
    tags: str | None = flag(None, "tracking", "wandb tags, separated by commas")
    notes: str | None = flag(None, "tracking", "wandb notes about the run")
    collective_timeout: float = flag(
        600.0,
        "processes",
        "seconds that a rank waits for the other ranks, or for a DataLoader worker, before it fails",
        ABOVE_0,
    )
    stop_grace: float = flag(
        15.0,
        "processes",
        "after a stop signal, a rank exits without a new resume state if its step takes this many seconds longer than "
        "usual",
        ABOVE_0,
    )
    check: bool = flag(False, "processes", "check arguments, data and launch without training", common=True)
