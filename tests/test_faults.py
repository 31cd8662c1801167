"""A run that ends at a named point, or at any moment, goes on to the same result; a full disk costs a save alone."""

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from runs import finish, outcome, start

from jaxcnn.faults import POINTS

FLAGS = [
    *("train", "--data.validation", "0.2", "--data.batch-size", "32", "--train.log-every", "5"),
    *("--train.checkpoint-every", "10", "--train.eval-every", "15", "--seed", "3"),
]
SAVES = {"sync": "--no-async-saves", "async": "--async-saves"}
pytestmark = pytest.mark.slow


class Case:
    """Runs of one configuration, below one directory and with one compile cache."""

    def __init__(self, root: Path, steps: int):
        self.root, self.steps = root, steps
        self.environment = {"JAX_COMPILATION_CACHE_DIR": str(root / "xla"), "JAX_NUM_CPU_DEVICES": "1"}
        assert self.finish("whole", "async") == 0
        self.whole = outcome(self.path("whole"))

    def path(self, name: str) -> Path:
        return self.root / "runs" / "lenet5_digits" / name

    def argv(self, name: str, saves: str) -> list[str]:
        where = ["--runs-dir", str(self.root / "runs"), "--run", name]
        return [*FLAGS, *where, "--train.steps", str(self.steps), SAVES[saves]]

    def output(self, name: str) -> Path:
        return self.root / f"{name}.txt"

    def finish(self, name: str, saves: str, **environment: str) -> int:
        return finish(self.argv(name, saves), self.output(name), **self.environment, **environment)


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    return Case(tmp_path_factory.mktemp("faults"), steps=60)


@pytest.mark.parametrize("saves", SAVES)
@pytest.mark.parametrize("point", POINTS)
def test_a_run_that_ends_at_a_point_goes_on_to_the_same_result(case, point, saves):
    name = f"{point}-{saves}"
    if point == "restore":  # there must be something to restore
        assert case.finish(name, saves, JAXCNN_FAULT="save.committed:2") == 137
    number = 1 if point in ("restore", "summary") else 3
    assert case.finish(name, saves, JAXCNN_FAULT=f"{point}:{number}") == 137, case.output(name).read_text()
    assert not (case.path(name) / "summary.json").exists()
    assert case.finish(name, saves) == 0, case.output(name).read_text()
    assert outcome(case.path(name)) == case.whole


@pytest.mark.parametrize("saves", SAVES)
def test_twenty_kills_at_any_moment(tmp_path, saves):
    case, name, draw = Case(tmp_path, steps=400), "killed", random.Random(5)
    for _ in range(20):
        process = start(case.argv(name, saves), case.output(name), **case.environment)
        time.sleep(draw.uniform(0.5, 6))
        process.kill()
        process.join()
    assert case.finish(name, saves) == 0, case.output(name).read_text()
    assert outcome(case.path(name)) == case.whole


def test_a_second_process_on_the_same_run_is_refused(case):
    process = start(case.argv("locked", "async"), case.output("locked"), **case.environment)
    lock = case.path("locked") / "lock"
    for _ in range(600):
        if lock.exists() and lock.read_text().strip():
            break
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGSTOP)
    try:
        assert finish(case.argv("locked", "async"), case.output("second"), **case.environment) == 2
        said = case.output("second").read_text()
        assert f"is in use by process {process.pid}: wait for it, or give another --run name" in said
    finally:
        os.kill(process.pid, signal.SIGCONT)
    process.join(120)
    assert process.exitcode == 0
    assert outcome(case.path("locked")) == case.whole


def test_the_clock_may_go_backwards(case):
    """The run asks only clocks that cannot: times of files and of the wall are never compared."""
    assert case.finish("clock", "async", JAXCNN_FAULT="save.committed:3") == 137
    path = case.path("clock")
    for file in [path, *path.rglob("*")]:
        os.utime(file, (0, 0))  # as if all of it were of 1970, and the newest checkpoint older than the first
    assert case.finish("clock", "async") == 0
    assert outcome(path) == case.whole


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 8 MB; skipped where none can be mounted."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "tmpfs", str(disk)], capture_output=True, text=True, check=False
    )
    if mounted.returncode:
        pytest.skip(f"no private mount here: {mounted.stderr.strip()}")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("saves", SAVES)
def test_a_full_disk_costs_that_save_alone(case, small_disk, tmp_path, saves):
    """A checkpoint takes about 0.8 MB; the disk is filled while the run goes on, and freed again."""
    name, runs = f"full-{saves}", small_disk / "runs"
    argv = case.argv(name, saves)
    argv[argv.index("--runs-dir") + 1] = str(runs)
    argv[argv.index("--train.steps") + 1] = "400"
    path = runs / "lenet5_digits" / name
    process = start(argv, case.output(name), **case.environment)
    wait_for(lambda: len(steps_of(path)) >= 2, process)
    os.kill(process.pid, signal.SIGSTOP)
    ballast = small_disk / "ballast"
    before = steps_of(path)
    ballast.write_bytes(b"\0" * (shutil.disk_usage(small_disk).free - 20_000))
    os.kill(process.pid, signal.SIGCONT)
    wait_for(lambda: "could not be written" in case.output(name).read_text(), process)
    time.sleep(0.5)
    os.kill(process.pid, signal.SIGSTOP)
    said = case.output(name).read_text()
    assert f"checkpoint {path}/checkpoints/" in said
    assert "bytes are free" in said
    assert set(before) <= {p.name for p in (path / "checkpoints").iterdir()}
    ballast.unlink()
    os.kill(process.pid, signal.SIGCONT)
    process.join(300)
    assert process.exitcode == 0, case.output(name).read_text()
    assert (path / "summary.json").exists()
    assert not [p for p in (path / "checkpoints").iterdir() if not p.name.isdigit()]


def steps_of(path: Path) -> list[str]:
    return sorted(p.parent.name for p in path.glob("checkpoints/*/MANIFEST.json"))


def wait_for(condition, process, seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.is_alive(), "the run ended early"
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.02)
