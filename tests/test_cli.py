"""The command line: what it does, and how it says no. Run in this process; only exit codes of processes start one."""

import collections
import dataclasses
import errno
import gzip
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from runs import jaxcnn

from jaxcnn import checkpoint, cli
from jaxcnn.checkpoint import Checkpoints
from jaxcnn.data import sources
from jaxcnn.errors import InputError
from jaxcnn.train import loop, run

TINY = ["--model.name", "linear", "--data.image-size", "8", "8", "--data.batch-size", "32", "--data.crop-padding", "0"]
TINY += ["--train.log-every", "5"]
SHORT = [*TINY, "--train.steps", "10"]
LONG = [*TINY, "--train.steps", "60", "--optim.learning-rate", "0.02", "--train.checkpoint-every", "25"]


pytestmark = pytest.mark.usefixtures("own_caches")


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> Path:
    """RUNS_DIR with one finished run, `done`: 60 steps of a linear classifier, 359 test digits."""
    directory = tmp_path_factory.mktemp("runs")
    assert jaxcnn("train", "--runs-dir", directory, "--run", "done", "--quiet", *LONG) == 0
    return directory


@pytest.fixture
def done(runs, tmp_path) -> Path:
    """A copy of the finished run, to be spoilt."""
    shutil.copytree(runs / "lenet5_digits" / "done", tmp_path / "lenet5_digits" / "done")
    return tmp_path / "lenet5_digits" / "done"


@pytest.fixture
def refused(tmp_path, capsys, monkeypatch):
    """Runs `jaxcnn train ARGS`: refused with status 2 before compilation, leaving nothing; returns the message."""

    def compiled(*_: object, **__: object) -> None:
        raise AssertionError("bad input came as far as compilation")

    def refuse(*args: str | Path) -> str:
        runs_dir = tmp_path / "runs"
        with monkeypatch.context() as patch:
            patch.setattr(jax, "jit", compiled)
            assert jaxcnn("train", "--runs-dir", runs_dir, *args) == 2
        said = capsys.readouterr()
        assert "Traceback" not in said.err + said.out
        assert not runs_dir.exists()
        return said.err

    return refuse


# --- what it does --------------------------------------------------------------------------------------------


def test_a_run_directory_holds_what_is_promised(runs):
    done = runs / "lenet5_digits" / "done"
    assert {path.name for path in done.iterdir()} >= {
        *("config.json", "environment.json", "metrics.jsonl", "summary.json", "preprocessing.npz", "data.json"),
        *("curves.png", "confusion.png", "checkpoints"),
    }
    summary = json.loads((done / "summary.json").read_text())
    assert summary["final_step"] == 60
    assert summary["test_count"] == 359
    assert summary["test_accuracy"] == summary["test_correct"] / 359 > 0.5
    assert summary["state_sha256"] == Checkpoints(done / "checkpoints").restore_latest().state_sha256
    assert summary["seconds"] > 0
    environment = json.loads((done / "environment.json").read_text())
    assert {"versions", "git", "xla_flags", "device_kind", "devices", "cores", "data"} <= environment.keys()
    assert environment["data"].keys() == {"train", "test"}
    lines = [json.loads(line) for line in (done / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [*range(5, 61, 5)]
    assert all("step" in line for line in lines)


def test_a_finished_run_says_so_and_stays_as_it_is(runs, capsys):
    done = runs / "lenet5_digits" / "done"
    before = {path: path.stat().st_mtime_ns for path in (done / "checkpoints").rglob("*")}
    log = (done / "metrics.jsonl").read_bytes()
    assert jaxcnn("train", "--runs-dir", runs, "--run", "done", *LONG) == 0
    said = capsys.readouterr().out
    assert f"run {done} is finished" in said
    assert "test accuracy" in said
    assert {path: path.stat().st_mtime_ns for path in (done / "checkpoints").rglob("*")} == before
    assert (done / "metrics.jsonl").read_bytes() == log


def test_another_configuration_under_the_same_name_is_refused_with_the_difference(runs, capsys):
    before = (runs / "lenet5_digits" / "done" / "config.json").read_bytes()
    assert jaxcnn("train", "--runs-dir", runs, "--run", "done", *SHORT, "--seed", "3") == 2
    said = capsys.readouterr().err
    for line in ("seed: 0 -> 3", "train.steps: 60 -> 10", "optim.learning_rate: 0.02 -> 0.003"):
        assert line in said
    assert (runs / "lenet5_digits" / "done" / "config.json").read_bytes() == before


@pytest.mark.parametrize("batch_size", [1000, 128, 7])
def test_eval_counts_every_example_at_any_batch_size(runs, capsys, batch_size):
    done = runs / "lenet5_digits" / "done"
    assert jaxcnn("eval", done, "--json", "--data.batch-size", batch_size) == 0
    result = json.loads(capsys.readouterr().out)
    summary = json.loads((done / "summary.json").read_text())
    assert result["count"] == 359
    assert result["correct"] == summary["test_correct"]
    assert result["accuracy"] == summary["test_accuracy"]


def test_eval_in_words(runs, capsys):
    assert jaxcnn("eval", runs / "lenet5_digits" / "done") == 0
    assert "of 359)" in capsys.readouterr().out


@pytest.fixture(scope="module")
def picture(tmp_path_factory) -> Path:
    """A test digit, the first one, as a picture, scaled up."""
    from PIL import Image

    split = sources.load("digits", image_size=(8, 8)).test
    path = tmp_path_factory.mktemp("pictures") / f"a {split.labels[0]}.png"
    Image.fromarray(split.images[0, ..., 0]).resize((64, 64), Image.Resampling.NEAREST).save(path)
    return path


def test_predict_names_the_likeliest_classes(runs, picture, capsys):
    done = runs / "lenet5_digits" / "done"
    assert jaxcnn("predict", done, picture, picture, "--top-k", "3", "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["image"] for line in lines] == [str(picture)] * 2
    top = lines[0]["top"]
    assert len(top) == 3
    assert top == sorted(top, key=lambda one: -one["probability"])
    assert {one["class"] for one in top} <= set(map(str, range(10)))
    assert jaxcnn("predict", done, picture) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{picture}: {top[0]['class']} ")
    assert said.count("%") == 5


def test_init_from_starts_from_the_weights_of_a_run(runs, tmp_path):
    done = runs / "lenet5_digits" / "done"
    args = ["--init-from", done, "--runs-dir", tmp_path, "--run", "new", *TINY, "--train.steps", "0"]
    assert jaxcnn("train", *args) == 0
    summary, source = (json.loads((d / "summary.json").read_text()) for d in (tmp_path / "lenet5_digits/new", done))
    assert summary["test_correct"] == source["test_correct"]
    assert summary["final_step"] == 0


def test_seeds_are_trained_one_by_one_and_summed_up(tmp_path, capsys):
    args = ["--runs-dir", tmp_path, "--run", "s", "--seeds", "2", "--seed", "4", *SHORT]
    assert jaxcnn("train", *args) == 0
    folder = tmp_path / "lenet5_digits"
    summaries = [json.loads((folder / f"s-seed{seed}" / "summary.json").read_text()) for seed in (4, 5)]
    result = json.loads((folder / "s-seeds.json").read_text())
    a, b = (summary["test_accuracy"] for summary in summaries)
    assert (result["n"], result["seeds"], result["test_accuracy"]) == (2, [4, 5], [a, b])
    assert result["mean"] == pytest.approx((a + b) / 2)
    assert result["std"] == pytest.approx(abs(a - b) / 2**0.5)
    half = 12.706204736432095 * result["std"] / 2**0.5  # Student's t, one degree of freedom
    assert result["interval_95"] == pytest.approx([result["mean"] - half, result["mean"] + half])
    assert summaries[0]["state_sha256"] != summaries[1]["state_sha256"]
    capsys.readouterr()
    assert jaxcnn("train", *args) == 0  # both are finished
    assert capsys.readouterr().out.count("is finished") == 2


def test_a_run_without_a_name_gets_a_fresh_one(tmp_path):
    assert jaxcnn("train", "--runs-dir", tmp_path, "--quiet", *SHORT) == 0
    (only,) = (tmp_path / "lenet5_digits").iterdir()
    assert only.name[:2] == "20"
    assert (only / "summary.json").is_file()


@pytest.mark.parametrize("more", [[], ["--train.elastic", "8"], ["--train.accumulate", "2"], ["--seeds", "2"]])
def test_a_dry_run_says_what_it_would_take_and_makes_nothing(tmp_path, capsys, more):
    flags = ["--dry-run", "--runs-dir", str(tmp_path / "runs"), "--train.steps", "70", "--train.checkpoint-every", "30"]
    assert jaxcnn("train", *flags, *more) == 0
    said = capsys.readouterr().out
    assert "61,706 parameters" in said
    assert "steps        70 (3.1 epochs), 8 images on each of 8 devices" in said
    assert "checkpoints  3 of 0.7 MiB" in said
    assert "state 0.7 MiB, batch 1.1 MiB" in said
    assert ("peak" in said) == (more[:1] != ["--train.elastic"])
    assert not (tmp_path / "runs").exists()


def test_a_window_of_steps_is_profiled(tmp_path):
    flags = ["--runs-dir", str(tmp_path), "--run", "traced", "--train.steps", "4", "--quiet", "--profile", "1", "3"]
    assert jaxcnn("train", *flags, "--model.name", "linear") == 0
    assert len(list(tmp_path.glob("*/traced/profile/**/*.xplane.pb"))) == 1


def test_a_smoke_run_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert jaxcnn("train", "--smoke", "--quiet", "--model.name", "linear") == 0
    assert list(tmp_path.iterdir()) == []


def test_a_duration_replaces_the_experiments_own():
    for flag, value, steps, epochs in [("steps", "7", 7, None), ("epochs", "2", None, 2.0)]:
        train = cli.parse(cli.config.LENET5_DIGITS, [f"--train.{flag}", value])[1].train
        assert (train.steps, train.epochs) == (steps, epochs)
    train = cli.parse(cli.config.LENET5_DIGITS, ["--train.steps=7"])[1].train
    assert (train.steps, train.epochs) == (7, None)


def test_list_shows_every_model(capsys):
    assert jaxcnn("list", "--json") == 0
    rows = {row["name"]: row for row in json.loads(capsys.readouterr().out)}
    assert rows["lenet5"]["parameters"] == 61_706
    assert rows["cifar_resnet20"]["parameters"] == 269_722
    assert rows["resnet18"]["parameters"] == 11_689_512


# --- how it says no ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "parts"),
    [
        (["--model.name", "lenet6"], ["model 'lenet6'", "did you mean 'lenet5'"]),
        (["--model.overrides", "widht", "3"], ["override of model 'linear'", "'widht'"]),
        (["--data.name", "minst"], ["data set 'minst'", "'mnist'"]),
        (["--data.preprocessing", "standardise"], ["preprocessing 'standardise'", "'standardize'"]),
        (["--optim.name", "sdg"], ["optimizer 'sdg'", "'sgd'"]),
        (["--optim.options", "momentun", "0.9"], ["'momentun'"]),
        (["--optim.schedule", "cosin"], ["schedule 'cosin'", "'cosine'"]),
        (["--optim.schedule-options", "finall", "0.1"], ["'finall'", "'final'"]),
        (["--optim.decay-mask", "(", "--optim.weight-decay", "0.1"], ["'('"]),
        (["--optim.lerning-rate", "1"], ["--optim.lerning-rate", "--optim.learning-rate"]),
        (["--optim.learning-rate", "-0.1"], ["--optim.learning-rate -0.1"]),
        (["--optim.learning-rate", "fast"], ["--optim.learning-rate", "fast"]),
        (["--train.epochs", "3"], ["--train.steps and --train.epochs"]),
        (["--train.epochs=3"], ["--train.steps and --train.epochs"]),
        (["--train.parallel", "both"], ["both", "jit", "pmap"]),
        (["--data.batch-size", "12"], ["batch size 12", "8 devices", "8 say"]),
        (["--data.batch-size", "24", "--train.accumulate", "2"], ["batch size 24", "8 devices x 2", "16 say"]),
        (["--data.batch-size", "1600"], ["batch size 1600", "1438 examples"]),
        (["--data.validation", "0.0001"], ["0.0001", "validation"]),
        (["--run", "a/b"], ["'a/b'"]),
        (["--run", ".."], ["'..'"]),
        (["--run", ""], ["''"]),
        (["--seeds", "0"], ["--seeds 0"]),
        (["--full"], ["--full"]),
        (["--init-from", "nowhere"], ["nowhere is not a run directory"]),
        (["--data.name", "mnist", "--data-dir", "nowhere"], ["nowhere/mnist", "is missing", "jaxcnn data fetch mnist"]),
        (["--data.name", "tfds:no_such_set"], ["no_such_set"]),
        (["--data.name", "folder:none"], ["none"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("-") else "",
)
def test_bad_flags_are_refused_with_the_value_and_the_remedy(refused, args, parts):
    said = refused(*SHORT, *args)
    for part in parts:
        assert part in said


def test_an_unknown_command_is_refused(capsys):
    assert jaxcnn("trian") == 2
    assert "did you mean 'train'" in capsys.readouterr().err
    assert jaxcnn("data", "fetsch", "mnist") == 2
    assert "'fetch'" in capsys.readouterr().err
    assert jaxcnn() == 2
    assert jaxcnn("--help") == 0


def test_an_experiment_file_must_be_one(tmp_path, capsys):
    assert jaxcnn("train", tmp_path / "nothing.py") == 2
    assert "nothing.py does not exist" in capsys.readouterr().err
    (tmp_path / "other.py").write_text("x = 1\n")
    assert jaxcnn("train", tmp_path / "other.py") == 2
    assert "defines no `experiment" in capsys.readouterr().err


def idx(folder: Path, *, labels: np.ndarray) -> None:
    """A small data set in the files of MNIST."""
    folder.mkdir(parents=True)
    images = np.random.default_rng(0).integers(0, 256, (len(labels), 28, 28), np.uint8)
    for part in ("train", "t10k"):
        for stem, array in (("images-idx3", images), ("labels-idx1", labels)):
            header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
            data = gzip.compress(header + array.astype(np.uint8).tobytes())
            (folder / f"{part}-{stem}-ubyte.gz").write_bytes(data)


def test_damaged_data_files_are_named(refused, tmp_path):
    args = [*SHORT, "--data.name", "mnist", "--data-dir", tmp_path]
    folder = tmp_path / "mnist"
    idx(folder, labels=np.arange(64) % 10)
    path = folder / "train-images-idx3-ubyte.gz"
    sound = path.read_bytes()
    path.write_bytes(sound[: len(sound) // 2])
    assert str(path) in refused(*args)
    path.write_bytes(gzip.compress(gzip.decompress(sound)[:-1]))
    assert str(path) in refused(*args)
    path.unlink()
    assert str(path) in refused(*args)
    shutil.rmtree(folder)
    idx(folder, labels=np.arange(64) % 12)
    assert "label 10 of example 10 is outside 0..9" in refused(*args)


def test_damaged_folders_of_images_are_named(refused, tmp_path, picture):
    args = [*SHORT, "--data.batch-size", "8", "--data.name", "folder:pets", "--data-dir", tmp_path]
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(6):
            shutil.copy(picture, tmp_path / "pets" / name / f"{i}.png")
    (tmp_path / "pets" / "cow").mkdir()
    assert f"{tmp_path}/pets/cow: empty class folder" in refused(*args)
    bad = tmp_path / "pets" / "cow" / "0.png"
    bad.write_bytes(picture.read_bytes()[:60])
    assert str(bad) in refused(*args)


def test_numbers_that_are_not_finite_are_refused_in_data(refused, monkeypatch):
    def spoilt(root: Path, size: object) -> sources.Dataset:
        dataset = digits(root, size)
        images = (dataset.train.images / 255).astype(np.float32)
        images[17, 3, 3, 0] = np.nan
        train = dataclasses.replace(dataset.train, images=images)
        test = dataclasses.replace(dataset.test, images=(dataset.test.images / 255).astype(np.float32))
        return dataclasses.replace(dataset, train=train, test=test)

    digits = sources.SOURCES["digits"]
    monkeypatch.setitem(sources.SOURCES, "digits", spoilt)
    said = refused(*SHORT)
    assert "image 17 holds nan" in said


def test_a_place_that_cannot_be_written_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")  # (root may write anywhere else)
    assert jaxcnn("train", "--runs-dir", tmp_path / "file" / "runs", *SHORT) == 2
    said = capsys.readouterr().err
    assert f"{tmp_path}/file/runs/lenet5_digits" in said
    assert "cannot be written: Not a directory" in said
    assert jaxcnn("train", "--runs-dir", tmp_path / "runs", "--run", "x" * 300, *SHORT) == 2
    assert "File name too long" in capsys.readouterr().err


def test_no_permission_is_refused(monkeypatch):
    def denied(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    for name in ("mkdir", "exists"):
        with monkeypatch.context() as patch:
            patch.setattr(run.Path, name, denied)
            with pytest.raises(InputError, match="cannot be written: Permission denied"):
                run.RunDirectory("x", config={}, environment={})


def test_no_space_is_refused(refused, monkeypatch):
    usage = collections.namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(1 << 30, 1 << 30, 1000))
    said = refused(*SHORT)
    assert "1000 bytes free" in said


def test_weights_that_do_not_fit_are_refused(runs, tmp_path, capsys):
    done = runs / "lenet5_digits" / "done"
    assert jaxcnn("train", "--runs-dir", tmp_path / "runs", *SHORT, "--init-from", done, "--model.name", "mlp") == 2
    said = capsys.readouterr().err
    assert "unexpected params/dense/kernel (64, 10)" in said
    assert "missing params/dense1/kernel (64, 256)" in said
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("command", ["eval", "predict"])
def test_what_is_no_run_is_refused(command, tmp_path, picture, capsys):
    args = [command, tmp_path / "none", *([picture] if command == "predict" else [])]
    assert jaxcnn(*args) == 2
    assert f"{tmp_path}/none is not a run directory" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_a_run_without_a_checkpoint_is_refused(done, capsys):
    shutil.rmtree(done / "checkpoints")
    assert jaxcnn("eval", done) == 2
    assert "no complete checkpoint" in capsys.readouterr().err


def test_a_damaged_checkpoint_is_named_and_another_used(done, capsys):
    manifest = done / "checkpoints" / "60" / "state" / "manifest.ocdbt"
    manifest.write_bytes(manifest.read_bytes()[:-1])
    assert jaxcnn("eval", done, "--json") == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["count"] == 359
    assert f"{done}/checkpoints/60 is damaged" in said.err
    assert (done / "checkpoints" / "60").is_dir()  # reading a run changes nothing in it
    shutil.rmtree(done / "checkpoints" / "50")
    assert jaxcnn("eval", done) == 2


def test_eval_refuses_other_classes_and_sizes(done, tmp_path, picture, capsys):
    idx(tmp_path / "mnist", labels=np.arange(64) % 10)
    assert jaxcnn("eval", done, "--data.name", "fashion", "--data-dir", tmp_path) == 2
    assert "'fashion_mnist'" in capsys.readouterr().err
    config = json.loads((done / "config.json").read_text())
    config["data"]["image_size"] = None
    (done / "config.json").write_text(json.dumps(config))
    assert jaxcnn("eval", done, "--data.name", "mnist", "--data-dir", tmp_path) == 2
    assert "(28, 28, 1)" in capsys.readouterr().err
    for name in ("cat", "dog"):
        (tmp_path / "pets" / name).mkdir(parents=True)
        for i in range(3):
            shutil.copy(picture, tmp_path / "pets" / name / f"{i}.png")
    assert jaxcnn("eval", done, "--data.name", "folder:pets", "--data-dir", tmp_path) == 2
    assert "10 classes" in capsys.readouterr().err


def test_predict_refuses_what_is_no_picture(runs, tmp_path, capsys):
    done = runs / "lenet5_digits" / "done"
    (tmp_path / "x.png").write_text("no picture")
    for path in (tmp_path / "x.png", tmp_path / "none.png", tmp_path):
        assert jaxcnn("predict", done, path) == 2
        assert str(path) in capsys.readouterr().err
    assert jaxcnn("predict", done) == 2
    assert jaxcnn("predict", done, tmp_path / "x.png", "--top-k", "0") == 2
    assert "--top-k 0" in capsys.readouterr().err


def test_a_run_in_use_is_refused(done, capsys):
    config = json.loads((done / "config.json").read_text())
    with run.RunDirectory(done, config=config, environment={}, accept_environment=True):
        assert jaxcnn("train", "--runs-dir", done.parent.parent, "--run", "done", *LONG) == 2
    assert f"in use by process {os.getpid()}" in capsys.readouterr().err


def test_another_environment_is_refused_unless_accepted(done, capsys):
    environment = json.loads((done / "environment.json").read_text())
    environment["versions"]["jaxlib"] = "0.0.1"
    environment["cores"] = 999
    (done / "environment.json").write_text(json.dumps(environment))
    command = ["train", "--runs-dir", done.parent.parent, "--run", "done", *LONG]
    assert jaxcnn(*command) == 2
    assert 'versions.jaxlib: "0.0.1" -> ' in capsys.readouterr().err
    assert jaxcnn(*command, "--accept-environment") == 0
    said = capsys.readouterr().err
    assert "warning: versions.jaxlib" in said
    assert "warning: cores: 999 -> " in said


# --- failures ------------------------------------------------------------------------------------------------


def test_a_run_whose_last_save_fails_exits_1_and_can_go_on(tmp_path, capsys, monkeypatch):
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    args = ["train", "--runs-dir", tmp_path, "--run", "r", *SHORT]
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_manifest", full)
        assert jaxcnn(*args) == 1
    said = capsys.readouterr()
    assert "checkpoints/10 could not be written: [Errno 28] No space left" in said.err
    assert "the last checkpoint was not saved" in said.err
    directory = tmp_path / "lenet5_digits" / "r"
    assert not (directory / "summary.json").exists()
    assert list((directory / "checkpoints").iterdir()) == []
    assert jaxcnn(*args) == 0
    assert (directory / "summary.json").is_file()


def test_a_run_that_diverges_exits_1_with_the_steps(tmp_path, capsys):
    args = [*TINY, "--train.steps", "60", "--train.max-skipped", "5", "--optim.name", "sgd"]
    args += ["--optim.learning-rate", "1e38", "--optim.schedule", "constant"]
    assert jaxcnn("train", "--runs-dir", tmp_path, "--run", "r", *args) == 1
    assert "5 consecutive steps" in capsys.readouterr().err


def test_ctrl_c_exits_with_130(monkeypatch, tmp_path, capsys):
    import signal

    real = loop.create_state

    def interrupted(*args: object, **kwargs: object) -> object:
        signal.raise_signal(signal.SIGINT)
        return real(*args, **kwargs)

    monkeypatch.setattr(loop, "create_state", interrupted)
    assert jaxcnn("train", "--runs-dir", tmp_path, "--run", "r", *SHORT) == 130
    assert "stopped by SIGINT" in capsys.readouterr().err


def test_the_process_exits_with_the_status():
    environment = os.environ | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "jaxcnn", "train", "--optim.learning-rate", "-1"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert process.returncode == 2
    assert process.stderr == "error: --optim.learning-rate -1.0 must be a positive number\n"


def test_bfloat16_and_tensorboard_are_switches(tmp_path, capsys):
    pytest.importorskip("tensorboardX")
    flags = ["--smoke", "--runs-dir", str(tmp_path), "--run", "b", "--train.tensorboard", "--model.dtype", "bfloat16"]
    assert cli.main(["train", *flags]) == 0
    run = tmp_path / "lenet5_digits" / "b"
    assert list((run / "tensorboard").iterdir())
    assert "test accuracy" in capsys.readouterr().out


def test_options_of_the_command_line_join_those_of_the_experiment():
    base, _ = cli.experiment_of(Path(__file__).parent.parent / "experiments" / "resnet20_cifar10.py")
    _, joined = cli.parse(base, ["--optim.options", "momentum", "0.8"])
    assert joined.optim.options == {"momentum": 0.8, "nesterov": True}
    _, other = cli.parse(base, ["--optim.name", "adam"])
    assert other.optim.options == {}
    assert other.optim.schedule_options == base.optim.schedule_options


@pytest.mark.parametrize("override", [("width", "abc"), ("width", "-3"), ("depth", "1.5"), ("num_classes", "5")])
def test_impossible_overrides_are_bad_input(override, tmp_path, capsys):
    args = ["--model.name", "cifar_resnet20", "--model.overrides", *override, "--runs-dir", str(tmp_path)]
    assert cli.main(["train", *args]) == 2
    assert "error:" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_smoke_does_not_hide_a_mistyped_data_set(tmp_path, capsys):
    assert cli.main(["train", "--smoke", "--data.name", "cifra10", "--runs-dir", str(tmp_path)]) == 2
    assert "cifar10" in capsys.readouterr().err
