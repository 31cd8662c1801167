"""Figures: committed results belong to their run sheets and to experiments/README.md, and reruns give them again."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from jaxcnn.config import Data, Experiment, Model, Optim, Train
from jaxcnn.errors import InputError
from jaxcnn.figures import Bench, table
from jaxcnn.figures.run import plain
from jaxcnn.files import load_file
from jaxcnn.plots import band, bands, dots
from jaxcnn.seeds import SeedsResult

ROOT = Path(__file__).parent.parent
EXPERIMENTS = ROOT / "experiments"
FIGURES = [path for path in sorted(EXPERIMENTS.glob("*.py")) if "run_figure(" in path.read_text()]
RESULTS = sorted((EXPERIMENTS / "results").glob("*.json"))


@pytest.mark.parametrize("path", FIGURES, ids=lambda path: path.stem)
def test_a_figure_has_a_run_sheet_a_result_and_a_picture(path):
    source = path.read_text()
    sheet = table.sheet(source, name=path.stem)
    assert f"experiments/{path.name}" in sheet.command
    written = EXPERIMENTS / "results" / f"{path.stem}.json"
    if not written.exists():
        assert sheet.fields["Measured"] == "nothing yet"
        return
    result = json.loads(written.read_text())
    assert sheet.fields["Measured"] == " ".join(result["measured"].split())
    assert source == table.with_measured(source, result["measured"])
    assert (EXPERIMENTS / "results" / f"{path.stem}.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_a_result_says_where_it_comes_from(path):
    result = json.loads(path.read_text())
    assert path.stem in [figure.stem for figure in FIGURES]
    commit = result["environment"]["git"]
    assert len(commit) == 40, "made by code that was not committed"
    assert result["result"]["seeds"] == list(range(len(result["result"]["seeds"])))
    assert path.stat().st_size < 100_000


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_what_is_said_follows_from_the_numbers(path):
    result = json.loads(path.read_text())
    figure = load_file(EXPERIMENTS / f"{path.stem}.py")
    assert figure["say"](result["result"]) == result["measured"]


def test_the_readme_of_the_experiments_is_made_of_the_results():
    assert (EXPERIMENTS / "README.md").read_text() == table.readme(EXPERIMENTS)


def run(*args: str, **environment: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *args], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, timeout=300
    )


TOY = '''"""A toy.

    python experiments/toy.py

Claim     a
Source    b
Cost      c
Expected  d
Measured  e
"""
from dataclasses import dataclass
from jaxcnn.figures import run_figure

@dataclass(frozen=True)
class Settings:
    seeds: int = 3

def measure(settings, bench):
    return {"seeds": list(range(settings.seeds)), "value": 1 / 3}

def say(result):
    return f"{result['value']:.3f}, n = {len(result['seeds'])}"

def draw(result, figure):
    figure.subplots().plot([0, result["value"]])

if __name__ == "__main__":
    run_figure(Settings(), measure=measure, say=say, draw=draw, smoke={"seeds": 1})
'''


@pytest.mark.slow
def test_a_figure_from_its_command_to_its_files(tmp_path):
    file = tmp_path / "toy.py"
    file.write_text(TOY)
    smoke = run(str(file), "--smoke")
    assert smoke.returncode == 0, smoke.stderr
    assert "n = 1" in smoke.stdout
    assert not (tmp_path / "results").exists()
    assert run(str(file), "--full").returncode == 2
    assert run(str(file), "--draw").returncode == 2
    whole = run(str(file))
    assert whole.returncode == 0, whole.stderr
    result = json.loads((tmp_path / "results" / "toy.json").read_text())
    assert result["measured"] == "0.333, n = 3"
    assert result["settings"] == {"seeds": 3}
    assert result["result"] == {"seeds": [0, 1, 2], "value": 0.333333}
    picture = tmp_path / "results" / "toy.png"
    picture.unlink()
    assert run(str(file), "--draw").returncode == 0
    assert picture.exists()
    changed = run(str(file), "--seeds", "4")
    assert changed.returncode == 2
    assert "--output" in changed.stderr
    assert run(str(file), "--seeds", "4", "--output", str(tmp_path / "mine")).returncode == 0
    assert json.loads((tmp_path / "mine" / "toy.json").read_text())["measured"] == "0.333, n = 4"
    assert json.loads((tmp_path / "results" / "toy.json").read_text()) == result


def test_the_best_rate_is_that_of_least_loss_and_nan_never_wins():
    bench = Bench(data_dir=None, smoke=True)
    asked = []

    def train(rate: float, seeds: list[int]) -> SeedsResult:
        asked.append((rate, seeds))
        experiment = Experiment(
            model=Model("linear"),
            data=Data("digits", batch_size=32, image_size=(8, 8)),
            optim=Optim("sgd", learning_rate=rate),
            train=Train(steps=10),
        )
        return bench.train(experiment, seeds=seeds, test=50, quiet=True)

    best, losses = bench.best_rate(train, [1e-6, 1e-2, 1e30], seed=7)
    assert best == 1e-2
    assert losses[1] < losses[0]
    assert not losses[2] < losses[0]
    assert asked == [(1e-6, [7]), (1e-2, [7]), (1e30, [7])]
    assert bench.best_rate(train, [0.5], seed=7) == (0.5, [])
    assert len(asked) == 3


@pytest.mark.slow
def test_a_rerun_gives_the_committed_numbers(tmp_path):
    committed = json.loads((EXPERIMENTS / "results" / "init_100_layers.json").read_text())
    done = run(str(EXPERIMENTS / "init_100_layers.py"), "--output", str(tmp_path), XLA_FLAGS="")
    assert done.returncode == 0, done.stderr
    again = json.loads((tmp_path / "init_100_layers.json").read_text())
    for name, case in committed["result"]["cases"].items():  # to the bit on one machine, to rounding on others
        np.testing.assert_allclose(
            np.array(again["result"]["cases"][name]["rms"]["mean"][:20], float),
            np.array(case["rms"]["mean"][:20], float),
            rtol=1e-3,
        )


def test_measured_is_written_into_the_sheet():
    sentence = "one two " * 30
    written = table.with_measured(TOY, sentence)
    assert table.sheet(written, name="toy").fields["Measured"] == sentence.strip()
    assert max(map(len, written.splitlines())) <= 120
    assert written.partition('"""\nfrom')[2] == TOY.partition('"""\nfrom')[2]


def test_a_sheet_that_lacks_a_field_is_refused():
    with pytest.raises(InputError, match="Claim"):
        table.sheet(TOY.replace("Claim     a\n", ""), name="toy")


def test_plain_is_json():
    value = {"a": np.float32(1 / 3), 2: [math.nan, math.inf, 1e-50], "b": np.arange(2), "c": (True, None, "x")}
    assert json.loads(json.dumps(plain(value))) == {
        "a": 0.333333,
        "2": [None, None, 1e-50],
        "b": [0, 1],
        "c": [True, None, "x"],
    }


def test_bands_and_dots_draw_what_they_are_given():
    from matplotlib.figure import Figure

    axes = Figure().subplots()
    found = band([0, 1, 2], [[1, 3], [2, 4], [0, 8]])
    bands(axes, {"one": plain(found), "two": {key: [None, 1, 2] for key in found}})
    assert axes.lines[0].get_ydata().tolist() == [2, 3, 4]
    assert np.isnan(axes.lines[1].get_ydata()[0])
    assert len({line.get_color() for line in axes.lines}) == 2
    dots(axes, {"a": [1.0, 2.0], "b": [3.0]})
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b"]
