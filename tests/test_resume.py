"""A run that was stopped, killed or damaged ends in the same bits, and says the same, as one that was not."""

import errno
import json
import os
import re
import shutil
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcnn import checkpoint, parallel
from jaxcnn.data.augment import Augmentation, augment
from jaxcnn.data.loader import eval_batches, gather, train_feed
from jaxcnn.layers.dropout import Dropout
from jaxcnn.layers.norm import BatchNorm
from jaxcnn.signals import Stopped, stop_on_signals
from jaxcnn.train import FitResult, TrainingFailed, fit, log, loop, state_sha256
from jaxcnn.train.log import TIMINGS
from jaxcnn.tree import flatten

RNG = np.random.default_rng(0)


def examples(n: int) -> tuple[np.ndarray, np.ndarray]:
    """Images (n, 6, 6, 1) whose brightness tells the class, with noise enough to be wrong at times."""
    labels = RNG.integers(0, 4, n).astype(np.int32)
    images = 50 * labels[:, None, None, None] + RNG.integers(0, 60, (n, 6, 6, 1))
    return images.astype(np.float32), labels


TRAIN, VALIDATION, TEST = examples(112), examples(40), examples(36)
MESH = parallel.make_mesh(jax.devices()[:2])
# From step 18 on the rate is far too high, so that the best step is not the last one.
SCHEDULE = optax.piecewise_constant_schedule(0.02, {18: 100})
OPTIMIZER = optax.chain(optax.add_decayed_weights(1e-3), optax.sgd(SCHEDULE, momentum=0.9))


class Net(nn.Module):
    """Convolution, BatchNorm and dropout: state of every kind."""

    @nn.compact
    def __call__(self, x, *, train):
        x = BatchNorm(name="bn")(nn.Conv(4, (3, 3))(x), train=train)
        x = Dropout(0.2)(nn.relu(x), train=train)
        return nn.Dense(4)(x.reshape(x.shape[0], -1))


def prepare(batch, key):
    batch = gather(batch)
    settings = Augmentation(crop_padding=1, flip=True, mixup=0.2)
    image = batch["image"].astype(jnp.float32) / 255
    images, labels = augment(key, image, batch["label"], settings=settings, num_classes=4, fill=jnp.zeros(1))
    return {"image": images, "label": labels}


def prepare_eval(batch):
    return {**batch, "image": batch["image"].astype(jnp.float32) / 255}


@pytest.fixture(scope="module", autouse=True)
def compile_cache(tmp_path_factory):
    """The same programs are compiled by many of these tests: a cache of this session's own."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], str(tmp_path_factory.mktemp("xla")))
    jax.config.update(names[1], 0.0)
    yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture(scope="module", autouse=True)
def compile_once():
    """Most of these runs take the same steps: each is traced once, not once for each call of `fit`."""
    made: dict[str, Callable] = {}

    def remembering(make: Callable) -> Callable:
        return lambda *args, **options: made.setdefault(repr((make, args, options)), make(*args, **options))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "make_train_step", remembering(loop.make_train_step))
        patch.setattr(loop, "make_eval_step", remembering(loop.make_eval_step))
        yield


def nothing() -> None:
    pass


class Killed(BaseException):
    """Ends the process in the eyes of the code under test: nothing catches it."""


def kill() -> None:
    raise Killed


def sigterm() -> None:
    os.kill(os.getpid(), signal.SIGTERM)


class Moment(NamedTuple):
    """The call that is disturbed: of the training batches by step, of the validation or test set by number."""

    where: str
    number: int


def train(
    directory: Path | None,
    moment: Moment | None = None,
    do: Callable[[], None] = nothing,
    *,
    poisoned: range = range(0),
    **changes: Any,
) -> FitResult:
    """A run with augmentation, dropout, BatchNorm, EMA, accumulation, validation and early stopping.

    At `moment` it does `do`; the images of the steps `poisoned`, counted from 0, are NaN.
    """
    feed = train_feed(*TRAIN, batch_size=16, seed=3, mesh=MESH)
    calls = {"validation": 0, "test": 0}

    def batch(step: int):
        if moment == ("train", step):
            do()
        batch = feed(step)
        if step in poisoned:
            batch["store"] = batch["store"] | {"image": batch["store"]["image"] * np.nan}
        return batch

    def split(name: str, data: tuple[np.ndarray, np.ndarray]):
        def batches():
            calls[name] += 1
            for one in eval_batches(*data, batch_size=16, mesh=MESH)():
                if moment == (name, calls[name]):
                    do()
                yield one

        return batches

    settings: dict[str, Any] = {
        "steps": 30,
        "batch_size": 16,
        "optimizer": OPTIMIZER,
        "learning_rate": SCHEDULE,
        "validation": split("validation", VALIDATION),
        "test": split("test", TEST),
        "seed": 3,
        "prepare": prepare,
        "prepare_eval": prepare_eval,
        "ema_decay": 0.8,
        "accumulate": 2,
        "early_stopping": 4,
        "log_every": 4,
        "eval_every": 6,
        "checkpoint_every": 8,
        "directory": directory,
        "mesh": MESH,
        "quiet": True,
    }
    return fit(Net(), batch, **(settings | changes))


class Outcome(NamedTuple):
    """All that two runs of the same configuration must agree in."""

    digest: str
    step: int
    selected_step: int
    test: dict
    lines: list[dict]


def without_timings(path: Path) -> list[dict]:
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMINGS} for line in lines]


def outcome(result: FitResult, directory: Path) -> Outcome:
    lines = without_timings(directory / "metrics.jsonl")
    return Outcome(state_sha256(result.state), result.step, result.selected_step, result.test, lines)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Path:
    """The directory of a run that nothing disturbed."""
    directory = tmp_path_factory.mktemp("whole")
    (directory / "outcome").write_text(json.dumps(outcome(train(directory), directory)))
    return directory


@pytest.fixture(scope="module")
def undisturbed(whole) -> Outcome:
    return Outcome(*json.loads((whole / "outcome").read_text()))


@pytest.fixture
def half(whole, tmp_path) -> Path:
    """A run with a checkpoint of its last step, 30, that may be damaged."""
    shutil.copytree(whole, tmp_path / "half")
    return tmp_path / "half"


def test_the_run_is_worth_resuming(undisturbed, whole):
    """It uses what the tests below are about: otherwise they would show nothing."""
    scores = [line["validation_accuracy"] for line in undisturbed.lines if "validation_accuracy" in line]
    assert len(scores) == 5
    assert undisturbed.step == 30
    assert undisturbed.selected_step == 6 * (1 + int(np.argmax(scores)))
    assert undisturbed.selected_step < 24  # kept for its score alone
    assert undisturbed.lines[-1]["test_accuracy"] == undisturbed.test["accuracy"]
    steps = {int(path.name) for path in (whole / "checkpoints").iterdir()}
    assert steps == {24, 30, undisturbed.selected_step}


def test_the_log_has_every_line_once(undisturbed):
    assert [line["step"] for line in undisturbed.lines if "loss" in line] == [*range(4, 30, 4), 30]
    assert [line["step"] for line in undisturbed.lines if "validation_loss" in line] == [6, 12, 18, 24, 30]
    assert [line["step"] for line in undisturbed.lines if "test_loss" in line] == [30]
    assert [line["step"] for line in undisturbed.lines] == sorted(line["step"] for line in undisturbed.lines)


MOMENTS = [
    Moment("train", 1),  # before the first checkpoint
    Moment("train", 16),  # after a checkpoint
    Moment("train", 21),
    Moment("train", 29),
    Moment("validation", 2),  # one of these becomes the best
    Moment("validation", 3),
    Moment("validation", 5),  # at the end
    Moment("test", 1),
]


def name_of(moment: Moment) -> str:
    return f"{moment.where}{moment.number}"


@pytest.mark.parametrize("moment", MOMENTS, ids=name_of)
def test_stopped_by_sigterm_and_started_again(tmp_path, undisturbed, moment):
    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(Stopped, match="SIGTERM") as stopped:
        train(tmp_path, moment, sigterm)
    assert stopped.value.exit_code == 143
    assert signal.getsignal(signal.SIGTERM) is handler
    assert outcome(train(tmp_path), tmp_path) == undisturbed


@pytest.mark.parametrize("moment", [MOMENTS[i] for i in (0, 2, 5, 7)], ids=name_of)
def test_killed_and_started_again(tmp_path, undisturbed, moment):
    with pytest.raises(Killed):
        train(tmp_path, moment, kill)
    assert outcome(train(tmp_path), tmp_path) == undisturbed


def test_stopped_again_and_again(tmp_path, undisturbed):
    for number in (4, 13, 14, 25):
        with pytest.raises(Stopped):
            train(tmp_path, Moment("train", number), sigterm)
        assert max(map(int, os.listdir(tmp_path / "checkpoints"))) == number + 1  # the step was finished
    assert outcome(train(tmp_path), tmp_path) == undisturbed


@pytest.mark.parametrize("step", [8, 30])
def test_killed_while_it_saves(tmp_path, undisturbed, monkeypatch, step):
    real = checkpoint._write_manifest

    def half_way(path, **kwargs):
        if kwargs["step"] == step:
            raise Killed
        real(path, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "_write_manifest", half_way)
        with pytest.raises(Killed):
            train(tmp_path)
    assert outcome(train(tmp_path), tmp_path) == undisturbed


def test_a_finished_run_ends_the_same_when_asked_again(half, undisturbed):
    assert outcome(train(half), half) == undisturbed


@pytest.mark.parametrize("damage", ["flip", "truncate", "delete", "later"])
def test_damage_to_the_newest_checkpoint_does_not_change_the_end(half, undisturbed, capsys, damage):
    newest = half / "checkpoints" / "30"
    file = next(iter(sorted((newest / "state" / "ocdbt.process_0" / "d").iterdir())))
    if damage == "flip":
        data = bytearray(file.read_bytes())
        data[-1] ^= 128
        file.write_bytes(data)
    elif damage == "truncate":
        os.truncate(file, 7)
    elif damage == "delete":
        file.unlink()
    else:
        newest = half / "checkpoints" / "500"
        newest.mkdir()
    assert outcome(train(half, quiet=False), half) == undisturbed
    said = capsys.readouterr().out
    assert str(newest) in said
    assert "moved to" in said
    assert len(list((half / "damaged").iterdir())) == 1


def test_a_checkpoint_written_beside_the_training_has_the_sums_of_its_own_step(
    tmp_path, whole, undisturbed, monkeypatch
):
    real = checkpoint.Checkpoints._save

    def late(*args):
        time.sleep(0.3)  # steps are much shorter: the log's next line is written meanwhile
        real(*args)

    monkeypatch.setattr(checkpoint.Checkpoints, "_save", late)
    assert outcome(train(tmp_path, asynchronous_saves=True), tmp_path) == undisturbed
    step = undisturbed.selected_step
    assert step % 4  # lies between two lines
    loops = [checkpoint.Checkpoints(d / "checkpoints").restore(step).loop for d in (whole, tmp_path)]
    assert loops[0] | {"seconds": 0} == loops[1] | {"seconds": 0}


def test_evaluations_are_told_in_order_and_again_after_a_resumption(tmp_path, undisturbed):
    class Enough(Exception):
        pass

    heard: list[tuple[int, dict[str, float]]] = []

    def listen(step: int, result: dict[str, float]) -> None:
        heard.append((step, result))
        if step == 12 and len(heard) == 2:
            raise Enough

    with pytest.raises(Enough):
        train(tmp_path, on_evaluation=listen)
    first = list(heard)
    result = train(tmp_path, on_evaluation=listen)
    assert [step for step, _ in first] == [6, 12]
    assert heard[2:4] == first
    lines = [line for line in result.history if "validation_accuracy" in line]
    assert heard[2:] == [
        (line["step"], {name.removeprefix("validation_"): value for name, value in line.items() if name != "step"})
        for line in lines
    ]
    assert outcome(result, tmp_path) == undisturbed


def test_the_same_bits_on_a_second_run_and_without_a_directory(undisturbed):
    result = train(None)
    assert (state_sha256(result.state), result.selected_step, result.test) == undisturbed[:1] + undisturbed[2:4]
    lines = [{k: v for k, v in line.items() if k not in TIMINGS} for line in result.history]
    assert lines == undisturbed.lines


def test_another_seed_gives_another_end(undisturbed):
    assert state_sha256(train(None, seed=4).state) != undisturbed.digest


# --- early stopping ------------------------------------------------------------------------------------------


@pytest.fixture
def always_seven_tenths(monkeypatch):
    """Every evaluation gives 0.7: no float32 number, which kept as one must not differ from itself."""
    real = loop.evaluate
    monkeypatch.setattr(loop, "evaluate", lambda *args, **kwargs: real(*args, **kwargs) | {"accuracy": 0.7})


@pytest.mark.usefixtures("always_seven_tenths")
def test_an_equal_score_is_no_better_one(tmp_path):
    result = train(tmp_path, early_stopping=2)
    assert (result.step, result.selected_step) == (18, 6)
    assert result.history[-1]["selected_step"] == 6


@pytest.mark.usefixtures("always_seven_tenths")
def test_stopping_early_survives_a_stop(tmp_path):
    expected = outcome(train(tmp_path / "a", early_stopping=2), tmp_path / "a")
    assert expected.step == 18
    assert [line["step"] for line in expected.lines if "loss" in line][-1] == 18
    for moment in (Moment("train", 13), Moment("validation", 3)):
        shutil.rmtree(tmp_path / "b", ignore_errors=True)
        with pytest.raises(Stopped):
            train(tmp_path / "b", moment, sigterm, early_stopping=2)
        assert outcome(train(tmp_path / "b", early_stopping=2), tmp_path / "b") == expected


# --- saves that fail -----------------------------------------------------------------------------------------


def failing_saves(monkeypatch, *steps: int) -> None:
    real = checkpoint._write_manifest

    def full(path, **kwargs):
        if kwargs["step"] in steps:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(path, **kwargs)

    monkeypatch.setattr(checkpoint, "_write_manifest", full)


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_save_that_fails_is_reported_and_tried_again(tmp_path, undisturbed, monkeypatch, capsys, asynchronous):
    failing_saves(monkeypatch, 8, 24)
    result = train(tmp_path, quiet=False, asynchronous_saves=asynchronous)
    assert outcome(result, tmp_path) == undisturbed
    assert result.unsaved is None
    said = capsys.readouterr().err
    for step in (8, 24):
        assert f"{tmp_path}/checkpoints/{step} could not be written: [Errno 28] No space left on device" in said
        assert re.search(rf"/{step} could not be written: .* \([0-9,]+ bytes are free, [0-9,]+ are needed\)", said)
    assert said.count("tries again") == 2


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_last_save_that_fails_is_in_the_result(tmp_path, monkeypatch, asynchronous):
    failing_saves(monkeypatch, 30)
    result = train(tmp_path, asynchronous_saves=asynchronous)
    assert "checkpoints/30 could not be written" in result.unsaved
    assert "No space left" in result.unsaved
    assert [path.name for path in tmp_path.glob("checkpoints/30*")] == []


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, undisturbed, monkeypatch):
    """The save of step 8 ends only after step 12 was logged; what it holds is step 8 all the same."""
    logged, real, late = threading.Event(), checkpoint._write_manifest, []

    def slow(path, **kwargs):
        if kwargs["step"] == 8:
            late.append(logged.wait(60))
        real(path, **kwargs)

    write = log.MetricsLog.write

    def watched(self, line):
        write(self, line)
        if line["step"] == 12:
            logged.set()

    monkeypatch.setattr(checkpoint, "_write_manifest", slow)
    monkeypatch.setattr(log.MetricsLog, "write", watched)
    result = train(tmp_path, asynchronous_saves=True, keep_latest=9)
    assert late == [True]
    assert outcome(result, tmp_path) == undisturbed
    monkeypatch.undo()
    train(tmp_path / "at once", keep_latest=9)
    kept, other = (checkpoint.Checkpoints(path / "checkpoints").restore(8) for path in (tmp_path, tmp_path / "at once"))
    assert kept.state_sha256 == other.state_sha256
    assert kept.loop | {"seconds": 0} == other.loop | {"seconds": 0}


# --- numbers that are not finite -----------------------------------------------------------------------------


def test_training_fails_with_the_window_of_steps(tmp_path):
    options: dict[str, Any] = {"poisoned": range(13, 30), "max_skipped": 6}
    with pytest.raises(TrainingFailed, match=r"6 consecutive steps, 14 to 19: .* state is that of step 13"):
        train(tmp_path, **options)
    kept = checkpoint.Checkpoints(tmp_path / "checkpoints").restore_latest()
    assert kept.step == 16
    assert kept.arrays["counters/skipped"] == 3
    healthy = flatten(train(None, steps=13).state)
    for name, array in kept.arrays.items():
        if name.startswith(("params", "collections", "opt_state", "ema")):
            np.testing.assert_array_equal(array, healthy[name])
    with pytest.raises(TrainingFailed, match="14 to 19"):  # the count goes on where it was
        train(tmp_path, **options)


def test_a_run_that_fails_keeps_the_checkpoint_it_was_writing(tmp_path, monkeypatch):
    real = checkpoint.Checkpoints._save

    def late(*args):
        time.sleep(0.5)
        real(*args)

    monkeypatch.setattr(checkpoint.Checkpoints, "_save", late)
    with pytest.raises(TrainingFailed):
        train(tmp_path, poisoned=range(13, 30), max_skipped=6, asynchronous_saves=True)
    assert checkpoint.Checkpoints(tmp_path / "checkpoints").steps()[-1] == 16


def test_a_few_bad_steps_are_skipped_and_counted():
    result = train(None, steps=16, poisoned=range(5, 10), max_skipped=6)
    lines = [line for line in result.history if "loss" in line]
    assert [line.get("skipped", 0) for line in lines] == [0, 3, 2, 0]
    assert int(result.state.counters["skipped"]) == 5
    assert all(np.isfinite(line["loss"]) for line in lines)


# --- signals -------------------------------------------------------------------------------------------------


def test_a_stop_before_compilation_is_heeded():
    with stop_on_signals() as stop:
        sigterm()
        with pytest.raises(Stopped):
            train(None)
        assert stop.signum == signal.SIGTERM
