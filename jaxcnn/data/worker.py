"""What a process that decodes images does first: multiprocessing runs this module there in place of the user's script.

Signals are the training process's to answer: Ctrl-C and SIGTERM reach the whole group, and workers that died of them
would take the last checkpoint along. JAX is kept out, which Grain would import: a worker needs neither the memory and
the seconds that this takes, nor an accelerator.
"""

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
import warnings
from collections.abc import Iterator
from multiprocessing.connection import wait

START_SECONDS = 60
"""After so long a process that is not there counts as failed, which Grain then reports."""


@contextlib.contextmanager
def first_in_children(count: int) -> Iterator[None]:
    """The `count` processes started within run this module first, and not the main script of this process again.

    Waits for all of them to be started, as Grain does that in threads.
    """
    main, before = sys.modules["__main__"], set(multiprocessing.active_children())
    sys.modules["__main__"] = sys.modules[__name__]
    try:
        yield
        deadline = time.monotonic() + START_SECONDS
        while len(set(multiprocessing.active_children()) - before) < count and time.monotonic() < deadline:
            time.sleep(0.005)
    finally:
        sys.modules["__main__"] = main


def begin(index: int, count: int) -> None:
    """Grain calls this in a worker before the first batch: the worker ends with its parent, however that ends."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        wait([parent.sentinel])
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()


if __name__ == "__mp_main__":
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    sys.modules["jax"] = None  # type: ignore[assignment]  # an import of it fails, and Grain does without
    logging.disable(logging.WARNING)  # Grain would say so in every worker
    warnings.simplefilter("ignore")  # Pillow's, about metadata that plays no part here
