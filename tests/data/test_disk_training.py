"""Training, evaluation and prediction on images that stay on disk, by the command line."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from jpegs import folder
from runs import jaxcnn

from jaxcnn import config
from jaxcnn.data import preprocess, stream
from jaxcnn.data.disk import TrainRows, open_folder
from jaxcnn.data.records import prepare
from jaxcnn.data.sources import load_disk
from jaxcnn.errors import InputError

pytestmark = pytest.mark.usefixtures("own_caches")

FLAGS = ["--model.name", "linear", "--data.name", "folder:pets", "--data.storage", "disk", "--data.image-size", "16"]
FLAGS += ["12", "--data.preprocessing", "imagenet", "--data.batch-size", "16", "--data.crop-padding", "0"]
FLAGS += ["--data.validation", "0.2", "--data.eval-batch-size", "8", "--data.random-resized-crop", "0.3", "1.0"]
FLAGS += ["--train.log-every", "4", "--train.steps", "12", "--train.eval-every", "6", "--train.checkpoint-every", "6"]


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """With `data/pets` and a run on it, `runs/lenet5_digits/first`."""
    root = tmp_path_factory.mktemp("root")
    folder(root / "data" / "pets")
    args = ["--data-dir", root / "data", "--runs-dir", root / "runs", "--run", "first"]
    assert jaxcnn("train", *FLAGS, *args, "--quiet", "--workers", "0") == 0
    return root


def summary(root: Path, name: str) -> dict:
    return json.loads((root / "runs" / "lenet5_digits" / name / "summary.json").read_text())


def test_a_run_ends_as_any_other(root):
    found = summary(root, "first")
    assert found["final_step"] == 12
    assert found["test_count"] == 9
    run = root / "runs" / "lenet5_digits" / "first"
    assert (run / "confusion.png").exists()
    environment = json.loads((run / "environment.json").read_text())
    data = open_folder(root / "data" / "pets", image_size=(16, 12))
    assert environment["data"] == data.digests
    assert json.loads((run / "data.json").read_text()) == {"classes": list(data.classes), "input": [16, 12, 3]}


def test_eval_and_predict_take_the_run(root, capsys):
    run = root / "runs" / "lenet5_digits" / "first"
    assert jaxcnn("eval", run, "--data-dir", root / "data", "--json") == 0
    result = json.loads(capsys.readouterr().out)
    expected = summary(root, "first")
    assert (result["correct"], result["count"]) == (expected["test_correct"], 9)
    assert jaxcnn("predict", run, root / "data" / "pets" / "class1" / "000.jpg") == 0
    assert "class" in capsys.readouterr().out


def test_a_prepared_set_and_workers_give_the_same_bits(root):
    prepare(root / "data" / "pets", root / "other" / "pets", shards=3)
    args = ["--data-dir", root / "other", "--runs-dir", root / "runs", "--run", "prepared", "--quiet"]
    assert jaxcnn("train", *FLAGS, *args, "--workers", "1") == 0
    assert multiprocessing.active_children() == []
    assert summary(root, "prepared")["state_sha256"] == summary(root, "first")["state_sha256"]


def test_a_run_goes_on_to_the_same_bits(root, monkeypatch):
    """Decoding begins where the run does: workers are started once."""
    begun = []
    begin = stream.Pipeline._begin
    monkeypatch.setattr(stream.Pipeline, "_begin", lambda self: begun.append((self._make, self._at)) or begin(self))
    shutil.copytree(root / "runs" / "lenet5_digits" / "first", root / "runs" / "lenet5_digits" / "cut")
    cut = root / "runs" / "lenet5_digits" / "cut"
    (cut / "summary.json").unlink()
    shutil.rmtree(cut / "checkpoints" / "12")
    args = ["--data-dir", root / "data", "--runs-dir", root / "runs", "--run", "cut", "--quiet", "--workers", "0"]
    assert jaxcnn("train", *FLAGS, *args) == 0
    assert summary(root, "cut")["state_sha256"] == summary(root, "first")["state_sha256"]
    assert [at for make, at in begun if isinstance(make, TrainRows)] == [6]


@pytest.mark.slow
def test_search_compares_on_it(root, capsys):
    pytest.importorskip("optuna")
    flags = ["--space", "optim.learning_rate=log:1e-3:1e-2", "--trials", "2", "--search", "found", "--json"]
    args = ["--data-dir", root / "data", "--runs-dir", root / "runs", "--workers", "0"]
    assert jaxcnn("search", *FLAGS, *flags, *args) == 0
    assert len(json.loads(capsys.readouterr().out)["trials"]) == 2


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--data.preprocessing", "standardize"], "fitted to images in memory.* none, scale, imagenet, inception"),
        (["--data.image-size", "None"], "--data.image-size H W"),
        (["--data.name", "digits"], "'digits' cannot stay on disk.*--data.storage memory"),
        (["--data.name", "folder:none"], "none: no class folder found"),
        (["--data.storage", "memory"], "--data.random-resized-crop .* needs whole images: give --data.storage disk"),
        (["--data.random-resized-crop", "0", "1"], "0 < low <= high <= 1"),
        (["--workers", "-1"], "--workers -1 must be at least 0"),
    ],
)
def test_what_does_not_fit_is_refused(root, tmp_path, capsys, flags, said):
    args = ["--data-dir", root / "data", "--runs-dir", tmp_path / "runs"]
    assert jaxcnn("train", *FLAGS, *args, *flags) == 2
    error = capsys.readouterr().err
    assert said.partition(".*")[0] in error
    assert said.rpartition(".*")[2] in error
    assert not (tmp_path / "runs").exists()


def test_a_configuration_survives_json():
    experiment = config.Experiment(data=config.Data(storage="disk", random_resized_crop=(0.08, 1.0)))
    assert config.from_json(config.to_json(experiment)) == experiment


@pytest.mark.parametrize("kind", preprocess.FIXED)
def test_fixed_preprocessing_needs_no_pixels(root, kind):
    data = load_disk("pets", data_dir=root / "data", image_size=(16, 12))
    unread, read = (preprocess.fit(kind, images) for images in (data.train.images, np.asarray(data.train.images)))
    assert unread.arrays.keys() == read.arrays.keys()
    x = np.random.default_rng(0).random((2, 16, 12, 3)).astype(np.float32)
    np.testing.assert_array_equal(unread(x), read(x))
    assert unread.channel_mean.shape == (3,)


def test_fitted_preprocessing_is_refused(root):
    data = load_disk("pets", data_dir=root / "data", image_size=(16, 12))
    with pytest.raises(InputError, match="'zca' is fitted to images in memory"):
        preprocess.fit("zca", data.train.images)


@pytest.mark.slow
def test_sigterm_to_the_whole_group_saves_and_the_run_goes_on_to_the_same_bits(root):
    flags = [*FLAGS, "--train.steps", "400", "--train.checkpoint-every", "100", "--train.eval-every", "0"]
    args = ["--data-dir", str(root / "data"), "--runs-dir", str(root / "runs"), "--quiet"]
    command = [sys.executable, "-m", "jaxcnn", "train", *flags, *args, "--run", "stopped", "--workers", "2"]
    log = root / "runs" / "lenet5_digits" / "stopped" / "metrics.jsonl"
    with subprocess.Popen(command, start_new_session=True, stderr=subprocess.PIPE, text=True) as process:
        deadline = time.monotonic() + 120
        while not (log.exists() and log.stat().st_size):
            assert process.poll() is None, process.communicate()
            assert time.monotonic() < deadline
            time.sleep(0.05)
        os.killpg(process.pid, signal.SIGTERM)
        assert "SIGTERM" in process.communicate(timeout=60)[1]
        assert process.returncode == 143
    assert subprocess.run([*command, "--workers", "0"], check=False).returncode == 0
    assert subprocess.run([*command[:-3], "whole", "--workers", "1"], check=False).returncode == 0
    assert summary(root, "stopped")["state_sha256"] == summary(root, "whole")["state_sha256"]


@pytest.mark.slow
def test_a_damaged_image_ends_the_command_at_once(root, tmp_path):
    shutil.copytree(root / "data", tmp_path / "data")
    for path in (tmp_path / "data" / "pets" / "class0").iterdir():
        path.write_bytes(path.read_bytes()[:300])
    command = [sys.executable, "-m", "jaxcnn", "train", *FLAGS, "--data-dir", str(tmp_path / "data"), "--workers", "2"]
    command += ["--runs-dir", str(tmp_path / "runs"), "--quiet"]
    found = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert found.returncode == 2
    assert "cannot read image" in found.stderr
    assert found.stderr.count("\n") == 1
    assert not (tmp_path / "runs").exists()
