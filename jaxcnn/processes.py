"""Several processes that train one run: how they find each other, what they agree on, how they notice a death.

JAX's distributed runtime connects them. All of them run the same program; what only the first one may do, its outcome
an error or not, is told to the others, so that they go the same way. A process that dies takes the others along within
seconds: each holds a connection to the first one, which the kernel closes however a process ends, where a collective
would wait for minutes or for ever.
"""

import json
import os
import socket
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from jaxcnn import parallel
from jaxcnn.config import differences
from jaxcnn.errors import InputError

AUTO = "auto"
"""The coordinator that SLURM, Open MPI, Kubernetes (JobSet) or a TPU pod says."""
GRACE = 3.0
"""Seconds that a process has to say its own error after another one ended."""
_DAY_MS = 86_400_000
_WELL = b"."

_lifeline: "_Lifeline | None" = None
_rounds = 0


def start(coordinator: str | None, processes: int | None, process: int | None) -> None:
    """Connects this process with the others, before JAX starts a device; nothing where no flag is given.

    `coordinator` is HOST:PORT of the first process, given to all of them with their number `processes` and `process`,
    this one's from 0; or "auto", from the environment of a cluster. `InputError` for anything else, and where the
    others do not come.
    """
    given = (coordinator, processes, process)
    if given == (None, None, None):
        return
    if coordinator is None or (coordinator != AUTO and None in given):
        raise InputError(
            f"--coordinator {coordinator} --processes {processes} --process {process}: give all three, or --coordinator"
            " auto under SLURM, Open MPI, Kubernetes or on a TPU pod"
        )
    if processes is not None and not 0 <= (process or 0) < processes:
        raise InputError(f"--process {process} must be from 0 to {processes - 1}, --processes less one")
    jax.config.update("jax_enable_preemption_service", False)  # it would take SIGTERM from our own handler
    options: dict[str, Any] = {"num_processes": processes, "process_id": process}
    if coordinator != AUTO:  # by default it would listen on every interface
        options["coordinator_address"] = coordinator
        options["coordinator_bind_address"] = os.environ.get("JAX_COORDINATOR_BIND_ADDRESS", coordinator)
    try:
        jax.distributed.initialize(**options)
    except (ValueError, RuntimeError) as error:
        reason = str(error).strip().splitlines()[0]
        raise InputError(f"--coordinator {coordinator}: the processes could not be connected: {reason}") from error
    if jax.process_count() > 1:
        global _lifeline
        _lifeline = _Lifeline()


def several() -> bool:
    """Whether this run has other processes too."""
    return _lifeline is not None


def first() -> bool:
    """Whether this process is the one that writes."""
    return _lifeline is None or jax.process_index() == 0


def from_first(make: Callable[[], Any]) -> Any:
    """What `make()` gives in the first process, in every process: JSON types. An `InputError` there is one here."""
    if not several():
        return make()
    key, client = _key("first"), _client()
    if first():
        try:
            reply = {"value": make()}
        except InputError as error:
            reply = {"error": str(error)}
        client.key_value_set(key, json.dumps(reply))
    reply = json.loads(client.blocking_key_value_get(key, _DAY_MS))
    if "error" in reply:
        client.wait_at_barrier(key.replace("/", "-"), 60_000)  # the first one keeps what the others read
        raise InputError(reply["error"])
    return reply["value"]


def same(what: str, value: Mapping[str, Any]) -> None:
    """`InputError` in every process, with the difference, unless `value`, JSON types, is the same in all of them."""
    if not several():
        return
    key, client = _key("same"), _client()
    client.key_value_set(f"{key}/{jax.process_index()}", json.dumps(value, sort_keys=True))
    values = [json.loads(client.blocking_key_value_get(f"{key}/{i}", _DAY_MS)) for i in range(jax.process_count())]
    for i, other in enumerate(values):
        if changed := differences(values[0], other):
            client.wait_at_barrier(key.replace("/", "-"), 60_000)
            raise InputError(f"process {i} has another {what} than process 0:\n  " + "\n  ".join(changed))


class Agreement:
    """The largest of a number that each process has, the same answer everywhere at the same call."""

    def __init__(self, mesh: Mesh):
        self._sharding, self._devices = parallel.by_example(mesh), mesh.size
        self._largest = jax.jit(lambda values: values.max(), out_shardings=parallel.replicated(mesh))
        self._asked: deque[jax.Array] = deque()

    def __call__(self, value: int, *, lag: int = 0) -> int:
        """The answer of `lag` calls ago, 0 before there is one: with some, no device waits for its host."""
        values = np.full(self._devices, value, np.int32)
        asked = jax.make_array_from_callback(values.shape, self._sharding, lambda index: values[index])
        self._asked.append(self._largest(asked))
        return int(self._asked.popleft()) if len(self._asked) > lag else 0


def end(status: int, *, together: bool) -> int:
    """Leaves the others in peace, once they are here too, and returns the exit status; or, where this process failed
    alone, ends it here and now: they would wait in vain."""
    global _lifeline
    if _lifeline is None:
        return status
    if not together:
        sys.stdout.flush()
        sys.stderr.flush()
        time.sleep(0 if jax.process_index() else GRACE / 2)  # the coordinator last: its end ends the others at once
        os._exit(status)
    _client().wait_at_barrier("jaxcnn-end", _DAY_MS)
    _lifeline.leave()
    _lifeline = None
    jax.distributed.shutdown()
    return status


def _client() -> Any:
    from jax._src import distributed  # the key-value store of the runtime has no public name

    return distributed.global_state.client


def _key(kind: str) -> str:
    global _rounds
    _rounds += 1
    return f"jaxcnn/{kind}/{_rounds}"


class _Lifeline:
    """A connection of every process with the first. One that closes without a last word ends this process too."""

    def __init__(self) -> None:
        from jax._src import distributed

        self._leaving = False
        key, client = "jaxcnn/lifeline", _client()
        host = str(distributed.global_state.coordinator_address).rpartition(":")[0].strip("[]")
        if jax.process_index() == 0:
            server = _listen(host)
            client.key_value_set(key, f"{host} {server.getsockname()[1]}")
            self._ends = dict(self._accept(server) for _ in range(jax.process_count() - 1))
            server.close()
        else:
            host, port = client.blocking_key_value_get(key, _DAY_MS).split()
            connection = socket.create_connection((host, int(port)), timeout=60)
            connection.settimeout(None)
            connection.sendall(jax.process_index().to_bytes(4, "big"))
            self._ends = {0: connection}
        for process, connection in self._ends.items():
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            threading.Thread(target=self._watch, args=(process, connection), daemon=True).start()

    def _accept(self, server: socket.socket) -> tuple[int, socket.socket]:
        connection, _ = server.accept()
        return int.from_bytes(connection.recv(4, socket.MSG_WAITALL), "big"), connection

    def _watch(self, process: int, connection: socket.socket) -> None:
        try:
            last = connection.recv(1)
        except OSError:
            last = b""
        if last == _WELL or self._leaving:
            return
        if process:  # the first one takes the coordinator along, and JAX ends this process within milliseconds
            time.sleep(GRACE)
        print(
            f"error: process {process} of {jax.process_count()} ended (its own output may say why): this one ends too."
            " The run is whole up to its newest checkpoint: start all processes again with the same command",
            file=sys.stderr,
            flush=True,
        )
        os._exit(1)

    def leave(self) -> None:
        self._leaving = True
        for connection in self._ends.values():
            try:
                connection.sendall(_WELL)
            except OSError:
                continue  # it left first


def _listen(host: str) -> socket.socket:
    try:
        return socket.create_server((host, 0))
    except OSError:  # an address of a service, not of this machine
        return socket.create_server(("", 0))
