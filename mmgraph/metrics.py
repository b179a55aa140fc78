"""``metrics.jsonl`` (one object a step) and the tracker; both written by the main process alone."""

import json
import netrc
import os
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

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
        self._file.close()

    def _flush(self) -> None:
        self._file.flush()
        self._waiting, self._written = 0, time.monotonic()


class WandbTracker:
    """Weights & Biases, such that it can never stop or hang training: any error of it is one line in the log.

    Without a key in the environment or netrc the run is kept offline, below ``folder``.

    Args:
        run_id: of the run to go on with; None starts one.
    """

    def __init__(self, folder: Path, name: str, settings: dict[str, Any], run_id: str | None):
        self._run: Any = None
        os.environ.setdefault("WANDB_SILENT", "true")
        try:
            import wandb  # costs seconds: only for those who asked

            wanted: Any = os.environ.get("WANDB_MODE") or (
                "online" if _has_key(wandb.Settings().base_url) else "offline"
            )
            try:
                self._run = self._start(wandb, wanted, folder, name, settings, run_id)
            except Exception:
                if wanted != "online":
                    raise
                self._run = self._start(wandb, "offline", folder, name, settings, run_id)  # no network
            log(f"wandb: run {self._run.id}, {'offline' if self._run.offline else 'online'}, in {folder / 'wandb'}")
        except Exception as error:
            log(f"wandb is off: {type(error).__name__}: {' '.join(str(error).split())}")

    @staticmethod
    def _start(wandb: Any, mode: str, folder: Path, name: str, settings: dict[str, Any], run_id: str | None) -> Any:
        return wandb.init(
            project="mmgraph", name=name, dir=folder, config=settings, id=run_id, resume="allow" if run_id else None,
            mode=mode, settings=wandb.Settings(init_timeout=30),
        )  # fmt: skip

    @property
    def run_id(self) -> str | None:
        return self._run.id if self._run is not None else None

    def write(self, row: Mapping[str, Any]) -> None:
        self._call(lambda: self._run.log({k: v for k, v in row.items() if k != "step"}, step=row["step"]))

    def close(self) -> None:
        self._call(lambda: self._run.finish())

    def _call(self, action: Any) -> None:
        if self._run is None:
            return
        try:
            action()
        except Exception as error:
            self._run = None
            log(f"wandb is off from here: {type(error).__name__}: {' '.join(str(error).split())}")


def _has_key(base_url: str) -> bool:
    if os.environ.get("WANDB_API_KEY"):
        return True
    try:
        return netrc.netrc().authenticators(base_url.split("//")[-1].split("/")[0]) is not None
    except (OSError, netrc.NetrcParseError):
        return False
