"""Two processes train one run over loopback: the same result, stopped together, none left waiting for a dead one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from runs import outcome

from jaxcnn import processes
from jaxcnn.checkpoint import Checkpoints
from jaxcnn.errors import InputError
from jaxcnn.tree import state_sha256

RESNET = ["--model.name", "cifar_resnet20", "--data.name", "digits", "--data.batch-size", "32"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, 2, 0), "--coordinator None --processes 2 --process 0: give all three"),
        (("127.0.0.1:1", None, None), "give all three"),
        (("127.0.0.1:1", 2, 2), "--process 2 must be from 0 to 1"),
    ],
)
def test_flags_that_do_not_fit_are_refused(given, message):
    with pytest.raises(InputError, match=message):
        processes.start(*given)


def test_alone_there_is_nothing_to_agree_on():
    processes.start(None, None, None)
    assert processes.first()
    assert not processes.several()
    assert processes.from_first(lambda: {"a": 1}) == {"a": 1}
    processes.same("configuration", {"a": 1})
    assert processes.end(2, together=False) == 2


class Job:
    """`jaxcnn train FLAGS` in `count` processes of `devices` each, one of them alone without a coordinator."""

    def __init__(self, root: Path, name: str, flags: list[str], *, count: int = 2, devices: int = 2, of=lambda i: []):
        self.run, self.outputs = root / "runs" / "lenet5_digits" / name, []
        with socket.create_server(("127.0.0.1", 0)) as free:
            address = f"127.0.0.1:{free.getsockname()[1]}"
        environment = os.environ | {
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_COMPILATION_CACHE_DIR": str(root / "xla"),
            "XDG_CACHE_HOME": str(root),
        }
        self.processes = []
        for i in range(count):
            words = ["train", "--runs-dir", str(root / "runs"), "--run", name, *flags, *of(i)]
            if count > 1:
                words += ["--coordinator", address, "--processes", str(count), "--process", str(i)]
            self.outputs.append(root / f"{name}-{i}-{time.monotonic_ns()}.txt")
            with open(self.outputs[-1], "w") as file:
                self.processes.append(
                    subprocess.Popen(
                        [sys.executable, "-m", "jaxcnn", *words], stdout=file, stderr=subprocess.STDOUT, env=environment
                    )
                )

    def said(self, i: int) -> str:
        return self.outputs[i].read_text()

    def wait(self, limit: float = 300) -> list[int]:
        """The exit statuses; all must end within `limit` seconds."""
        try:
            return [process.wait(limit) for process in self.processes]
        except subprocess.TimeoutExpired:
            for process in self.processes:
                process.kill()
            raise AssertionError("\n".join(self.said(i)[-3000:] for i in range(len(self.processes)))) from None

    def reaches(self, text: str) -> None:
        end = time.monotonic() + 240
        while text not in self.said(0):
            assert time.monotonic() < end, self.said(0)
            assert all(process.poll() is None for process in self.processes), self.said(0) + self.said(1)
            time.sleep(0.05)


def losses(run: Path) -> list[float]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [line["loss"] for line in lines if "loss" in line]


@pytest.mark.slow
def test_elastic_gives_the_bits_of_any_other_division(tmp_path):
    """Two processes of two devices, one of four, one of one: a network with BatchNorm, evaluated on the way."""
    flags = [*RESNET, "--train.elastic", "8", "--train.steps", "6", "--train.log-every", "2", "--train.eval-every", "3"]
    flags += ["--train.checkpoint-every", "3"]
    found = {}
    for name, count, devices in (("2x2", 2, 2), ("1x4", 1, 4), ("1x1", 1, 1)):
        job = Job(tmp_path, name, flags, count=count, devices=devices)
        assert set(job.wait()) == {0}, job.said(0)
        found[name] = outcome(job.run)
    assert found["2x2"] == found["1x4"] == found["1x1"]
    half = Job(tmp_path, "half", flags)
    half.reaches("step 2/6")
    half.processes[1].send_signal(signal.SIGTERM)
    assert half.wait() == [143, 143]
    rest = Job(tmp_path, "half", flags, count=1, devices=4)
    assert rest.wait() == [0], rest.said(0)
    assert "every bit stays exact, by --train.elastic" in rest.said(0)
    assert outcome(rest.run)["lines"] == found["1x1"]["lines"]


@pytest.mark.slow
@pytest.mark.parametrize("more", [[], ["--train.fsdp"]], ids=["whole", "fsdp"])
def test_the_default_mode_agrees_to_rounding(tmp_path, more):
    flags = [*RESNET, *more, "--optim.name", "sgd", "--optim.learning-rate", "0.01", "--train.steps", "2"]
    flags += ["--train.log-every", "1"]
    for name, count, devices in (("2x2", 2, 2), ("1x4", 1, 4)):
        job = Job(tmp_path, name, flags, count=count, devices=devices)
        assert set(job.wait()) == {0}, job.said(0)
    runs = tmp_path / "runs" / "lenet5_digits"
    np.testing.assert_allclose(losses(runs / "2x2"), losses(runs / "1x4"), rtol=1e-4)


@pytest.mark.slow
def test_a_divided_state_is_saved_whole_and_gone_on_with(tmp_path):
    """With FSDP no process has all of the state; stopped half-way the run ends in the bits of one that was not."""
    flags = ["--train.fsdp", "--train.steps", "12", "--train.log-every", "2", "--train.checkpoint-every", "4"]
    flags += ["--optim.name", "adam", "--data.validation", "0.1", "--train.eval-every", "4"]
    whole = Job(tmp_path, "whole", flags)
    assert whole.wait() == [0, 0], whole.said(0) + whole.said(1)
    half = Job(tmp_path, "half", flags)
    half.reaches("step 6/12")
    half.processes[1].send_signal(signal.SIGTERM)
    assert half.wait() == [143, 143], half.said(0) + half.said(1)
    rest = Job(tmp_path, "half", flags)
    assert rest.wait() == [0, 0], rest.said(0) + rest.said(1)
    assert outcome(rest.run) == outcome(whole.run)
    saved = Checkpoints(whole.run / "checkpoints").restore_latest()  # by this process alone
    assert state_sha256(saved.arrays) == outcome(whole.run)["summary"]["state_sha256"]
    alone = Job(tmp_path, "whole", flags, count=1, devices=1)
    assert alone.wait() == [0]
    assert "is finished" in alone.said(0)


LONG = ["--train.steps", "100000", "--train.log-every", "5", "--train.checkpoint-every", "5"]


@pytest.mark.slow
@pytest.mark.parametrize("asked", [0, 1])
def test_a_signal_to_one_stops_both_at_one_step(tmp_path, asked):
    job = Job(tmp_path, "stopped", LONG)
    job.reaches("step 15/")
    job.processes[asked].send_signal(signal.SIGTERM)
    assert job.wait(60) == [143, 143], job.said(0) + job.said(1)
    stopped = max(int(path.name) for path in (job.run / "checkpoints").iterdir())
    again = Job(tmp_path, "stopped", LONG)
    again.reaches(f"going on from step {stopped} of 100000")
    again.processes[1 - asked].send_signal(signal.SIGTERM)
    assert again.wait(120) == [143, 143]


@pytest.mark.slow
@pytest.mark.parametrize("killed", [0, 1])
def test_a_death_ends_the_other_one_with_a_word(tmp_path, killed):
    job = Job(tmp_path, "killed", LONG)
    job.reaches("step 15/")
    job.processes[killed].kill()
    statuses = job.wait(30)
    assert statuses[killed] == -signal.SIGKILL
    assert statuses[1 - killed] == 1
    assert f"error: process {killed} of 2 ended" in job.said(1 - killed)
    assert "start all processes again with the same command" in job.said(1 - killed)
    again = Job(tmp_path, "killed", LONG)
    again.reaches("going on from step ")
    again.processes[0].send_signal(signal.SIGTERM)
    assert again.wait(120) == [143, 143]


@pytest.mark.slow
def test_processes_that_do_not_fit_together_are_refused(tmp_path):
    job = Job(tmp_path, "mixed", LONG, of=lambda i: ["--seed", str(i)])
    assert job.wait(60) == [2, 2]
    for i in range(2):
        assert "process 1 has another configuration than process 0:\n  seed: 0 -> 1" in job.said(i)
    assert not job.run.exists()
    unknown = Job(tmp_path, "unknown", [*LONG, "--model.name", "nothing"])
    assert unknown.wait(60) == [2, 2]


@pytest.mark.slow
def test_what_only_the_first_one_can_see_is_said_by_both(tmp_path):
    """Another configuration under the run's name: the first process alone looks at the directory."""
    done = Job(tmp_path, "taken", ["--train.steps", "3"], count=1)
    assert done.wait() == [0]
    job = Job(tmp_path, "taken", ["--train.steps", "4"])
    assert job.wait(60) == [2, 2]
    for i in range(2):
        assert "was made with another configuration:\n  train.steps: 3 -> 4" in job.said(i)
