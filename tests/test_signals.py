"""SIGTERM, Ctrl-C and kill -9 as processes meet them: the exit status, and the same bits in the end."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from jaxcnn.signals import Stopped, StopRequest, stop_on_signals
from jaxcnn.train.log import TIMINGS

FLAGS = "--data.batch-size 32 --data.validation 0.1 --optim.name sgd --optim.options momentum 0.9 --train.ema-decay 0.9"
FLAGS += " --train.accumulate 2 --train.log-every 10 --train.eval-every 40 --train.checkpoint-every 25"
QUICK, SLOW = "--model.name linear --train.steps 80", "--train.steps 800"


@pytest.fixture(scope="module")
def process_cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("process-cache")


@pytest.fixture(scope="module")
def start(process_cache) -> Callable[..., subprocess.Popen]:
    """Starts `jaxcnn train FLAGS` in a directory, as a process of one device."""
    own = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(process_cache), "XLA_FLAGS": ""}
    environment = os.environ | own
    command = [sys.executable, "-u", "-m", "jaxcnn", "train", *FLAGS.split(), "--run", "r", "--runs-dir"]

    def begin(directory: Path, flags: str) -> subprocess.Popen:
        both = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([*command, str(directory), *flags.split()], env=environment, **both)

    return begin


def without_timings(path: Path) -> list[dict]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def finished(process: subprocess.Popen, directory: Path) -> tuple:
    """What two runs must agree in, once the process has come to its end."""
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    run = directory / "lenet5_digits" / "r"
    summary = json.loads((run / "summary.json").read_text())
    del summary["seconds"]
    return summary, without_timings(run / "metrics.jsonl")


def signalled(process: subprocess.Popen, signum: int, *, line: int, delay: float = 0.0) -> int:
    """Sends the signal once so many lines were printed and so many seconds have passed; the exit status."""
    for _ in range(line):
        process.stdout.readline()
    time.sleep(delay)
    process.send_signal(signum)
    process.communicate(timeout=300)
    return process.returncode


def test_the_first_ctrl_c_asks_and_the_second_interrupts():
    with stop_on_signals() as stop:
        signal.raise_signal(signal.SIGINT)
        with pytest.raises(Stopped, match="SIGINT") as stopped:
            stop.check()
        assert stopped.value.exit_code == 130
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    StopRequest().check()


@pytest.mark.slow
def test_sigterm_exits_with_143_and_the_run_ends_in_the_same_bits(start, tmp_path):
    assert signalled(start(tmp_path / "a", QUICK), signal.SIGTERM, line=4) == 143
    assert list((tmp_path / "a/lenet5_digits/r/checkpoints").iterdir())
    expected = finished(start(tmp_path / "b", QUICK), tmp_path / "b")
    assert finished(start(tmp_path / "a", QUICK), tmp_path / "a") == expected


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM], ids=lambda s: s.name)
def test_ten_signals_at_random_moments(start, tmp_path, process_cache, signum):
    rng = random.Random(signum)
    for _ in range(10):
        # Two lines come before compilation, then one when a run goes on, and one every ten steps.
        line = rng.randint(1, 8)
        status = signalled(start(tmp_path / "a", SLOW), signum, line=line, delay=rng.uniform(0, 0.3))
        assert status == (143 if signum == signal.SIGTERM else -9)
    expected = finished(start(tmp_path / "b", SLOW), tmp_path / "b")
    compiled = set(process_cache.glob("jit_whole*-cache"))
    assert compiled
    assert finished(start(tmp_path / "a", SLOW), tmp_path / "a") == expected
    assert set(process_cache.glob("jit_whole*-cache")) == compiled  # a second start compiles from the cache
