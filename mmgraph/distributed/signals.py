"""Requests to stop: SIGINT, SIGTERM and SIGUSR1 end a run after the step in progress, with its state written."""

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
PR_SET_PDEATHSIG = 1  # of Linux's prctl


class StopRequest:
    """``requested`` turns true when this process is asked to stop; being asked again changes nothing.

    ``stop_agreed`` turns true when all ranks know of a request, and stop after the same step.

    A rank whose others are gone never finishes its step. So where one that is asked to stop neither finishes a step in
    time nor begins to stop with the others (see :meth:`begin`), the process says why and ends.

    Args:
        grace: seconds for that, on top of what a step takes. A launcher kills what is left 30 s after it has
            forwarded a signal.
    """

    def __init__(self, grace: float):
        self.requested, self.stop_agreed = False, False
        self._grace, self._begun = grace, threading.Event()
        self._heard = -math.inf  # when a step was last finished with the others
        self._step_seconds = 0.0  # of the longest step of late

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Answer the signals while the block runs. A launched rank that an error ends heeds SIGTERM no more."""
        read, write = os.pipe()
        os.set_blocking(write, False)
        # Python calls a handler between two bytecodes, so not while this rank waits for others in a collective: a
        # thread that reads the numbers of the signals as they come is never late.
        wakeup = signal.set_wakeup_fd(write, warn_on_full_buffer=False)
        before = {number: signal.signal(number, lambda *_: None) for number in STOP_SIGNALS}
        watcher = threading.Thread(target=self._watch, args=(read,), daemon=True)
        watcher.start()
        try:
            yield
        except Exception:
            if "RANK" in os.environ:  # a launcher sends it where a rank is lost: the others have yet to say so
                del before[signal.SIGTERM]
            raise
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)
            signal.set_wakeup_fd(wakeup)
            self._begun.set()
            os.write(write, bytes([NO_SIGNAL]))  # closing would not do: DataLoader workers inherited this end
            watcher.join()
            os.close(read)
            os.close(write)

    def step_finished(self) -> None:
        """A step is done, and the others were heard of: the losses of the step before it are here."""
        now = time.monotonic()
        if math.isfinite(self._heard):
            self._step_seconds = max(now - self._heard, 0.9 * self._step_seconds)
        self._heard = now

    @contextmanager
    def pause_watchdog(self) -> Iterator[None]:
        """Let the block take as long as it takes: the main process writes, the others wait for it.

        A rank that hangs here is found by the time limit of collectives.
        """
        self._heard = math.inf
        yield
        self._heard = time.monotonic()

    @contextmanager
    def exclude_from_timing(self) -> Iterator[None]:
        """The block is no step: how long it takes says nothing of what a step does."""
        yield
        if math.isfinite(self._heard):
            self._heard = time.monotonic()

    @contextmanager
    def interruptible(self) -> Iterator[None]:
        """The signals raise ``KeyboardInterrupt`` in the block: nothing of the run is lost by leaving it."""
        before = {number: signal.signal(number, signal.default_int_handler) for number in STOP_SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def agree(self) -> None:
        """All ranks have learnt of the request, and stop together."""
        self.stop_agreed = True
        self.begin()

    def begin(self) -> None:
        """The run ends: stopping may take as long as it takes."""
        self._begun.set()

    def _watch(self, read: int) -> None:
        while (number := os.read(read, 1)[0]) != NO_SIGNAL:
            if self.requested or number not in STOP_SIGNALS:
                continue
            self.requested = True
            asked = time.monotonic()
            while not (late := time.monotonic() - max(asked, self._heard) > self._step_seconds + self._grace):
                if self._begun.wait(timeout=0.2):
                    break
            if late:
                rank = os.environ.get("RANK", "0")
                print(
                    f"mmgraph: rank {rank} was asked to stop, and has finished no step for {self._grace:g} s "
                    "(--stop_grace) more than one takes: it ends without a new state; the last one stands",
                    file=sys.stderr,
                    flush=True,
                )
                with suppress(OSError):
                    flush_log()
                os._exit(EXIT_CODE)


def follow_launcher() -> None:
    """Be asked to stop when ``accelerate launch`` dies, of a signal that it does not forward: leave no orphans."""
    if sys.platform == "linux" and "ACCELERATE_MIXED_PRECISION" in os.environ:  # which the launcher always sets
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
