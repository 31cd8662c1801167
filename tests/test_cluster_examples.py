"""The examples for SLURM and Kubernetes, run as they stand: two tasks or pods on this machine."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

CLUSTER = Path(__file__).parents[1] / "experiments" / "cluster"
SMALL = ["--data.name", "digits", "--train.log-every", "1", "--train.checkpoint-every", "2", "--data.batch-size", "16"]
SRUN = """#!/bin/bash
# What srun does: the command once for each task, with the environment of its step; signals go to all of them.
export SLURM_STEP_NODELIST=localhost SLURM_NTASKS=2
for task in 0 1; do
  SLURM_PROCID=$task SLURM_LOCALID=$task "$@" > "$OUTPUT.$task" 2>&1 &
  pids+=($!)
done
trap 'kill -TERM "${pids[@]}"' TERM
for pid in "${pids[@]}"; do
  wait "$pid"; status=$?
  while kill -0 "$pid" 2>/dev/null; do wait "$pid"; status=$?; done
done
exit $status
"""


def environment(tmp_path: Path) -> dict[str, str]:
    command = tmp_path / "bin" / "jaxcnn"
    command.parent.mkdir()
    command.write_text(f'#!/bin/bash\nexec {sys.executable} -m jaxcnn "$@"\n')
    command.chmod(0o755)
    names = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"), "XDG_CACHE_HOME": str(tmp_path)}
    return os.environ | names | {"PATH": f"{command.parent}:{os.environ['PATH']}", "JAX_NUM_CPU_DEVICES": "1"}


@pytest.mark.slow
def test_slurm_trains_is_preempted_and_goes_on(tmp_path):
    given = environment(tmp_path) | {"SLURM_JOB_ID": str(os.getpid()), "OUTPUT": str(tmp_path / "task")}
    for name, text in (("srun", SRUN), ("scontrol", f'#!/bin/bash\necho "$@" >> {tmp_path}/requeued\n')):
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    words = ["bash", str(CLUSTER / "slurm.sh"), "--runs-dir", str(tmp_path / "runs"), *SMALL, "--train.steps", "30"]
    job = subprocess.Popen(words, env=given, cwd=CLUSTER.parents[1], start_new_session=True)
    wait_for(tmp_path / "task.0", "step 3/30", job)
    srun = subprocess.run(["pgrep", "-P", str(job.pid)], capture_output=True, text=True, check=True).stdout.split()
    os.kill(int(srun[0]), signal.SIGTERM)
    assert job.wait(120) == 143, (tmp_path / "task.0").read_text()
    assert (tmp_path / "requeued").read_text() == f"requeue {os.getpid()}\n"
    again = subprocess.run(words, env=given, cwd=CLUSTER.parents[1], check=False, timeout=300)
    assert again.returncode == 0, (tmp_path / "task.0").read_text()
    assert "going on from step" in (tmp_path / "task.0").read_text()
    run = tmp_path / "runs" / "resnet20_cifar10" / f"slurm-{os.getpid()}"
    assert json.loads((run / "summary.json").read_text())["final_step"] == 30
    assert json.loads((run / "environment.json").read_text())["processes"] == 2


@pytest.mark.slow
def test_kubernetes_trains(tmp_path):
    service, job = yaml.safe_load_all((CLUSTER / "kubernetes.yaml").read_text())
    assert service["spec"]["selector"]["job-name"] == job["metadata"]["name"]
    pods, spec = job["spec"]["completions"], job["spec"]["template"]["spec"]
    assert spec["subdomain"] == service["metadata"]["name"]
    container = spec["containers"][0]
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = str(free.getsockname()[1])
    host = f"{job['metadata']['name']}-0.{service['metadata']['name']}:29500"
    assert f"--coordinator={host}" in container["args"]
    assert f"--processes={pods}" in container["args"]
    running = []
    for index in range(pods):
        words = [*container["command"], *container["args"], *SMALL, "--train.steps=3"]
        stands_for = {host: f"127.0.0.1:{port}", "$(JOB_COMPLETION_INDEX)": str(index), "/shared": str(tmp_path)}
        for old, new in stands_for.items():
            words = [word.replace(old, new) for word in words]
        given = environment(tmp_path) if not index else running[0][1]
        with open(tmp_path / f"pod{index}", "w") as file:
            process = subprocess.Popen(words, env=given, cwd=CLUSTER.parents[1], stdout=file, stderr=subprocess.STDOUT)
        running.append((process, given))
    assert [process.wait(300) for process, _ in running] == [0, 0], (tmp_path / "pod0").read_text()
    assert (tmp_path / "checkpoints" / "resnet20_cifar10" / "first" / "summary.json").is_file()


@pytest.mark.slow
def test_the_loop_starts_a_run_again_until_it_is_done(tmp_path):
    """After a kill and after a stop; not after bad input."""
    given, output = environment(tmp_path), tmp_path / "said"
    words = [str(CLUSTER / "restart.sh"), "jaxcnn", "train", "--runs-dir", str(tmp_path / "runs"), "--run", "first"]
    words += [*SMALL, "--train.steps", "2000", "--train.checkpoint-every", "20"]
    with open(output, "w") as file:
        loop = subprocess.Popen(words, env=given, cwd=CLUSTER.parents[1], stdout=file, stderr=subprocess.STDOUT)
    for i, signum in enumerate((signal.SIGKILL, signal.SIGTERM)):
        wait_for(output, "going on from step" if i else "step 60/2000", loop)  # by then the first checkpoint is whole
        training = subprocess.run(["pgrep", "-P", str(loop.pid)], capture_output=True, text=True, check=True).stdout
        os.kill(int(training), signum)
        wait_for(output, f"status {128 + signum}: starting again", loop)
    assert loop.wait(300) == 0, output.read_text()
    lines = (tmp_path / "runs/lenet5_digits/first/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [*range(1, 2001), 2000]
    words[-1] = "0"
    refused = subprocess.run(words, env=given, capture_output=True, text=True, check=False, timeout=60)
    assert refused.returncode == 2
    assert "starting again" not in refused.stderr


def wait_for(file: Path, text: str, job: subprocess.Popen) -> None:
    end = time.monotonic() + 240
    while not file.exists() or text not in file.read_text():
        assert job.poll() is None, file.read_text() if file.exists() else "nothing was said"
        assert time.monotonic() < end, file.read_text()
        time.sleep(0.1)
