"""Sends metrics to Weights & Biases and TensorBoard. Only the main process uses these trackers."""

import dataclasses
import netrc
import os
import queue
import socket
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

import numpy as np
from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker
from PIL.Image import Image

from mmgraph.config import Config
from mmgraph.utils.error_text import describe_error
from mmgraph.utils.exit import hook_may_hang
from mmgraph.utils.log import log

Pictures = Mapping[str, Image]
Tables = Mapping[str, tuple[list[str], list[list[Any]]]]  # name -> (columns, rows)

# Time limits for trackers. _start_wandb sets wandb's own time limits.
START_SECONDS, HANG_SECONDS, FINISH_SECONDS = 90.0, 60.0, 90.0


class Trackers:
    """Sends the metrics of a run to experiment trackers, through Accelerate's tracker classes.

    A tracker cannot stop or stall the run, because each tracker works in a separate thread. A tracker that raises an
    error or hangs is disabled. One log line reports this, and the run continues. Without an API key or a network,
    Weights & Biases runs offline and writes below ``folder``.

    Args:
        config: the run's settings. ``report_to`` selects the trackers.
        folder: output folder of the run.
        step: number of finished steps of the run. An earlier launch may have logged later steps. TensorBoard drops
            their rows, because the run repeats these steps.
        wandb_id: ID of the wandb run to continue; None starts a new one.

    Attributes:
        wandb_id: ID of the wandb run, or None.
    """

    def __init__(self, config: Config, folder: Path, step: int, wandb_id: str | None):
        self.wandb_id, self._config, self._folder = wandb_id, config, folder
        start_functions = {"wandb": self._start_wandb, "tensorboard": lambda: self._start_tensorboard(step)}
        self._start_timeout = min(START_SECONDS, config.collective_timeout / 2)  # the other ranks wait during the start
        threads = [_TrackerThread(name, start_functions[name]) for name in _tracker_names(config.report_to)]
        deadline = time.monotonic() + self._start_timeout
        self._threads = [thread for thread in threads if thread.wait_until_started(deadline, self._start_timeout)]

    def write(self, row: Mapping[str, Any]) -> None:
        """Log a row of ``metrics.jsonl`` in all trackers, without waiting for them."""
        for thread in self._threads:
            thread.write(row)

    def show(self, step: int, pictures: Pictures, tables: Tables, page: Path) -> None:
        """Send a report's images, tables and HTML page to all trackers, without waiting for them.

        Args:
            step: last step of the run.
            pictures, tables: the report's images and tables; the keys are their names in the trackers.
            page: the report's HTML file.
        """
        for thread in self._threads:
            thread.do(lambda tracker: _SHOW_FUNCTIONS[tracker.name](tracker, step, pictures, tables, page))

    def close(self) -> None:
        """Finish all trackers. Wait at most ``FINISH_SECONDS`` in total."""
        for thread in self._threads:
            thread.end()
        deadline = time.monotonic() + FINISH_SECONDS
        for thread in self._threads:
            thread.wait_until_finished(deadline)

    def _start_tensorboard(self, step: int) -> GeneralTracker:
        tracker = TensorBoardTracker("tensorboard", self._folder, purge_step=step + 1)
        tracker.start()
        tracker.store_init_configuration(dataclasses.asdict(self._config))
        log(f"tensorboard: to view the metrics, run tensorboard --logdir {self._folder / 'tensorboard'}")
        return tracker

    def _start_wandb(self) -> GeneralTracker:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb  # imported only if needed, because the import takes seconds

        config, folder = self._config, self._folder
        # Time limits in seconds. If the online start fails, an offline start follows, and both must fit into the start
        # timeout. Some versions of wandb have no finish_timeout.
        limits: dict[str, Any] = {"init_timeout": self._start_timeout / 3, "finish_timeout": 60}
        limits = {name: value for name, value in limits.items() if name in wandb.Settings.model_fields}
        offline_reason = _why_offline(wandb.setup().settings.base_url)

        def start_tracker(mode: str) -> GeneralTracker:
            tracker = WandBTracker(
                config.project, name=config.run_name or folder.name, dir=folder, id=self.wandb_id, mode=mode,
                resume="allow" if self.wandb_id else None, tags=config.tags.split(",") if config.tags else None,
                notes=config.notes, config=dataclasses.asdict(config), settings=wandb.Settings(**limits),
            )  # fmt: skip
            tracker.start()
            return tracker

        try:
            tracker = start_tracker("offline" if offline_reason else os.environ.get("WANDB_MODE", "online"))
        except Exception as error:
            if offline_reason:
                raise
            offline_reason = describe_error(error)
            tracker = start_tracker("offline")
        run = tracker.tracker
        self.wandb_id = run.id
        if run.offline:
            log(
                f"wandb: run {run.id}, offline ({offline_reason or 'as configured'}); to upload it, use wandb sync "
                f"{Path(run.dir).parent}"
            )
        else:
            log(f"wandb: run {run.id}, {run.url}")
        return tracker


class _TrackerThread:
    """Runs a tracker in a thread. A tracker that raises an error or hangs is disabled, and one log line reports this.

    Args:
        name: name of the tracker.
        start: starts the tracker and returns it.
    """

    def __init__(self, name: str, start: Callable[[], GeneralTracker]):
        self._name, self._start, self._disabled = name, start, False
        self._jobs: queue.Queue[Callable[[Any], object] | None] = queue.Queue()
        self._started, self._job_start = threading.Event(), time.monotonic()  # _job_start: start of the current job
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def wait_until_started(self, deadline: float, timeout: float) -> bool:
        """Wait for the start of the tracker. Disable the tracker if it has not started by ``deadline``.

        Args:
            deadline: value of ``time.monotonic()`` at which the wait ends.
            timeout: seconds from the start of the thread to ``deadline``. The log line reports this time.

        Returns:
            Whether the tracker has started.
        """
        if not self._started.wait(max(0, deadline - time.monotonic())):
            self._disable(f"did not start within {timeout:g} s")
        return not self._disabled

    def write(self, row: Mapping[str, Any]) -> None:
        self.do(partial(_log_row, row))

    def do(self, job: Callable[[Any], object]) -> None:
        """Queue ``job``, which the thread calls with the tracker. Disable the tracker if the current job hangs."""
        if self._jobs.empty():
            self._job_start = time.monotonic()
        elif not self._disabled and time.monotonic() - self._job_start > HANG_SECONDS:
            self._disable(f"has been hanging for {HANG_SECONDS:g} s")
        if not self._disabled:
            self._jobs.put(job)

    def end(self) -> None:
        """Tell the thread to finish the tracker after the queued jobs. Do not wait."""
        self._jobs.put(None)

    def wait_until_finished(self, deadline: float) -> None:
        """Wait for the thread. Disable the tracker if it has not finished by ``deadline``."""
        if self._disabled:
            return
        self._thread.join(max(0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._disable(f"did not finish within {FINISH_SECONDS:g} s")

    def _disable(self, reason: str) -> None:
        self._disabled = True
        log(f"{self._name} is disabled for the rest of the run: it {reason}; metrics.jsonl has all rows")
        hook_may_hang()  # an exit hook of the tracker may wait for the tracker

    def _work(self) -> None:
        phase = "start"
        try:
            tracker = self._start()
            self._started.set()
            phase = "after start"
            while (job := self._jobs.get()) is not None:
                self._job_start = time.monotonic()
                job(tracker)
            tracker.finish()
        except Exception as error:
            if not self._disabled:
                log(
                    f"{self._name} is disabled{'' if phase == 'start' else ' for the rest of the run'}: "
                    f"{describe_error(error)}"
                )
            self._disabled = True
            self._started.set()


def _log_row(row: Mapping[str, Any], tracker: Any) -> None:
    values = {name: value for name, value in row.items() if name != "step" and value is not None}
    tracker.log(values, step=row["step"])


def _show_wandb(tracker: Any, step: int, pictures: Pictures, tables: Tables, page: Path) -> None:
    import wandb

    tracker.log_images({name: [picture] for name, picture in pictures.items()}, step=step)
    for name, (columns, rows) in tables.items():
        tracker.log_table(name, columns=columns, data=rows, step=step)
    tracker.log({"report/page": wandb.Html(page.read_text(encoding="utf-8"), inject=False)}, step=step)


def _show_tensorboard(tracker: Any, step: int, pictures: Pictures, tables: Tables, page: Path) -> None:
    for name, picture in pictures.items():
        tracker.writer.add_image(name, np.asarray(picture), step, dataformats="HWC")
    for name, (columns, rows) in tables.items():
        lines = [columns, ["---"] * len(columns), *rows]
        tracker.writer.add_text(name, "\n".join("|".join(map(_cell, line)) for line in lines), step)


def _cell(value: Any) -> str:
    text = f"{value:.4f}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


_SHOW_FUNCTIONS = {"wandb": _show_wandb, "tensorboard": _show_tensorboard}


def _tracker_names(report_to: str) -> list[str]:
    if report_to == "auto":
        if _may_have_key() and os.environ.get("WANDB_MODE") != "disabled":
            return ["wandb"]
        log("no experiment tracker is used (--report_to auto); to use wandb, run wandb login or set WANDB_API_KEY")
        return []
    return {"none": [], "all": ["wandb", "tensorboard"]}.get(report_to, [report_to])


def _may_have_key() -> bool:
    """Return whether an API key or a login for wandb may exist. wandb is not imported, because that takes seconds."""
    return bool(os.environ.get("WANDB_API_KEY")) or any(_logins())


def _logins() -> dict[str, Any]:
    """Return the logins in the netrc file, by host. If the file is missing or invalid, the result is empty."""
    try:
        return netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, ValueError, netrc.NetrcParseError):
        return {}


def _why_offline(base_url: str) -> str | None:
    """Return why wandb has to run offline: it has no API key, or the server cannot be reached. Otherwise, return None.

    If ``WANDB_MODE`` is set, nothing is checked. With a proxy, only the API key is checked. If the server cannot be
    reached, wandb itself would retry until its time limit. This check shortens such a start from 46 s to 9 s.

    Args:
        base_url: URL of the wandb server.
    """
    if os.environ.get("WANDB_MODE"):
        return None
    url = urlsplit(base_url)
    if not os.environ.get("WANDB_API_KEY") and url.hostname not in _logins():
        return "no API key"
    if getproxies():
        return None  # a direct connection would not show whether the proxy works
    try:
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=5).close()
    except OSError as error:
        return f"cannot reach {url.hostname}: {error}"
    return None
