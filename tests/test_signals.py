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


HAIL = """
import os, signal, subprocess, sys, time
from jaxcnn import parallel, platform
from jaxcnn.signals import stop_on_signals
platform.setup(compile_cache=False)
import jax, jax.numpy as jnp, numpy as np
rng = np.random.default_rng(0)
images, kernel = (rng.normal(size=s).astype(np.float32) for s in ((32, 28, 28, 6), (5, 5, 6, 16)))
dimensions = ("NHWC", "HWIO", "NHWC")
with stop_on_signals() as stop:
    parallel.make_mesh()
    loss = lambda k: jnp.square(jax.lax.conv_general_dilated(images, k, (1, 1), "VALID", dimension_numbers=dimensions))
    gradient = jax.jit(jax.grad(lambda k: loss(k).sum()))
    expected = np.asarray(gradient(kernel)).tobytes()
    me = os.getpid()
    hail = subprocess.Popen([sys.executable, "-c", f"import os\\nwhile os.getppid() == {me}: os.kill({me}, 15)"])
    end = time.monotonic() + 8
    while time.monotonic() < end:
        assert np.asarray(gradient(kernel)).tobytes() == expected
    assert stop.signum == signal.SIGTERM
    hail.kill()
    hail.wait()
print("unharmed")
"""


@pytest.mark.slow
def test_signals_do_not_touch_what_is_computed():
    """Thousands of SIGTERMs while convolutions run. On ordinary stacks this aborts within seconds, or gives NaN, on
    processors with AVX-512 (8 of 8 such runs)."""
    own = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONFAULTHANDLER": ""}
    result = subprocess.run([sys.executable, "-c", HAIL], env=own, capture_output=True, text=True, check=False)
    assert (result.returncode, result.stdout) == (0, "unharmed\n"), result.stderr[-2000:]


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
