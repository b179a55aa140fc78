"""``metrics.jsonl`` (one object a step) and the trackers; written by the main process alone."""

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
from mmgraph.utils.exit import hook_may_hang
from mmgraph.utils.log import log

Pictures = Mapping[str, Image]
Tables = Mapping[str, tuple[list[str], list[list[Any]]]]  # columns, rows

START_SECONDS, HANG_SECONDS, FINISH_SECONDS = 90.0, 60.0, 90.0  # that trackers get; wandb's own limits are below


class Trackers:
    """The trackers that follow a run, through Accelerate's. None can stop or stall it: an error of one is a line.

    Each works in a thread of its own, and is left to itself where it hangs. Weights & Biases without a key or a network
    is kept offline, below ``folder``.

    Args:
        config: the run's settings; ``report_to`` says which.
        folder: the run's.
        step: the run has finished this many; a tracker's rows beyond are of a start that was lost.
        wandb_id: the wandb run to go on with; None starts one.
    """

    def __init__(self, config: Config, folder: Path, step: int, wandb_id: str | None):
        self.wandb_id, self._config, self._folder = wandb_id, config, folder
        starts = {"wandb": self._start_wandb, "tensorboard": lambda: self._start_tensorboard(step)}
        self._patience = min(START_SECONDS, config.collective_timeout / 2)  # for which the other ranks wait
        followers = [_Follower(name, starts[name]) for name in _chosen(config.report_to)]
        deadline = time.monotonic() + self._patience
        self._followers = [follower for follower in followers if follower.has_started(deadline, self._patience)]

    def write(self, row: Mapping[str, Any]) -> None:
        for follower in self._followers:
            follower.write(row)

    def show(self, step: int, pictures: Pictures, tables: Tables, page: Path) -> None:
        """Show what a report has beyond the metrics.

        Args:
            step: the run's last.
            pictures, tables: by the names that they get.
            page: the HTML file.
        """
        for follower in self._followers:
            follower.do(lambda tracker: _SHOWS[tracker.name](tracker, step, pictures, tables, page))

    def close(self) -> None:
        for follower in self._followers:
            follower.end()
        deadline = time.monotonic() + FINISH_SECONDS
        for follower in self._followers:
            follower.has_finished(deadline)

    def _start_tensorboard(self, step: int) -> GeneralTracker:
        tracker = TensorBoardTracker("tensorboard", self._folder, purge_step=step + 1)
        tracker.start()
        tracker.store_init_configuration(dataclasses.asdict(self._config))
        log(f"tensorboard --logdir {self._folder / 'tensorboard'} shows the run")
        return tracker

    def _start_wandb(self) -> GeneralTracker:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb  # costs seconds: only for those who asked

        config, folder = self._config, self._folder
        # In s; the latter is not in every version. Once online, then offline, must fit into the patience.
        known: dict[str, Any] = {"init_timeout": self._patience / 3, "finish_timeout": 60}
        limits = {name: value for name, value in known.items() if name in wandb.Settings.model_fields}
        offline = _why_offline(wandb.setup().settings.base_url)

        def started(mode: str) -> GeneralTracker:
            tracker = WandBTracker(
                config.project, name=config.run_name or folder.name, dir=folder, id=self.wandb_id, mode=mode,
                resume="allow" if self.wandb_id else None, tags=config.tags.split(",") if config.tags else None,
                notes=config.notes, config=dataclasses.asdict(config), settings=wandb.Settings(**limits),
            )  # fmt: skip
            tracker.start()
            return tracker

        try:
            tracker = started("offline" if offline else os.environ.get("WANDB_MODE", "online"))
        except Exception as error:
            if offline:
                raise
            offline = _said(error)
            tracker = started("offline")
        run = tracker.tracker
        self.wandb_id = run.id
        if run.offline:
            log(f"wandb: run {run.id}, offline ({offline or 'as asked'}); wandb sync {Path(run.dir).parent} uploads it")
        else:
            log(f"wandb: run {run.id}, {run.url}")
        return tracker


class _Follower:
    """A tracker in a thread, which may raise or hang: then it is off, and one line says so."""

    def __init__(self, name: str, start: Callable[[], GeneralTracker]):
        self._name, self._start, self._off = name, start, False
        self._jobs: queue.Queue[Callable[[Any], object] | None] = queue.Queue()
        self._started, self._since = threading.Event(), time.monotonic()  # when it began with what it is at
        self._thread = threading.Thread(target=self._work, daemon=True)
        self._thread.start()

    def has_started(self, deadline: float, patience: float) -> bool:
        if not self._started.wait(max(0, deadline - time.monotonic())):
            self._turn_off(f"has not started within {patience:g} s")
        return not self._off

    def write(self, row: Mapping[str, Any]) -> None:
        self.do(partial(_log_row, row))

    def do(self, job: Callable[[Any], object]) -> None:
        """Have the tracker do something, after all that came before."""
        if self._jobs.empty():
            self._since = time.monotonic()
        elif not self._off and time.monotonic() - self._since > HANG_SECONDS:
            self._turn_off(f"hangs since {HANG_SECONDS:g} s")
        if not self._off:
            self._jobs.put(job)

    def end(self) -> None:
        self._jobs.put(None)

    def has_finished(self, deadline: float) -> None:
        if self._off:
            return
        self._thread.join(max(0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self._turn_off(f"has not finished within {FINISH_SECONDS:g} s")

    def _turn_off(self, why: str) -> None:
        self._off = True
        log(f"{self._name} is off from here: it {why}; the run goes on, and metrics.jsonl has all of it")
        hook_may_hang()  # what the tracker has registered for the exit would wait for it

    def _work(self) -> None:
        doing = "start"
        try:
            tracker = self._start()
            self._started.set()
            doing = "go on"
            while (job := self._jobs.get()) is not None:
                self._since = time.monotonic()
                job(tracker)
            tracker.finish()
        except Exception as error:
            if not self._off:
                log(f"{self._name} is off{'' if doing == 'start' else ' from here'}: {_said(error)}")
            self._off = True
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


_SHOWS = {"wandb": _show_wandb, "tensorboard": _show_tensorboard}


def _chosen(report_to: str) -> list[str]:
    if report_to == "auto":
        if _may_have_key() and os.environ.get("WANDB_MODE") != "disabled":
            return ["wandb"]
        log("no tracker follows the run: wandb login, or WANDB_API_KEY, changes that (--report_to)")
        return []
    return {"none": [], "all": ["wandb", "tensorboard"]}.get(report_to, [report_to])


def _may_have_key() -> bool:
    """Whether there is a key or a login to be found, without the seconds that wandb's import takes."""
    return bool(os.environ.get("WANDB_API_KEY")) or any(_logins())


def _logins() -> dict[str, Any]:
    try:
        return netrc.netrc(os.environ.get("NETRC")).hosts
    except (OSError, ValueError, netrc.NetrcParseError):
        return {}


def _why_offline(base_url: str) -> str | None:
    """Why wandb would not reach its server; None where it would, or where the user has chosen.

    Without this probe a start with a key and no network takes 46 s instead of 9 s: wandb retries until its time limit.
    """
    if os.environ.get("WANDB_MODE"):
        return None
    url = urlsplit(base_url)
    if not os.environ.get("WANDB_API_KEY") and url.hostname not in _logins():
        return "no key"
    if getproxies():
        return None  # what a direct connection does says nothing
    try:
        socket.create_connection((url.hostname, url.port or (443 if url.scheme == "https" else 80)), timeout=5).close()
    except OSError as error:
        return f"{url.hostname} cannot be reached: {error}"
    return None


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"
