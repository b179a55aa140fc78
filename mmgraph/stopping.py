"""Being asked to stop: Ctrl-C, SIGTERM and SIGUSR1 end a run after the step in progress, with its state written."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

EXIT_CODE = 143
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


class StopRequest:
    """``requested`` turns true when this process is asked to stop; a second Ctrl-C stops at once."""

    def __init__(self) -> None:
        self.requested = False

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Answer the signals while the block runs."""
        before = [signal.signal(number, self._answer) for number in STOP_SIGNALS]
        try:
            yield
        finally:
            for number, handler in zip(STOP_SIGNALS, before, strict=True):
                signal.signal(number, handler)

    def _answer(self, number: int, _: object) -> None:
        if self.requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.requested = True
