"""A run directory belongs to one process, one configuration, one environment; its log has every line once."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from jaxcnn.errors import InputError
from jaxcnn.train.log import MetricsLog
from jaxcnn.train.run import REFUSED, WARNED, RunDirectory

ENVIRONMENT = {
    "versions": {"jax": "0.10.2"},
    "xla_flags": "--a=1",
    "device_kind": "cpu",
    "devices": 8,
    "processes": 1,
    "cores": 2,
    "data": {"train": "1f", "test": "2e"},
    "git": "abc",
    "python": "3.12.1",
}


def opened(path: Path, config: dict | None = None, accept: bool = False, **changes) -> RunDirectory:
    environment = ENVIRONMENT | changes
    return RunDirectory(path, config=config or {"a": 1}, environment=environment, accept_environment=accept)


CHANGES = {
    "versions": ({"jax": "0.11.0"}, "versions.jax"),
    "xla_flags": ("--a=2", "xla_flags"),
    "device_kind": ("TPU v9", "device_kind"),
    "data": ({"train": "1f", "test": "3d"}, "data.test"),
    "devices": (1, "devices"),
    "processes": (2, "processes"),
    "cores": (64, "cores"),
    "git": ("abd", "git"),
}


def test_every_field_has_its_test():
    assert CHANGES.keys() == {*REFUSED, *WARNED}


@pytest.mark.parametrize("field", REFUSED)
def test_an_environment_with_other_bits_is_refused(tmp_path, field):
    opened(tmp_path / "run").close()
    value, shown = CHANGES[field]
    with pytest.raises(InputError, match=rf"{shown}: .* -> .*\n--accept-environment"):
        opened(tmp_path / "run", **{field: value})
    with opened(tmp_path / "run") as run:
        assert run.warnings == []  # refused means unchanged
    with opened(tmp_path / "run", accept=True, **{field: value}) as run:
        assert any(shown in line for line in run.warnings)
    with opened(tmp_path / "run", **{field: value}) as run:
        assert run.warnings == []


@pytest.mark.parametrize("field", WARNED)
def test_an_environment_with_other_rounding_is_warned_of(tmp_path, field):
    opened(tmp_path / "run").close()
    value, shown = CHANGES[field]
    with opened(tmp_path / "run", **{field: value}) as run:
        (line,) = run.warnings
    assert line.startswith(f"{shown}: ")
    assert "exact" in line


def test_elastic_keeps_every_bit_on_other_devices(tmp_path):
    config = {"train": {"elastic": 8}}
    opened(tmp_path / "run", config).close()
    with opened(tmp_path / "run", config, devices=1, processes=4, cores=64) as run:
        assert len(run.warnings) == 3
        assert all("every bit stays exact" in line for line in run.warnings)


def test_a_run_from_before_processes_were_written_down_was_one(tmp_path):
    opened(tmp_path / "run").close()
    old = {field: value for field, value in ENVIRONMENT.items() if field != "processes"}
    (tmp_path / "run" / "environment.json").write_text(json.dumps(old))
    with opened(tmp_path / "run") as run:
        assert run.warnings == []


def test_the_rest_of_the_environment_is_ignored(tmp_path):
    opened(tmp_path / "run").close()
    with opened(tmp_path / "run", python="3.13.0", hostname="other") as run:
        assert run.warnings == []


def test_another_configuration_is_refused_with_the_difference(tmp_path):
    opened(tmp_path / "run", {"data": {"batch_size": 8}, "seed": 0}).close()
    with pytest.raises(InputError, match=r"another configuration:\n  data\.batch_size: 8 -> 16\n"):
        opened(tmp_path / "run", {"data": {"batch_size": 16}, "seed": 0})


def test_a_second_process_is_refused_and_a_later_one_is_not(tmp_path):
    code = "import sys; from jaxcnn.train.run import RunDirectory as R; R(sys.argv[1], config={'a': 1}, environment={})"
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    with opened(tmp_path / "run"):
        other = subprocess.run(command, capture_output=True, text=True, check=False)
        assert other.returncode == 1
        assert f"in use by process {os.getpid()}" in other.stderr
    opened(tmp_path / "run").close()


def test_bad_input_takes_a_new_directory_away_and_leaves_an_old_one(tmp_path):
    path = tmp_path / "runs" / "experiment" / "run"
    with pytest.raises(InputError), opened(path):
        raise InputError("bad")
    assert list(tmp_path.iterdir()) == []
    opened(path).close()
    with pytest.raises(InputError), opened(path):
        raise InputError("bad")
    assert (path / "config.json").is_file()


# --- the log ------------------------------------------------------------------------------------------------


def test_a_full_disk_loses_no_line_of_the_log(tmp_path):
    class Full:
        """A file that takes half of every second write."""

        def __init__(self, file):
            self.file, self.calls = file, 0

        def write(self, data):
            self.calls += 1
            return self.file.write(data[: len(data) // 2] if self.calls % 2 else data)

        def __getattr__(self, name):
            return getattr(self.file, name)

    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log._file = Full(log._file)
    for step in range(3):
        log.write({"step": step, "loss": float("nan")})
        assert path.read_bytes()[-1:] in (b"", b"\n")  # no half line
    log.write({"step": 3, "loss": 0.5})
    log.sync()
    log.close()
    assert [json.loads(line) for line in path.read_text().splitlines()] == log.history
    assert [line["step"] for line in log.history] == [0, 1, 2, 3]
    assert log.history[0]["loss"] is None


def test_the_log_goes_on_after_the_lines_that_count(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3}\n{"st')
    log = MetricsLog(path, keep=2)
    log.write({"step": 3, "again": True})
    log.close()
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n{"step": 3, "again": true}\n'
    path.write_text("no json\n")
    with pytest.raises(InputError, match=r"metrics\.jsonl was altered"):
        MetricsLog(path, keep=1)
