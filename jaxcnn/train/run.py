"""A run directory: one process at a time, one configuration, one environment, written atomically."""

import contextlib
import errno
import fcntl
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from jaxcnn.config import differences
from jaxcnn.errors import InputError
from jaxcnn.files import json_sha256, write_json

REFUSED = ("versions", "xla_flags", "device_kind", "data")
"""Fields of `environment.json` on which the bits of a run depend: resuming under others is refused."""
WARNED = {
    "devices": "batches, order and augmentation stay exact, sums are rounded in another order",
    "processes": "batches, order and augmentation stay exact, sums are rounded in another order",
    "cores": "batches, order and augmentation stay exact, CPU kernels may round differently",
    "git": "results stay exact only if the code that they depend on is the same",
}
ELASTIC = "every bit stays exact, by --train.elastic"
"""What holds instead under another number of devices, processes or cores there."""
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy")


class RunDirectory:
    """Holds the lock of `path` from opening to `close` (or the end of the process, however it ends).

    As a context manager it also takes a directory that it made itself away again if the input turns out bad.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        *,
        config: Mapping[str, Any],
        environment: Mapping[str, Any],
        accept_environment: bool = False,
        upgrade: Callable[[Mapping[str, Any]], Mapping[str, Any]] = dict,
    ):
        """Creates or reopens the run. `InputError` if another process has it, if it holds another configuration
        or environment (with the difference), or if nothing can be written there. `upgrade` gives an older
        configuration the fields of today."""
        self.path = Path(path).absolute()
        self.warnings: list[str] = []
        self._lock: int | None = None
        self._made: list[Path] = []
        try:
            self._made = [p for p in (self.path, *self.path.parents) if not p.exists()]
            self.path.mkdir(parents=True, exist_ok=True)
            self._take_lock()
            self._settle(config, environment, accept_environment, upgrade)
        except OSError as error:
            self._take_away()
            raise InputError(
                f"run directory {self.path} cannot be written: {error.strerror}; choose another --runs-dir or make room"
            ) from error
        except InputError:
            self.close()
            raise

    def _take_lock(self) -> None:
        self._lock = os.open(self.path / "lock", os.O_RDWR | os.O_CREAT, 0o644)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise InputError(f"{_in_use(self.path, self._lock)}: wait for it, or give another --run name") from None
        os.ftruncate(self._lock, 0)
        os.write(self._lock, f"{os.getpid()}\n".encode())

    def _settle(
        self, config: Mapping[str, Any], environment: Mapping[str, Any], accept: bool, upgrade: Callable
    ) -> None:
        old_config, old_environment = self.read("config.json"), self.read("environment.json")
        environment = {**environment, "config_sha256": json_sha256(config)}
        if old_config is not None and config_altered(old_config, old_environment or {}):
            environment["config_sha256"] = old_environment["config_sha256"]  # going on does not hide it
        if old_config is not None:  # fields that were added since have their defaults
            old_config = upgrade(old_config)
        if old_config is not None and (changed := differences(old_config, config)):
            raise InputError(
                f"run {self.path} was made with another configuration:\n  "
                + "\n  ".join(changed)
                + "\ngive another --run name, or the same flags"
            )
        if old_config is not None and old_environment is not None:
            elastic = bool(config.get("train", {}).get("elastic"))
            refused, warned = compare_environments(old_environment, environment, elastic=elastic)
            if refused and not accept:
                raise InputError(
                    f"run {self.path} was made in another environment, its bits cannot be continued here:\n  "
                    + "\n  ".join(refused)
                    + "\n--accept-environment goes on all the same"
                )
            self.warnings = refused + warned
        if self.read("summary.json") is None:  # what made a finished run stays
            self.write("environment.json", environment)
            self.write("config.json", config)

    def read(self, name: str) -> Any:
        """A JSON file of the run, or None where there is none."""
        return read_json(self.path / name)

    def write(self, name: str, values: Any) -> None:
        """Writes a JSON file whole or not at all."""
        write_json(self.path / name, values)

    def require_space(self, needed: int) -> None:
        """`InputError` unless `needed` bytes are free."""
        free = shutil.disk_usage(self.path).free
        if free < needed:
            raise InputError(
                f"run directory {self.path} has {free} bytes free and its checkpoints need {needed}:"
                " make room or choose another --runs-dir"
            )

    def close(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> "RunDirectory":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and issubclass(kind, InputError):
            self._take_away()
        else:
            self.close()

    def _take_away(self) -> None:
        """Leaves nothing of what was made here; a run that was there before, or has trained, stays as it is."""
        with contextlib.suppress(OSError):  # nothing was made, or another run lies beside it by now
            if self._made and not (self.path / "checkpoints").exists():
                shutil.rmtree(self.path)
                for parent in self._made[1:]:
                    parent.rmdir()
        self.close()


@contextlib.contextmanager
def reading(path: Path) -> Iterator[None]:
    """Keeps others from training the run `path` while it is read, and changes nothing there. `InputError` while a
    process trains it."""
    try:
        lock = os.open(path / "lock", os.O_RDONLY)
    except FileNotFoundError:  # a copy without it: nobody trains that
        yield
        return
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in (errno.EWOULDBLOCK, errno.EACCES):
                raise
            raise InputError(f"{_in_use(path, lock)}: wait until it ends, or stop it") from None
        yield
    finally:
        os.close(lock)


def _in_use(path: Path, lock: int) -> str:
    return f"run {path} is in use by process {os.read(lock, 100).decode(errors='replace').strip()}"


def read_json(path: Path) -> Any:
    """The file's content, or None where there is no such file; `InputError` if it is not JSON."""
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise InputError(f"{path} is not valid JSON ({error}): restore it, or give another --run name") from None


def environment(*, data: Mapping[str, str], beside: Path | None = None) -> dict[str, Any]:
    """What the bits of a run depend on beside its configuration; `data` maps file names to SHA-256, `beside` is a file
    of the same checkout whose code counts too."""
    devices = jax.devices()
    return {
        "versions": {name: importlib.metadata.version(name) for name in _PACKAGES},
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "device_kind": devices[0].device_kind,
        "devices": len(devices),
        "processes": jax.process_count(),
        "cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "data": dict(data),
        "git": _git_hash(beside),
        "python": platform.python_version(),
    }


def _git_hash(beside: Path | None = None) -> str | None:
    """The commit of this package's checkout, `+` where its files or `beside` differ from it; None outside one."""

    def git(*words: str) -> str:
        here = Path(__file__).parent
        return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True, check=True).stdout.strip()

    paths = [".", *([str(beside)] if beside else [])]
    try:
        return git("rev-parse", "HEAD") + ("+" if git("status", "--porcelain", "--", *paths) else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def config_altered(config: Mapping[str, Any], environment: Mapping[str, Any]) -> bool:
    """Whether `config.json` is not what the run began with; unknown, so False, of runs made before its digest was."""
    return environment.get("config_sha256") not in (None, json_sha256(config))


def compare_environments(
    old: Mapping[str, Any], new: Mapping[str, Any], *, elastic: bool
) -> tuple[list[str], list[str]]:
    """The differences on which the bits depend, and those that deserve a warning, one line each."""
    refused, warned = [], []
    old = {"processes": 1, **old}  # as it was before it was written down
    for field in REFUSED:
        refused += differences({field: old.get(field)}, {field: new.get(field)})
    for field, meaning in WARNED.items():
        meaning = ELASTIC if elastic and field != "git" else meaning
        warned += [f"{line} ({meaning})" for line in differences({field: old.get(field)}, {field: new.get(field)})]
    return refused, warned
