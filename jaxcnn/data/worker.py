"""Worker processes that make batches, and what each does first.

No worker shares a lock with another process, so that one that is killed, at whatever moment, leaves nobody waiting
(Grain's own share some, multiprocessing's queues and events). Signals are the training process's to answer: Ctrl-C and
SIGTERM reach the whole group, and workers that died of them would take the last checkpoint along. JAX stays out: a
worker needs neither the memory and the seconds that its import takes, nor an accelerator.
"""

import contextlib
import multiprocessing
import queue
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Callable, Iterator
from multiprocessing import util
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from jaxcnn.errors import InputError, TrainingFailed
from jaxcnn.signals import spare_new_threads

ATTEMPTS = 3
"""So many workers may be lost to one batch before the run fails."""

Batch = dict[str, np.ndarray]
Make = Callable[[int], Batch]
_starting = threading.Lock()


class Workers:
    """`workers.make(index)` is `make(index)`, made by one of `count` processes; from any thread.

    `make` is pickled. Each process shares `room` bytes of memory with this one for the arrays of a batch; those that
    find no more room come through its pipe. A process that ended is replaced, and its batch made anew.
    """

    def __init__(self, make: Make, count: int, *, room: int):
        self._make, self._room, self.count = make, room, count
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        self._lock, self._closed = threading.Lock(), False
        self._workers = {_Worker(make, room) for _ in range(count)}
        for worker in self._workers:
            self._idle.put(worker)

    def make(self, index: int) -> Batch:
        """Raises what `make` raised there, and `TrainingFailed` if `ATTEMPTS` processes were lost to the batch."""
        worker = self._idle.get()
        try:
            for _ in range(ATTEMPTS):
                try:
                    made = worker.ask(index)
                except (EOFError, OSError):
                    if self._closed:
                        raise
                    lost = f"a worker process ended with exit code {worker.exit_code()}"
                    print(f"warning: batch {index}: {lost}; another takes its place", file=sys.stderr, flush=True)
                    worker = self._replace(worker)
                else:
                    if isinstance(made, Exception):
                        raise made
                    return made
        finally:
            self._idle.put(worker)
        raise TrainingFailed(
            f"batch {index} could not be decoded in {ATTEMPTS} attempts: {lost}; if memory or /dev/shm ran out, use"
            f" fewer --workers than {self.count}, or 0"
        )

    def _replace(self, worker: "_Worker") -> "_Worker":
        with self._lock:
            if self._closed:
                return worker
            self._workers.remove(worker)
            self._workers.add(new := _Worker(self._make, self._room))
            return new

    def close(self) -> None:
        """Ends the processes, whatever they are at."""
        with self._lock:
            self._closed = True
            for worker in self._workers:
                worker.end()


class _Worker:
    """One process, asked by one thread at a time. It ends with the training process, however that ends."""

    def __init__(self, make: Make, room: int):
        context = multiprocessing.get_context("spawn")
        memory = context.RawArray("B", max(room, 1))  # has no name: a process that is killed leaves nothing
        self._room, self._first = np.frombuffer(memory, np.uint8), [make]
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(theirs, memory), name="jaxcnn-worker", daemon=True)
        with _starting, _first_in_children(), spare_new_threads():
            self._process.start()
        theirs.close()  # so that the end of the process is the end of the pipe
        self.end = util.Finalize(self, _kill, (self._process,), exitpriority=1)

    def ask(self, index: int) -> Batch | Exception:
        """The batch, or what it raised. `EOFError` or `OSError` if the process has ended."""
        while self._first:  # waits until the process reads, so not on starting: several do it at a time
            self._pipe.send(self._first.pop())
        self._pipe.send(index)
        reply = self._pipe.recv()
        return reply if isinstance(reply, Exception) else {name: self._take(part) for name, part in reply.items()}

    def _take(self, part: Any) -> np.ndarray:
        if isinstance(part, np.ndarray):
            return part
        start, shape, dtype = part
        size = np.dtype(dtype).itemsize * int(np.prod(shape))
        return self._room[start : start + size].view(dtype).reshape(shape).copy()

    def exit_code(self) -> int | None:
        """Of a process whose pipe has ended."""
        for _ in range(100):
            if (code := self._process.exitcode) is not None:
                return code
            time.sleep(0.01)  # it is about to end, or another thread has heard of it and is about to note it
        return None


def _kill(process: Any) -> None:
    process.kill()
    process.join()


@contextlib.contextmanager
def _first_in_children() -> Iterator[None]:
    """Processes started within run this module first, and not the main script of this process again."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = sys.modules[__name__]
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _serve(pipe: Connection, memory: Any) -> None:
    """The whole of a worker: `make` comes, then indices come and batches go."""
    room = np.frombuffer(memory, np.uint8)
    with contextlib.suppress(EOFError, OSError):  # the training process has ended
        make = pipe.recv()
        while True:
            index = pipe.recv()
            try:
                reply: Any = _put(make(index), room)
            except Exception as error:
                if not isinstance(error, InputError):
                    error.add_note(traceback.format_exc())
                reply = error
            pipe.send(reply)


def _put(batch: Batch, room: np.ndarray) -> dict[str, Any]:
    """Where each array lies in `room`, as (start, shape, type), or the array itself."""
    reply, start = {}, 0
    for name, array in batch.items():
        if start + array.nbytes > len(room):
            reply[name] = array
            continue
        room[start : start + array.nbytes] = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
        reply[name] = (start, array.shape, array.dtype.str)
        start += -(-array.nbytes // 16) * 16
    return reply


if __name__ == "__mp_main__":
    for signum in (signal.SIGTERM, signal.SIGINT):
        signal.signal(signum, signal.SIG_IGN)
    warnings.simplefilter("ignore")  # Pillow's, about metadata that plays no part here
