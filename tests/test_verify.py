"""What `jaxcnn verify` finds, what it lets pass, that it changes nothing; and what `jaxcnn diff` says."""

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from runs import jaxcnn

from jaxcnn import cli, platform
from jaxcnn.checkpoint import Checkpoints
from jaxcnn.train import log, loop, run

TINY = ["--model.name", "linear", "--data.image-size", "8", "8", "--data.batch-size", "32", "--train.log-every", "5"]
TINY += ["--optim.learning-rate", "0.02"]
FLAGS = [*TINY, "--train.steps", "30", "--train.checkpoint-every", "10", "--train.keep-latest", "3"]
FLAGS += ["--data.validation", "0.2", "--train.eval-every", "6", "--train.ema-decay", "0.8"]

pytestmark = pytest.mark.usefixtures("own_caches", "cached")


@pytest.fixture(scope="module")
def cached(own_caches):
    """Every program of this module is compiled once, however small."""
    import jax

    real = platform.setup

    def setup(**options) -> None:
        real(**options)
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(platform, "setup", setup)
        yield


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """Finished runs `a` and, of another seed, `b`."""
    directory = tmp_path_factory.mktemp("runs")
    assert jaxcnn("train", "--runs-dir", directory, "--run", "a", "--quiet", *FLAGS) == 0
    assert jaxcnn("train", "--runs-dir", directory, "--run", "b", "--quiet", "--seed", 1, *FLAGS) == 0
    return directory / "lenet5_digits"


@pytest.fixture
def spoilt(runs, tmp_path) -> Path:
    """A copy of `a`, to be altered."""
    shutil.copytree(runs / "a", tmp_path / "spoilt")
    return tmp_path / "spoilt"


@pytest.fixture
def verify(capsys) -> Callable[..., dict]:
    """The result of `jaxcnn verify --json`, with `status` and what was said on `stderr`."""

    def result(run: Path, *args: str | Path | int) -> dict:
        capsys.readouterr()
        status = jaxcnn("verify", run, "--json", *args)
        said = capsys.readouterr()
        return {**json.loads(said.out), "status": status, "stderr": said.err}

    return result


def files(directory: Path) -> dict[Path, tuple]:
    """Content and time of every file, time of every directory."""
    found = [directory, *directory.rglob("*")]
    return {p: (p.stat().st_mtime_ns, p.stat().st_mode, p.read_bytes() if p.is_file() else b"") for p in found}


def edit(path: Path, change: Callable[[dict], None]) -> None:
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


def edit_lines(run: Path, change: Callable[[list[bytes]], None]) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    change(lines)
    path.write_bytes(b"".join(lines))


# --- what is reproduced --------------------------------------------------------------------------------------


def test_a_run_is_reproduced_and_nothing_of_it_changes(runs, verify):
    before = files(runs / "a")
    found = verify(runs / "a")
    assert files(runs / "a") == before
    lines = (runs / "a" / "metrics.jsonl").read_text().splitlines()
    steps = os.listdir(runs / "a" / "checkpoints")
    assert (found["status"], found["reproduced"], found["from"], found["to"]) == (0, True, 0, 30)
    assert (found["lines"], found["checkpoints"], found["summary"]) == (len(lines), len(steps), True)
    assert "ETA" in found["stderr"]


def test_in_words(runs, capsys):
    assert jaxcnn("verify", runs / "a", "--quiet") == 0
    said = capsys.readouterr()
    assert f"run {runs / 'a'} is reproduced from step 0 to 30: 12 lines, " in said.out
    assert said.out.endswith("checkpoints and the result are equal\n")
    assert said.err == ""


def test_between_two_checkpoints(runs, verify):
    steps = sorted(map(int, os.listdir(runs / "a" / "checkpoints")))
    found = verify(runs / "a", "--from", steps[0], "--to", steps[1])
    lines = [json.loads(line) for line in (runs / "a" / "metrics.jsonl").read_text().splitlines()]
    assert (found["status"], found["from"], found["to"]) == (0, steps[0], steps[1])
    assert found["lines"] == sum(steps[0] < line["step"] <= steps[1] for line in lines)
    assert (found["checkpoints"], found["summary"]) == (1, False)
    to_the_end = verify(runs / "a", "--from", steps[-1])  # only its result is left to compare
    assert (to_the_end["status"], to_the_end["lines"], to_the_end["summary"]) == (0, 1, True)


def test_steps_without_a_checkpoint_are_refused_with_those_there_are(runs, capsys):
    steps = sorted(map(int, os.listdir(runs / "a" / "checkpoints")))
    for flag in ("--from", "--to"):
        assert jaxcnn("verify", runs / "a", flag, 7) == 2
        assert f"{flag} 7: run {runs / 'a'} has no checkpoint of that step, there are" in capsys.readouterr().err
    assert jaxcnn("verify", runs / "a", "--from", steps[1], "--to", steps[0]) == 2
    assert "must be before" in capsys.readouterr().err


def test_runs_that_were_stopped_between_lines_and_in_an_evaluation(tmp_path, verify, monkeypatch, runs):
    def sigterm() -> None:
        os.kill(os.getpid(), signal.SIGTERM)

    train = ["train", "--runs-dir", tmp_path, "--run", "r", "--quiet", *FLAGS]
    real_step, real_evaluate = log.Progress.step, loop.evaluate
    with monkeypatch.context() as patch:
        patch.setattr(log.Progress, "step", lambda self, at: sigterm() if at == 13 else real_step(self, at))
        assert jaxcnn(*train) == 143
    directory = tmp_path / "lenet5_digits" / "r"
    found = verify(directory)
    assert (found["status"], found["to"], found["summary"]) == (0, 13, False)

    def stopping(*args, **kwargs):
        sigterm()
        return real_evaluate(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "evaluate", stopping)  # that of step 18
        assert jaxcnn(*train) == 143
    found = verify(directory)
    assert Checkpoints(directory / "checkpoints").restore(18).loop["evaluated"] == 12
    assert (found["status"], found["to"]) == (0, 18)
    assert found["checkpoints"] == len(os.listdir(directory / "checkpoints"))
    assert jaxcnn(*train) == 0
    found = verify(directory)
    assert (found["status"], found["to"], found["summary"]) == (0, 30, True)
    assert verify(directory, "--from", 20)["status"] == 0
    summaries = [json.loads((r / "summary.json").read_text()) | {"seconds": 0} for r in (runs / "a", directory)]
    assert summaries[0] == summaries[1]


def test_a_run_that_stopped_before_its_first_step(tmp_path, verify, monkeypatch, capsys):
    train = ["train", "--runs-dir", tmp_path, "--run", "r", "--quiet", *FLAGS]
    real = loop.create_state

    def stopping(*args, **kwargs):
        os.kill(os.getpid(), signal.SIGTERM)
        return real(*args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "create_state", stopping)
        assert jaxcnn(*train) == 143
    directory = tmp_path / "lenet5_digits" / "r"
    found = verify(directory)
    assert (found["status"], found["to"], found["checkpoints"]) == (0, 0, 1)
    shutil.rmtree(directory / "checkpoints")
    assert jaxcnn("verify", directory) == 2
    assert "no checkpoint yet" in capsys.readouterr().err


def test_a_run_that_ended_early_and_took_its_best_step(tmp_path, verify):
    flags = [*FLAGS, "--optim.learning-rate", "1e-9", "--train.early-stopping", "2", "--train.checkpoint-every", "50"]
    assert jaxcnn("train", "--runs-dir", tmp_path, "--run", "r", "--quiet", "--no-async-saves", *flags) == 0
    directory = tmp_path / "lenet5_digits" / "r"
    assert json.loads((directory / "summary.json").read_text())["selected_step"] == 6
    found = verify(directory)
    assert (found["status"], found["to"], found["checkpoints"]) == (0, 18, 2)
    assert verify(directory, "--from", 18)["status"] == 0  # the best step lies before


def test_a_smoke_run_with_weights_of_another_run(runs, tmp_path, verify):
    flags = ["--smoke", "--init-from", runs / "b", *TINY]
    assert jaxcnn("train", "--runs-dir", tmp_path, "--run", "r", "--quiet", *flags) == 0
    assert verify(tmp_path / "lenet5_digits" / "r")["status"] == 0


# --- what is found -------------------------------------------------------------------------------------------


def test_an_altered_loss_is_named_with_its_step(spoilt, verify, capsys):
    def change(lines: list[bytes]) -> None:
        line = json.loads(lines[4])
        assert line["step"] == 15
        lines[4] = json.dumps(line | {"loss": 0.125}).encode() + b"\n"

    edit_lines(spoilt, change)
    found = verify(spoilt)
    assert (found["status"], found["reproduced"], found["lines"]) == (1, False, 4)
    difference = found["difference"]
    assert (difference["step"], difference["field"], difference["recorded"]) == (15, "loss", 0.125)
    assert difference["where"] == "line 5 of metrics.jsonl"
    assert jaxcnn("verify", spoilt, "--quiet") == 1
    assert "step 15 differs: line 5 of metrics.jsonl: loss: 0.125 recorded, " in capsys.readouterr().out


def test_timings_may_differ(spoilt, verify):
    def change(lines: list[bytes]) -> None:
        lines[4] = json.dumps(json.loads(lines[4]) | {"seconds": 1e6, "images_per_second": None}).encode() + b"\n"

    edit_lines(spoilt, change)
    assert verify(spoilt)["status"] == 0


@pytest.mark.parametrize(
    ("change", "step", "reason"),
    [
        (lambda lines: lines.pop(4), 15, "a line is missing"),
        (lambda lines: lines.insert(4, lines[3]), 15, "a line was added"),
        (lambda lines: lines.append(lines[-1]), 30, "the run ends before it"),
        (lambda lines: lines.pop(), 30, "is missing"),
        (lambda lines: lines.__setitem__(4, lines[4][:-9] + b"\n"), 15, "was altered"),
    ],
    ids=["deleted", "repeated", "added at the end", "missing at the end", "torn"],
)
def test_lines_missing_or_too_many(spoilt, verify, change, step, reason):
    edit_lines(spoilt, change)
    found = verify(spoilt)
    assert (found["status"], found["difference"]["step"]) == (1, step)
    assert reason in found["difference"]["reason"]


def test_another_learning_rate_differs_at_the_first_line(spoilt, verify, capsys):
    edit(spoilt / "config.json", lambda config: config["optim"].update(learning_rate=0.03))
    found = verify(spoilt)
    assert (found["status"], found["config_altered"], found["difference"]["step"]) == (1, True, 5)
    assert "config.json was altered after the run began" in found["stderr"]
    edit(spoilt / "environment.json", lambda environment: environment.pop("config_sha256"))  # an older run
    found = verify(spoilt)
    assert (found["status"], found["config_altered"], found["difference"]["step"]) == (1, False, 5)


def test_a_field_that_changes_nothing_is_found_too(spoilt, capsys):
    edit(spoilt / "config.json", lambda config: config["train"].update(keep_latest=5))
    assert jaxcnn("verify", spoilt, "--quiet") == 1
    assert "config.json was altered after the run began, in nothing that is computed" in capsys.readouterr().out


def test_going_on_does_not_hide_an_altered_configuration(tmp_path):
    settings = {"environment": {"versions": {}}, "accept_environment": True}
    with run.RunDirectory(tmp_path / "r", config={"seed": 1}, **settings) as directory:
        began = directory.read("environment.json")
    assert not run.config_altered({"seed": 1}, began)
    edit(tmp_path / "r" / "config.json", lambda config: config.update(seed=2))
    with run.RunDirectory(tmp_path / "r", config={"seed": 2}, **settings) as directory:
        assert run.config_altered(directory.read("config.json"), directory.read("environment.json"))


def flip(checkpoint: Path) -> None:
    file = next(iter(sorted((checkpoint / "state" / "ocdbt.process_0" / "d").iterdir())))
    data = bytearray(file.read_bytes())
    data[-1] ^= 128
    file.write_bytes(data)


def test_a_damaged_checkpoint_is_found_at_its_step(spoilt, verify):
    flip(spoilt / "checkpoints" / "20")
    found = verify(spoilt)
    assert (found["status"], found["difference"]["step"]) == (1, 20)
    assert found["difference"]["where"] == "checkpoint 20"
    assert "is not what was saved" in found["difference"]["reason"]
    assert (spoilt / "checkpoints" / "20").is_dir()  # and stays where it is
    assert verify(spoilt, "--from", 20)["difference"]["step"] == 20


def test_a_checkpoint_without_its_manifest_is_found(spoilt, verify):
    (spoilt / "checkpoints" / "20" / "MANIFEST.json").unlink()
    found = verify(spoilt)
    assert (found["status"], found["difference"]["step"]) == (1, 20)


def test_a_sound_checkpoint_of_another_state_is_found(spoilt, runs, verify):
    shutil.rmtree(spoilt / "checkpoints" / "20")
    shutil.copytree(runs / "b" / "checkpoints" / "20", spoilt / "checkpoints" / "20")
    found = verify(spoilt)
    assert (found["status"], found["difference"]["step"]) == (1, 20)
    assert found["difference"]["field"] == "state_sha256"
    assert verify(spoilt, "--from", 20)["status"] == 1


def test_a_checkpoint_of_a_step_that_the_run_never_has_is_found(spoilt, verify):
    shutil.copytree(spoilt / "checkpoints" / "20", spoilt / "checkpoints" / "500")
    found = verify(spoilt)
    assert (found["status"], found["difference"]["where"]) == (1, "checkpoint 500")


@pytest.mark.parametrize(("field", "value"), [("test_correct", 1), ("state_sha256", "0" * 64), ("selected_step", 6)])
def test_an_altered_summary_is_found(spoilt, verify, field, value):
    edit(spoilt / "summary.json", lambda summary: summary.update({field: value}))
    found = verify(spoilt, "--from", 20)
    assert (found["status"], found["difference"]["where"]) == (1, "summary.json")
    assert (found["difference"]["field"], found["difference"]["recorded"]) == (field, value)


def test_altered_class_names_are_found(spoilt, verify):
    edit(spoilt / "data.json", lambda data: data["classes"].reverse())
    assert verify(spoilt)["difference"]["where"] == "data.json"


# --- what is refused -----------------------------------------------------------------------------------------


def test_another_environment_is_refused_unless_accepted(spoilt, verify, capsys):
    edit(spoilt / "environment.json", lambda environment: environment["versions"].update(jaxlib="0.0.1"))
    assert jaxcnn("verify", spoilt) == 2
    said = capsys.readouterr().err
    assert "its bits cannot be expected here" in said
    assert 'versions.jaxlib: "0.0.1" -> ' in said
    found = verify(spoilt, "--accept-environment", "--from", 20)
    assert found["status"] == 0
    assert "warning: versions.jaxlib" in found["stderr"]


def test_a_run_that_is_training_is_refused_and_no_run_trains_meanwhile(spoilt, capsys):
    config = json.loads((spoilt / "config.json").read_text())
    settings = {"config": config, "environment": {}, "accept_environment": True}
    with run.RunDirectory(spoilt, **settings):
        before = files(spoilt)
        assert jaxcnn("verify", spoilt) == 2
        assert files(spoilt) == before
    assert f"in use by process {os.getpid()}" in capsys.readouterr().err
    with run.reading(spoilt), run.reading(spoilt), pytest.raises(cli.InputError, match="in use"):
        run.RunDirectory(spoilt, **settings)


def test_what_is_no_run_is_refused(runs, tmp_path, capsys):
    for args in (["verify", tmp_path], ["diff", runs / "a", tmp_path], ["diff", tmp_path / "none", runs / "a"]):
        assert jaxcnn(*args) == 2
        assert "is not a run directory" in capsys.readouterr().err
    assert jaxcnn("verify") == 2


def test_a_configuration_of_other_types_is_refused(spoilt, capsys):
    edit(spoilt / "config.json", lambda config: config["optim"].update(learning_rate="much"))
    assert jaxcnn("verify", spoilt) == 2
    assert "config.json is no configuration" in capsys.readouterr().err


@pytest.mark.slow
def test_an_elastic_run_is_reproduced_on_other_devices(tmp_path):
    flags = [*TINY, "--train.steps", "20", "--train.elastic", "4", "--runs-dir", str(tmp_path), "--run", "r"]
    own = {"JAX_PLATFORMS": "cpu", "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "xla"), "XLA_FLAGS": ""}
    for devices, command in (("1", ["train", *flags]), ("2", ["verify", str(tmp_path / "lenet5_digits" / "r")])):
        environment = os.environ | own | {"JAX_NUM_CPU_DEVICES": devices}
        words = [sys.executable, "-m", "jaxcnn", *command]
        done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        assert "warning" not in done.stderr


# --- diff ----------------------------------------------------------------------------------------------------


@pytest.fixture
def diff(capsys) -> Callable[..., dict]:
    """The result of `jaxcnn diff --json`."""

    def result(a: Path, b: Path) -> dict:
        capsys.readouterr()
        assert jaxcnn("diff", a, b, "--json") == 0
        return json.loads(capsys.readouterr().out)

    return result


def test_diff_of_equal_runs(runs, spoilt, diff, capsys):
    edit(spoilt / "summary.json", lambda summary: summary.update(seconds=1e6))
    found = diff(runs / "a", spoilt)
    assert found["metrics"] == {"agree": 12, "lines": [12, 12], "difference": None}
    assert found["same_state"] is True
    assert not any(found[kind] for kind in ("config", "environment", "data", "code", "summary"))
    assert jaxcnn("diff", runs / "a", spoilt) == 0
    assert "the logs agree over 12 lines" in capsys.readouterr().out


def test_diff_of_two_seeds(runs, diff, capsys):
    before = files(runs)
    found = diff(runs / "a", runs / "b")
    assert files(runs) == before
    assert found["config"] == ["seed: 0 -> 1"]
    assert (found["metrics"]["agree"], found["metrics"]["difference"]["step"]) == (0, 5)
    assert found["metrics"]["difference"]["field"] == "loss"
    assert found["same_state"] is False
    assert not any(found[kind] for kind in ("environment", "data", "code"))
    assert jaxcnn("diff", runs / "a", runs / "b") == 0
    said = capsys.readouterr().out
    for line in ("seed: 0 -> 1", "0 lines agree, then step 5 differs", "another final state"):
        assert line in said


def test_diff_of_environments_and_an_unfinished_run(runs, spoilt, diff, capsys):
    def change(environment: dict) -> None:
        environment["versions"]["jaxlib"] = "0.0.1"
        environment["data"]["train"] = "0" * 64
        environment["git"] = "another"

    edit(spoilt / "environment.json", change)
    (spoilt / "summary.json").unlink()
    edit_lines(spoilt, lambda lines: lines.pop())
    found = diff(runs / "a", spoilt)
    assert [line.split(":")[0] for kind in ("environment", "data", "code") for line in found[kind]] == [
        "versions.jaxlib",
        "data.train",
        "git",
    ]
    assert (found["same_state"], found["finished"]) == (None, [True, False])
    assert found["metrics"] == {"agree": 11, "lines": [12, 11], "difference": None}
    assert jaxcnn("diff", runs / "a", spoilt) == 0
    assert f"not finished: {spoilt}" in capsys.readouterr().out
