"""`jaxcnn bn` on finished runs: what it prints, what it writes, and that the run stays as it is."""

import json
from pathlib import Path

import numpy as np
import pytest

from jaxcnn import cli, report
from jaxcnn.analysis.batchnorm import fold
from jaxcnn.commands import bn
from jaxcnn.errors import InputError
from jaxcnn.pretrained import read
from jaxcnn.trained import of_run
from jaxcnn.tree import flatten

DATA = ("--data.name", "light")
NORMS = ["bn1", "bn2"]


pytestmark = pytest.mark.usefixtures("own_caches")


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """60 images of two classes, 40 of them for training: dark ones and bright ones."""
    from PIL import Image

    home = tmp_path_factory.mktemp("home")
    rng = np.random.default_rng(0)
    for part, n in (("train", 20), ("test", 10)):
        for name, mean in (("dark", 60), ("bright", 190)):
            folder = home / "data" / "light" / part / name
            folder.mkdir(parents=True)
            for i in range(n):
                picture = np.clip(rng.normal(mean, 40, (32, 32, 3)), 0, 255).astype(np.uint8)
                Image.fromarray(picture).save(folder / f"{i}.png")
    return home


def train(home: Path, name: str, *overrides: str) -> Path:
    flags = ["--model.name", name, "--model.overrides", *overrides, "--data-dir", str(home / "data"), *DATA]
    flags += ["--data.image-size", "32", "32", "--data.batch-size", "8", "--data.preprocessing", "imagenet"]
    flags += ["--data.crop-padding", "0", "--train.steps", "8", "--train.checkpoint-every", "8"]
    assert cli.main(["train", *flags, "--runs-dir", str(home / "runs"), "--run", name, "--quiet"]) == 0
    return home / "runs" / "lenet5_digits" / name


@pytest.fixture(scope="module")
def run(home) -> Path:
    """Eight steps: running averages that have not gone far from their start."""
    return train(home, "vanilla_cnn", "norm", "batch", "stages", "2", "width", "4", "hidden", "8")


def run_bn(capsys, command: str, run: Path, *args: str | Path) -> str:
    data = run.parents[2] / "data"
    assert bn.main([command, str(run), "--data-dir", str(data), *map(str, args)]) == 0
    return capsys.readouterr().out


def evaluated(capsys, home: Path, *args: str | Path) -> float:
    assert cli.main(["eval", *map(str, args), "--data-dir", str(home / "data"), "--json"]) == 0
    return json.loads(capsys.readouterr().out)["accuracy"]


def test_recalibrate(home, run, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    found = json.loads(run_bn(capsys, "recalibrate", run, "--json"))
    output = run / "recalibrated.safetensors"
    assert found["output"] == str(output)
    assert (found["mode"], found["examples"], found["passes"]) == ("exact", 40, 2)
    assert found["test_accuracy_before"] == evaluated(capsys, home, run)
    assert found["test_accuracy_after"] >= found["test_accuracy_before"]
    weights = ("--model", "vanilla_cnn", "--weights", output, *DATA)
    assert evaluated(capsys, home, *weights) == found["test_accuracy_after"]
    assert all(path.read_bytes() == content for path, content in before.items())
    old, new = flatten(report.load_variables(run)), read(output)
    assert {path for path in old if not np.array_equal(old[path], new[path])} == {
        f"batch_stats/{norm}/{name}" for norm in NORMS for name in ("mean", "var")
    }
    assert "recalibrated (exact) on 40 images of light" in output.with_suffix(".md").read_text()
    with pytest.raises(InputError, match="exists: move it away"):
        bn.main(["recalibrate", str(run)])


def test_one_pass_says_so(run, tmp_path, capsys):
    output = tmp_path / "precise.safetensors"
    shown = run_bn(capsys, "recalibrate", run, "--mode", "one_pass", "--output", output)
    assert "mode one_pass: 1 passes over 40 training images" in shown
    assert "test accuracy" in shown
    assert output.exists()


def test_fold(home, run, tmp_path, capsys):
    output = tmp_path / "folded.safetensors"
    found = json.loads(run_bn(capsys, "fold", run, "--output", output, "--json"))
    assert found["folded"] == NORMS
    assert found["kept"] == {}
    assert found["relative"] < 1e-5
    assert found["difference"] >= 0
    assert found["speedup"] > 0
    assert not any("bn" in path for path in read(output))
    weights = ("--model", "vanilla_cnn", "--weights", output, *DATA)
    assert evaluated(capsys, home, *weights) == evaluated(capsys, home, run)


@pytest.mark.slow
def test_fold_of_what_no_options_give(home, tmp_path, capsys):
    """No biases without norms here: the arrays are written for those who fold themselves."""
    run = train(home, "cifar_resnet20", "depth", "8", "width", "2")
    output = tmp_path / "folded.safetensors"
    capsys.readouterr()
    shown = run_bn(capsys, "fold", run, "--output", output, "--batch-size", "8")
    assert "folded 7: bn1, stage1/block1/bn1" in shown
    assert "largest logit difference" in shown
    assert "times as fast, 8 images a call" in shown
    assert "params/stage1/block1/conv1/bias" in read(output)
    trained = of_run(run)
    x = trained.preprocess(np.zeros((1, *trained.input), np.uint8))
    folded = fold(trained.network, trained.variables, x=x)
    assert flatten(folded.variables).keys() == read(output).keys()


def test_drift(run, capsys):
    rows = json.loads(run_bn(capsys, "drift", run, "--json"))
    assert [row["name"] for row in rows] == NORMS
    for row in rows:
        assert row["smallest"] <= row["ratio"] <= row["largest"]
        assert 0 <= row["shift"] <= row["largest_shift"]
    shown = run_bn(capsys, "drift", run)
    assert all(word in shown for word in ("bn2", "variance ratio", "largest shift", f"{rows[0]['ratio']:.3g}"))


def test_bad_input(run, tmp_path, capsys):
    assert bn.main([]) == 2
    assert bn.main(["--help"]) == 0
    assert "recalibrate" in capsys.readouterr().out
    with pytest.raises(InputError, match="unknown bn command 'flod'"):
        bn.main(["flod", str(run)])
    with pytest.raises(InputError, match=r"expected \.safetensors"):
        bn.main(["fold", str(run), "--output", str(tmp_path / "folded.npz")])
    with pytest.raises(InputError, match="--batch-size 0"):
        bn.main(["drift", str(run), "--batch-size", "0"])
    with pytest.raises(InputError, match="is not a run directory"):
        bn.main(["drift", str(tmp_path)])
