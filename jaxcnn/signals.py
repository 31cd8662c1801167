"""SIGTERM and Ctrl-C ask a run to stop; it finishes the step, saves, and leaves with 143 or 130."""

import contextlib
import signal
import threading
from collections.abc import Iterator


class Stopped(Exception):
    """The run was asked to stop and has saved what it had."""

    def __init__(self, signum: int):
        super().__init__(f"stopped by {signal.Signals(signum).name}")
        self.exit_code = 128 + signum


class StopRequest:
    """Polled in training, in evaluation and before compiling."""

    signum: int | None = None

    def check(self) -> None:
        """Raises `Stopped` if a signal came."""
        if self.signum is not None:
            raise Stopped(self.signum)


_active: StopRequest | None = None


@contextlib.contextmanager
def stop_on_signals() -> Iterator[StopRequest]:
    """Within, the first SIGTERM or Ctrl-C only sets the request; a second Ctrl-C interrupts at once.

    Nested uses share the outermost request. Outside the main thread no handler can be set, and none is.
    """
    global _active
    if _active is not None or threading.current_thread() is not threading.main_thread():
        yield _active or StopRequest()
        return
    request = _active = StopRequest()

    def handle(signum: int, frame: object) -> None:
        if signum == signal.SIGINT and request.signum is not None:
            raise KeyboardInterrupt
        request.signum = signum

    before = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        _active = None
        for signum, handler in before.items():
            signal.signal(signum, handler)
