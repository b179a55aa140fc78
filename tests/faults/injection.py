"""Fault injection for a process that is about to run launch.py.

A test names a function of this module and its arguments as JSON. warm.py and launched.py call it before the run starts.
"""

import errno
import io
import json
import os
import pty
import signal
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from pkgutil import resolve_name
from types import FrameType
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))
import targets

ERRORS = {"full": errno.ENOSPC, "quota": errno.EDQUOT, "broken": errno.EIO}
FILE_CALLS = {
    "write", "flush", "__exit__", "fsync", "rename", "replace", "link", "unlink", "rmdir", "mkdir", "truncate",
    "write_end_of_file",
}  # fmt: skip
MODULES = [__import__(name) for name in ("posix", "io", "_io")]


def act(action: str | float) -> None:
    """Perform a fault: a disk error, another error, a sleep, or a signal to this process.

    Args:
        action: a key of ERRORS, ``raise``, ``memory``, ``sleep`` (3600 s), the name of a signal, or a sleep in seconds.
    """
    if not isinstance(action, str):
        time.sleep(action)
        return
    if action in ERRORS:
        raise OSError(ERRORS[action], os.strerror(ERRORS[action]))
    if action == "raise":
        raise ValueError("injected by the test")
    if action == "memory":
        raise MemoryError("no memory left")
    if action == "sleep":
        time.sleep(3600)
    os.kill(os.getpid(), getattr(signal, action))


def after_step(step: int, action: str) -> None:
    """Perform a fault after step ``step`` is recorded, before the run continues."""
    at_step(step, lambda: act(action))


def at_step(step: int, do: Callable[[], object]) -> None:
    """Call ``do`` after step ``step`` is recorded."""

    def recorded(record: Callable[..., Any], run: Any, *values: Any, **named: Any) -> Any:
        result = record(run, *values, **named)
        if targets.steps_done(run) == step:
            do()
        return result

    wrap(targets.RECORD_STEP, recorded)


def at_call(target: str, number: int, action: str | float, after: bool = False) -> None:
    """Perform a fault before (or after) the ``number``-th call, from 1, of a function or method.

    Args:
        target: the dotted name.
    """
    calls = [0]

    def with_fault(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        calls[0] += 1
        here = calls[0] == number
        if here and not after:
            act(action)
        result = function(*arguments, **named)
        if here and after:
            act(action)
        return result

    wrap(target, with_fault)


def put(target: str, value: object) -> None:
    """Replace a constant, given by its dotted name."""
    targets.put(target, value)


def meet_at(target: str, folder: str) -> None:
    """At each call of a function or method, create the file ``folder``/here and wait for ``folder``/go."""

    def with_fault(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        (Path(folder) / "here").touch()
        while not (Path(folder) / "go").exists():
            time.sleep(0.02)
        return function(*arguments, **named)

    wrap(target, with_fault)


def in_a_worker(action: str) -> None:
    """Perform a fault in each DataLoader worker when it collates a batch."""
    from torch.utils.data import get_worker_info

    def collate(function: Callable[..., Any], *arguments: Any) -> Any:
        if get_worker_info() is not None:
            act(action)
        return function(*arguments)

    wrap(targets.COLLATE, collate)


def not_finite(step: int, what: str, value: str) -> None:
    """Make the loss or the gradient of step ``step`` nan or inf, on this rank only.

    Args:
        what: ``loss`` or ``gradient``.
        value: ``nan`` or ``inf``.
    """
    import torch

    factor, due = float(value), [False]

    def stepped(take_step: Callable[..., Any], run: Any, *batch: Any, **named: Any) -> Any:
        due[0] = targets.steps_done(run) + 1 == step
        return take_step(run, *batch, **named)

    def with_fault(losses: Callable[..., Any], z_graph: torch.Tensor, *others: Any, **named: Any) -> Any:
        if due[0] and what == "gradient":
            z_graph.register_hook(lambda gradient: gradient * factor)
        computed = losses(z_graph, *others, **named)
        # A sum, not a product: its gradient is finite, so only the run itself can inform the other ranks.
        return computed._replace(total=computed.total + factor) if due[0] and what == "loss" else computed

    wrap(targets.TAKE_STEP, stepped)
    wrap(targets.LOSSES, with_fault)


def loss_scaler() -> None:
    """Give the accelerator a CPU loss scaler, as Accelerate does for fp16 on a GPU."""
    import torch

    def with_scaler(build: Callable[..., Any], *arguments: Any) -> Any:
        accelerator = build(*arguments)
        accelerator.scaler = torch.amp.GradScaler("cpu")
        return accelerator

    wrap(targets.BUILD_ACCELERATOR, with_scaler)


def note_edges(folder: str) -> None:
    """Append the edges of each step to a file of this rank in ``folder``: a line ``[step, edges]`` for each step."""

    def noted(take_step: Callable[..., Any], run: Any, batch: Any) -> Any:
        values = take_step(run, batch)
        with (Path(folder) / os.environ.get("RANK", "0")).open("a") as file:
            print(json.dumps([targets.steps_done(run), batch.edges.tolist()]), file=file)
        return values

    wrap(targets.TAKE_STEP, noted)


def bad_wandb(where: str, action: str, patience: float = 2) -> None:
    """Make wandb raise or sleep in ``init``, ``log`` or ``finish``.

    Args:
        patience: the time limits of the tracker in seconds.
    """
    import wandb

    for target in targets.TRACKER_SECONDS:
        targets.put(target, patience)

    class Run:
        id, offline, url, config = "abc", False, "https://wandb.example", {}

        def log(self, *_: object, **__: object) -> None:
            if where == "log":
                act(action)

        def finish(self) -> None:
            if where == "finish":
                act(action)

    def init(**_: object) -> Run:
        if where == "init":
            act(action)
        return Run()

    wandb.init = init


def lost_output(step: int, kind: str) -> None:
    """After step ``step``, redirect stdout and stderr to a closed terminal, a pipe without a reader, or a full disk.

    Args:
        kind: ``terminal``, ``full``, or another word for a pipe.
    """
    if kind == "full":
        lost = os.open("/dev/full", os.O_WRONLY)
    else:
        ours, lost = pty.openpty() if kind == "terminal" else os.pipe()
    now = lost
    if kind == "terminal":  # before the step too, so that the run shows a progress bar
        threading.Thread(target=_read_all, args=(ours,), daemon=True).start()
    else:
        now = os.open(os.devnull, os.O_WRONLY)
    for descriptor, stream in ((1, sys.stdout), (2, sys.stderr)):
        stream.flush()
        os.dup2(now, descriptor)
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]

    def lose() -> None:
        if kind != "full":
            os.close(ours)
        for descriptor in (1, 2):
            os.dup2(lost, descriptor)

    at_step(step, lose)


def _read_all(descriptor: int) -> None:
    with suppress(OSError):
        while os.read(descriptor, 1 << 16):
            pass


def slow_steps(seconds: float) -> None:
    """Make each step take at least ``seconds`` seconds."""

    def slow(take_step: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        time.sleep(seconds)
        return take_step(*arguments, **named)

    wrap(targets.TAKE_STEP, slow)


def at_file_call(inside: list[str], number: int, action: str, told: str | None = None) -> None:
    """Perform a fault before the ``number``-th call, from 1, that changes files.

    A fault after a call is a fault before the next one.

    Args:
        inside: dotted names of functions. Calls are counted over all their calls.
        action: as for :func:`act`, or ``power``: undo all writes that are not synced to the disk, and kill the process.
        told: a file for the names of the counted calls, one line for each call.
    """
    calls, disk = [0], None
    if action == "power":
        disk = Disk()
        sync = os.fsync

        def fsync(descriptor: int) -> None:
            path = os.readlink(f"/proc/self/fd/{descriptor}")  # noqa: F841, PTH115 - Disk.note reads this local variable
            sync(descriptor)

        os.fsync = fsync
    lines = Path(told).open("w", buffering=1) if told else None  # noqa: SIM115 - open for the rest of the run

    def profiled(frame: FrameType, event: str, function: Any) -> None:
        if event != "c_call" or not is_file_call(function):
            return
        sys.setprofile(None)
        calls[0] += 1
        if lines is not None:
            print(function.__name__, Path(frame.f_code.co_filename).name, frame.f_code.co_name, file=lines)
        if calls[0] == number:
            if disk is not None:
                disk.lose()
            act("SIGKILL" if disk is not None else action)
        if disk is not None:
            disk.note(function.__name__, frame.f_locals)
        sys.setprofile(profiled)

    def watched(function: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
        before = sys.getprofile()
        sys.setprofile(profiled)
        try:
            return function(*arguments, **named)
        finally:
            sys.setprofile(before)

    for target in inside:
        wrap(target, watched)


class Disk:
    """Simulates a power cut: files have their last synced contents, folders their last synced names.

    Follows the calls of :func:`at_file_call`'s ``fsync`` and of ``pathlib``, whose local variables hold the paths.
    """

    def __init__(self) -> None:
        self.synced: dict[Path, bytes] = {}
        # Renames in folders that are not synced: source, target, old contents of the target.
        self.renamed: list[tuple[Path, Path, bytes | None]] = []

    def note(self, call: str, names: dict[str, Any]) -> None:
        """Record a sync or a rename that is about to happen.

        Args:
            names: the local variables of the caller.
        """
        if call == "fsync":
            path = Path(names["path"])
            if path.is_dir():
                self.renamed = [entry for entry in self.renamed if entry[1].parent != path]
            else:
                self.synced[path] = path.read_bytes()
        elif call in ("rename", "replace"):
            source, target = Path(names["self"]), Path(names["target"])
            before = target.read_bytes() if target.is_file() else None
            self.renamed.append((source, target, before))
            for path in [path for path in self.synced if path == source or source in path.parents]:
                self.synced[target / path.relative_to(source)] = self.synced.pop(path)

    def lose(self) -> None:
        """Undo all writes and renames that are not synced."""
        for source, target, before in reversed(self.renamed):
            target.rename(source)
            if before is not None:
                target.write_bytes(before)
                self.synced[target] = before
        [output] = {path.parent for path in self.synced if path.name == "metrics.jsonl"} or {None}
        for path in output.rglob("*") if output else []:
            if path.is_file() and path.name not in ("config.yaml", ".lock") and path.parent.name != "features":
                synced = self.synced.get(path)
                if synced is None:
                    path.write_bytes(b"")
                elif path.read_bytes() != synced:
                    path.write_bytes(synced)


def is_file_call(function: Any) -> bool:
    """Return whether a built-in function changes files."""
    if function.__name__ not in FILE_CALLS:
        return False
    owner = function.__self__
    if isinstance(owner, io.IOBase):
        printed = getattr(owner, "name", None) in ("<stdout>", "<stderr>")
        return not (isinstance(owner, io.StringIO | io.BytesIO) or owner.closed or printed) and owner.writable()
    return owner in MODULES or function.__name__ == "write_end_of_file"  # of the file object of torch.save


def wrap(target: str, around: Callable[..., Any]) -> None:
    """Replace a function in all modules of the package that import it, or a method in its class.

    Args:
        target: the dotted name.
        around: called instead, with the original function and its arguments.
    """
    original = resolve_name(target)

    def wrapped(*arguments: Any, **named: Any) -> Any:
        return around(original, *arguments, **named)

    targets.put(target, wrapped)
    package = target.split(".")[0]
    for module in [module for key, module in sys.modules.items() if key.split(".")[0] == package]:
        for name in [name for name, value in vars(module).items() if value is original]:
            setattr(module, name, wrapped)
