"""``metrics.jsonl`` (one object a step) and the trackers; written by the main process alone."""

import dataclasses
import json
import netrc
import os
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from accelerate.tracking import GeneralTracker, TensorBoardTracker, WandBTracker

from mmgraph.config import Config
from mmgraph.files import sync
from mmgraph.text_log import log


class MetricsFile:
    """Appends rows; on disk at the latest after 10 rows or the row after 1 s, and at :meth:`sync`.

    Args:
        path: the file.
        keep: bytes of an existing file to go on from; what stands behind them is cut off.
    """

    def __init__(self, path: Path, keep: int = 0):
        self._file = path.open("ab")
        self._file.truncate(min(keep, path.stat().st_size))  # a file that lost rows must not be filled up with zeros
        self._path, self._waiting, self._written = path, 0, time.monotonic()

    def write(self, row: Mapping[str, Any]) -> None:
        self._file.write((json.dumps(dict(row)) + "\n").encode())
        self._waiting += 1
        if self._waiting >= 10 or time.monotonic() - self._written > 1:
            self._flush()

    def sync(self) -> int:
        """Put all rows on the disk. Returns the bytes of the file."""
        self._flush()
        sync(self._path)
        return self._path.stat().st_size

    def close(self) -> None:
        with suppress(OSError):  # of rows that no state counts on
            self._file.close()

    def _flush(self) -> None:
        self._file.flush()
        self._waiting, self._written = 0, time.monotonic()


class Trackers:
    """The trackers that follow a run, through Accelerate's. None can stop or stall it: an error of one is a line.

    Weights & Biases without a key or a network is kept offline, below ``folder``.

    Args:
        config: the run's settings; ``report_to`` says which.
        folder: the run's.
        step: the run has finished this many; a tracker's rows beyond are of a start that was lost.
        wandb_id: the wandb run to go on with; None starts one.
    """

    def __init__(self, config: Config, folder: Path, step: int, wandb_id: str | None):
        self.wandb_id, self._trackers = wandb_id, list[GeneralTracker]()
        for name in _chosen(config.report_to):
            try:
                if name == "wandb":
                    self._start_wandb(config, folder)
                else:
                    self._start_tensorboard(config, folder, step)
            except Exception as error:
                log(f"{name} is off: {_said(error)}")

    def write(self, row: Mapping[str, Any]) -> None:
        values = {name: value for name, value in row.items() if name != "step" and value is not None}
        self._call(lambda tracker: tracker.log(values, step=row["step"]))

    def close(self) -> None:
        self._call(lambda tracker: tracker.finish())

    def _call(self, action: Callable[[GeneralTracker], None]) -> None:
        for tracker in list(self._trackers):
            try:
                action(tracker)
            except Exception as error:
                self._trackers.remove(tracker)
                log(f"{tracker.name} is off from here: {_said(error)}")

    def _start_tensorboard(self, config: Config, folder: Path, step: int) -> None:
        tracker = TensorBoardTracker("tensorboard", folder, purge_step=step + 1)
        tracker.start()
        tracker.store_init_configuration(dataclasses.asdict(config))
        self._trackers.append(tracker)
        log(f"tensorboard --logdir {folder / 'tensorboard'} shows the run")

    def _start_wandb(self, config: Config, folder: Path) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb  # costs seconds: only for those who asked

        known: dict[str, Any] = {"init_timeout": 30, "finish_timeout": 60}  # s; the latter is not in every version
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
        self._trackers.append(tracker)
        run = tracker.tracker
        self.wandb_id = run.id
        if run.offline:
            log(f"wandb: run {run.id}, offline ({offline or 'as asked'}); wandb sync {Path(run.dir).parent} uploads it")
        else:
            log(f"wandb: run {run.id}, {run.url}")


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
    except (OSError, netrc.NetrcParseError):
        return {}


def _why_offline(base_url: str) -> str | None:
    """Why wandb would not reach its server; None where it would, or where the user has chosen."""
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
