"""`jaxcnn search` on the digits: what it finds, refuses, prints and leaves behind, and that it resumes."""

import dataclasses
import json
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from jaxcnn import build, cli, config
from jaxcnn.commands import search as search_command
from jaxcnn.config import Data, Experiment, Model, Optim, Train
from jaxcnn.errors import InputError
from jaxcnn.search import Choice, IntUniform, LogUniform, Report, SearchResult, Trial, Uniform
from jaxcnn.train import loop

TINY = ["--model.name", "linear", "--data.image-size", "8", "8", "--data.batch-size", "64", "--data.crop-padding", "0"]
TINY += ["--train.steps", "15", "--train.log-every", "5", "--train.eval-every", "5", "--data.validation", "0.2"]
SPACE = ["--space", "optim.learning-rate=log:1e-4:1", "optim.name=choice:adam,sgd"]


pytestmark = pytest.mark.usefixtures("own_caches")


def run(runs: Path, *args: str, name: str = "s", trials: int = 2) -> int:
    flags = ["--trials", str(trials), "--search", name, "--runs-dir", str(runs)]
    return search_command.main([*SPACE, *flags, *TINY, *args])


def trials(directory: Path) -> list[dict]:
    """What is compared: all but the durations."""
    lines = map(json.loads, (directory / "trials.jsonl").read_text().splitlines())
    return [{key: value for key, value in line.items() if key != "seconds"} for line in lines]


def never(*_: object, **__: object) -> None:
    raise AssertionError("trained or compiled")


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The directory of an uninterrupted search of 2 trials, in which whoever looks at the test split fails."""
    runs, read = tmp_path_factory.mktemp("runs"), build.splits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "splits", lambda *a, **k: dataclasses.replace(read(*a, **k), test=None))
        assert run(runs, "--quiet") == 0
    return runs / "lenet5_digits" / "s"


def test_a_search_trains_each_trial_without_the_test_split(whole, capsys):
    assert run(whole.parent.parent, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    scores = [trial["score"] for trial in printed["trials"]]
    assert scores == sorted(scores, reverse=True)
    assert printed["best"]["score"] == max(score for _, score in printed["best"]["reports"]) > 0.5
    assert [step for step, _ in printed["best"]["reports"]] == [5, 10, 15]
    assert Path(printed["picture"]).read_bytes().startswith(b"\x89PNG")
    for number in range(2):  # the logs stay, the weights do not
        lines = (whole / f"trial-{number:03}" / "metrics.jsonl").read_text()
        assert "validation_accuracy" in lines
        assert "test" not in lines
        assert not (whole / f"trial-{number:03}" / "checkpoints").exists()


def test_the_printed_command_is_the_best_trials_configuration(whole, capsys):
    assert run(whole.parent.parent, "--json") == 0
    printed = json.loads(capsys.readouterr().out)
    command, train, *flags = shlex.split(printed["command"])
    assert (command, train) == ("jaxcnn", "train")
    launch, experiment = cli.parse(config.LENET5_DIGITS, flags)
    assert launch.runs_dir == whole.parent.parent
    best = whole / f"trial-{printed['best']['number']:03}"
    assert config.to_json(experiment) == json.loads((best / "config.json").read_text())


def test_a_finished_search_says_so_without_training(whole, monkeypatch, capsys):
    monkeypatch.setattr(loop, "fit", never)
    assert run(whole.parent.parent) == 0
    out = capsys.readouterr().out
    assert "The test split was not looked at" in out
    assert "jaxcnn train --model.name linear" in out
    assert out.count("complete") == 2


def test_a_trial_cut_short_goes_on_from_its_checkpoint(tmp_path, monkeypatch, whole):
    heard = []
    told = Report.__call__

    def killed(self: Report, step: int, score: float) -> None:
        told(self, step, score)
        heard.append((self.trial, step))
        if heard == [(0, 5), (0, 10), (0, 15), (1, 5), (1, 10)]:
            raise RuntimeError("killed")

    monkeypatch.setattr(Report, "__call__", killed)
    with pytest.raises(RuntimeError):
        run(tmp_path)
    directory = tmp_path / "lenet5_digits" / "s"
    assert len(trials(directory)) == 1
    assert (directory / "trial-001" / "checkpoints" / "10").exists()
    assert run(tmp_path) == 0
    assert trials(directory) == trials(whole)


def test_more_trials_of_one_round_and_another_space(whole, monkeypatch):
    monkeypatch.setattr(loop, "fit", never)
    runs = whole.parent.parent
    with pytest.raises(InputError, match=r"experiment.train.steps: 15 -> 20"):
        run(runs, "--train.steps", "20")
    with pytest.raises(InputError, match="rounds: 1 -> 2"):
        run(runs, "--rounds", "2")
    with pytest.raises(InputError, match=r"space.optim.learning_rate.high: 1.0 -> 0.5"):
        run(runs, "--space", "optim.learning-rate=log:1e-4:0.5", "optim.name=choice:adam,sgd")
    assert len(trials(whole)) == 2


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--data.validation", "0"], r"no validation split .* --data.validation .* --train.eval-every"),
        (["--train.eval-every", "0"], r"no validation split .* --data.validation .* --train.eval-every"),
        (["--space", "optim.learning-rte=log:1e-4:1"], "did you mean 'optim.learning_rate'"),
        (["--space", "optim.learning-rate=log:1e-4:1", "train.ema-decay=uniform:0.9:1.5"], "--train.ema-decay 1.5"),
        (["--space", "optim.weight_decay=uniform:-1:0"], "--optim.weight-decay -1.0 must be at least 0"),
        (["--space", "optim.learning_rate=log:0:1"], "above 0"),
        (["--space", "optim.learning_rate=log:1:2:3"], "expected two numbers"),
        (["--space", "optim.learning_rate=log:a:b"], "expected two numbers"),
        (["--space", "optim.learning_rate=0.1"], "expected FIELD=uniform:LOW:HIGH"),
        (["--space", "data.batch_size=log:8:64"], "no real number"),
        (["--space", "data.batch_size=choice:64,65"], "batch size 65 cannot be divided"),
        (["--space", "data.image_size=choice:8,16"], "pairs cannot be searched"),
        (["--space", "data.validation=uniform:0.1:0.3"], "cannot be compared"),
        (["--space", "seed=int:0:9"], "cannot be compared"),
        (["--space", "train.eval-every=int:0:9"], "0 has no evaluations"),
        (["--space", "model.overrides.widht=choice:8,16"], "widht"),
        (["--space", "optim.name=choice:adam,adamm"], "adamm"),
        (["--rounds", "4"], "every round"),
        (["--search", "../x"], "one directory name"),
        (["--run", "x"], "--search NAME"),
    ],
)
def test_bad_input_is_refused_before_anything_is_trained(tmp_path, monkeypatch, args, message):
    monkeypatch.setattr(loop, "fit", never)
    with pytest.raises(InputError, match=message):
        run(tmp_path, *args)
    assert not any(tmp_path.iterdir())


def test_parameters_are_read_with_either_dash():
    for text, name, given in (
        ("optim.learning-rate=log:1e-4:1", "optim.learning_rate", LogUniform(1e-4, 1)),
        ("optim.clip_norm=uniform:0.5:2", "optim.clip_norm", Uniform(0.5, 2)),
        ("data.crop-padding=int:0:4", "data.crop_padding", IntUniform(0, 4)),
        ("model.overrides.width=choice:8,16", "model.overrides.width", Choice((8, 16))),
        ("model.overrides.kernel-init=choice:a,b", "model.overrides.kernel_init", Choice(("a", "b"))),
        ("optim.options.nesterov=choice:true,false", "optim.options.nesterov", Choice((True, False))),
        ("optim.options.momentum=uniform:0:0.99", "optim.options.momentum", Uniform(0, 0.99)),
        ("optim.rates.block-1/conv=log:0.01:1", "optim.rates.block-1/conv", LogUniform(0.01, 1)),
        ("data.flip=choice:true,false", "data.flip", Choice((True, False))),
    ):
        assert search_command.parameter(text) == (name, given)


def test_a_trial_is_what_its_flags_say():
    base = dataclasses.replace(config.LENET5_DIGITS, optim=Optim("sgd", options={"momentum": 0.9, "nesterov": True}))
    params = {"optim.options.momentum": 0.5, "data.flip": True, "train.steps": 7, "model.overrides.act": "tanh"}
    found = search_command.trial_experiment(base, params, smoke=False)
    assert found.optim.options == {"momentum": 0.5, "nesterov": True}
    assert (found.train.steps, found.train.epochs) == (7, None)
    assert found.data.flip
    assert found.model.overrides == {"act": "tanh"}
    assert search_command.trial_experiment(base, {"optim.name": "adam"}, smoke=False).optim.options == {}


@pytest.mark.parametrize(
    "other",
    [
        Experiment(),
        Experiment("e", 3, model=Model("linear", "float64", {"width": 8, "act": "tanh"}), train=Train(steps=7)),
        Experiment(
            "a b", data=Data("cifar10", image_size=(8, 9), flip=True, preprocessing="zca"), train=Train(epochs=2)
        ),
        Experiment(optim=Optim("adam", clip_norm=0.5, freeze="^a b|c$", rates={"block.*/a": 0.1, "b": 1.0})),
        Experiment(optim=Optim(options={"momentum": 0.9, "nesterov": True}), train=Train(ema_decay=0.99)),
    ],
)
def test_the_differing_flags_give_the_experiment_back(other):
    other = other if other.train.steps or other.train.epochs else dataclasses.replace(other, train=Train(steps=1))
    for base in (config.LENET5_DIGITS, Experiment(data=Data(flip=True), optim=Optim(clip_norm=1.0))):
        flags = search_command.differing(base, other)
        assert cli.parse(base, shlex.split(shlex.join(flags)))[1] == other


def test_smoke_runs_a_few_small_trials_and_leaves_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(search_command, "SMOKE_TRIALS", 1)
    assert search_command.main([*SPACE, *TINY, "--smoke"]) == 0
    assert "1 trials, best first" in capsys.readouterr().out
    assert not any(tmp_path.iterdir())


def test_the_command_names_the_experiments_file_and_its_scale(tmp_path, monkeypatch, capsys):
    file = tmp_path / "own.py"
    file.write_text(
        "from jaxcnn.config import Data, Experiment, Train\n"
        "experiment = Experiment('own', data=Data(validation=0.1), train=Train(steps=4, eval_every=2))\n"
        "full = Experiment('own', data=Data(validation=0.1), train=Train(steps=40, eval_every=20))\n"
    )
    trial = Trial(0, {"optim.learning_rate": 0.25}, "complete", 0.5)

    def found(flags, launch, experiment, space, directory, stop) -> SearchResult:
        assert experiment.train.steps == 40
        directory.mkdir(parents=True)
        return SearchResult(space, (trial,))

    monkeypatch.setattr(search_command, "_search", found)
    monkeypatch.chdir(tmp_path)
    assert search_command.main([str(file), "--full", "--space", "optim.learning-rate=log:1e-4:1"]) == 0
    assert f"  jaxcnn train {file} --full --optim.learning-rate 0.25\n" in capsys.readouterr().out


PROGRAM = "import sys; from jaxcnn import cli; sys.exit(cli.main(['search', *sys.argv[1:]]))"


@pytest.mark.slow
@pytest.mark.parametrize(("signum", "code"), [(signal.SIGKILL, -9), (signal.SIGTERM, 143)])
def test_a_killed_process_resumes_and_ends_as_the_uninterrupted_one(tmp_path, signum, code):
    longer = ["--train.steps", "60", "--rounds", "2", "--quiet"]
    search = ["--trials", "6", "--search", "s", *TINY, *longer, *SPACE]
    again = [sys.executable, "-c", PROGRAM, *search, "--runs-dir"]
    subprocess.run([*again, str(tmp_path / "whole")], check=True)
    process = subprocess.Popen([*again, str(tmp_path / "killed")])
    directory = tmp_path / "killed" / "lenet5_digits" / "s"
    while not list(directory.glob("trial-002/checkpoints/*")):
        assert process.poll() is None
        time.sleep(0.01)
    process.send_signal(signum)
    assert process.wait() == code
    assert len(trials(directory)) == 2
    subprocess.run([*again, str(tmp_path / "killed")], check=True)
    assert trials(directory) == trials(tmp_path / "whole" / "lenet5_digits" / "s")
