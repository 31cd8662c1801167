"""SIGTERM and Ctrl-C ask a run to stop; it finishes the step, saves, and leaves with 143 or 130.

A handled signal must not meet a thread that computes on its ordinary stack. The matrix product of XLA's convolutions on
CPU (oneDNN's AVX-512 sgemm) lets the stack pointer point at a buffer on the heap, and Linux writes the frame of a
signal, three kilobytes, below it, over whatever lies there: a step became NaN, or the process aborted. So the main
thread takes signals on a stack of their own, and the threads of JAX's devices take none.
"""

import contextlib
import faulthandler
import os
import signal
import sys
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

    _use_own_stack()
    before = {s: signal.signal(s, handle) for s in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield request
    finally:
        _active = None
        for signum, handler in before.items():
            signal.signal(signum, handler)


@contextlib.contextmanager
def spare_new_threads() -> Iterator[None]:
    """Threads and processes that start within, JAX's when it starts its devices, never take SIGTERM or Ctrl-C."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _use_own_stack() -> None:
    """Python's handlers run on the alternate stack of a thread that has one, and `faulthandler` gives it one."""
    if faulthandler.is_enabled():
        return
    try:
        faulthandler.enable(sys.__stderr__)  # type: ignore[arg-type]
    except (AttributeError, RuntimeError, ValueError, OSError):  # no console: a crash cannot be shown
        faulthandler.enable(open(os.devnull, "w"))  # noqa: SIM115 - as long as the process lives
