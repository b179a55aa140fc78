"""Stop requests: SIGINT, SIGTERM and SIGUSR1 end a run within two steps, with its state written."""

import ctypes
import math
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from mmgraph.utils.log import flush_log

EXIT_CODE = 143
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
NO_SIGNAL = 0
PR_SET_PDEATHSIG = 1  # option of Linux's prctl


class StopRequest:
    """Tracks requests to stop this process.

    ``requested`` becomes true when this process receives a stop signal; further signals have no effect.
    ``stop_agreed`` becomes true when all ranks know of the request; they stop after the same step.

    A rank never finishes its step if the other ranks are gone. A watchdog therefore ends a process that has received a
    stop signal and does not finish its step in time, and prints the reason. :meth:`disarm` turns the watchdog off.

    Args:
        grace: seconds that the watchdog waits beyond the usual time of a step. Use less than 30, because a launcher
            kills the remaining processes 30 s after it has forwarded a signal.
    """

    def __init__(self, grace: float):
        self.requested, self.stop_agreed = False, False
        self._grace, self._stopping = grace, threading.Event()
        self._last_step = -math.inf  # start of the current step; -inf: no step yet; inf: watchdog suspended
        self._step_seconds = 0.0  # duration of the longest recent step

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the stop signals while the block runs.

        After an error in the block, a launched rank ignores SIGTERM until it exits.
        """
        read, write = os.pipe()
        os.set_blocking(write, False)
        # Python calls a handler only between two bytecodes, so not while this rank waits in a collective. A thread that
        # reads the signal numbers from a pipe gets them without delay.
        wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        before = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
        watcher = threading.Thread(target=self._watch, args=(read,), daemon=True)
        watcher.start()
        try:
            yield
        except Exception:
            # The launcher sends SIGTERM if a rank is lost. Keep the empty handler, so that this rank prints its error.
            if "RANK" in os.environ:
                del before[signal.SIGTERM]
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            self._stopping.set()
            # Closing the write end would not end the thread, because DataLoader workers hold copies of this end.
            os.write(write, bytes([NO_SIGNAL]))
            watcher.join()
            os.close(read)
            os.close(write)

    def step_finished(self) -> None:
        """Record a finished step, and restart the watchdog's clock.

        Call this after the step log has received the averaged losses of the previous step. These show that all ranks
        were alive recently, because every rank contributes to them.
        """
        now = time.monotonic()
        if math.isfinite(self._last_step):
            self._step_seconds = max(now - self._last_step, 0.9 * self._step_seconds)
        self._last_step = now

    @contextmanager
    def pause_watchdog(self) -> Iterator[None]:
        """Suspend the watchdog during the block, in which the main process writes and the other ranks wait for it.

        If a rank hangs in the block, the timeout of the collectives ends the run.
        """
        self._last_step = math.inf
        yield
        self._last_step = time.monotonic()

    @contextmanager
    def exclude_from_timing(self) -> Iterator[None]:
        """Exclude the block from the measured time of a step."""
        yield
        if math.isfinite(self._last_step):
            self._last_step = time.monotonic()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """Let stop signals raise ``KeyboardInterrupt`` in the block.

        Use it only where an interruption loses nothing of the run.
        """
        before = {number: signal.signal(number, signal.default_int_handler) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agree(self) -> None:
        """Record that all ranks know of the request and stop together."""
        self.stop_agreed = True
        self.disarm()

    def disarm(self) -> None:
        """Disarm the watchdog: the run is ending, which may take any amount of time."""
        self._stopping.set()

    def _watch(self, read: int) -> None:
        while (number := os.read(read, 1)[0]) != NO_SIGNAL:
            if self.requested or number not in STOP_SIGNALS:
                continue
            self.requested = True
            requested_at = time.monotonic()
            while not (
                late := time.monotonic() - max(requested_at, self._last_step) > self._step_seconds + self._grace
            ):
                if self._stopping.wait(timeout=0.2):
                    break
            if late:
                rank = os.environ.get("RANK", "0")
                print(
                    f"mmgraph: rank {rank} received a stop signal, and its step takes more than {self._grace:g} s "
                    "(--stop_grace) longer than usual: it exits without a new resume state; the last state is intact",
                    file=sys.stderr,
                    flush=True,
                )
                with suppress(OSError):
                    flush_log()
                os._exit(EXIT_CODE)


def follow_launcher() -> None:
    """Let the kernel send SIGTERM to this process when ``accelerate launch`` dies.

    A launcher that is killed cannot forward a signal, so its ranks would outlive it.
    """
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:  # the launcher always sets it
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
