"""The configuration survives its file, and every number outside its range is named."""

import dataclasses
import json
import runpy
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxcnn import config
from jaxcnn.config import Data, Experiment, Model, Optim, Train
from jaxcnn.errors import InputError

EXPERIMENTS = Path(__file__).parents[1] / "experiments"

RICH = Experiment(
    name="rich",
    seed=7,
    init_from="runs/other",
    model=Model("mlp", "bfloat16", {"width": 32, "act": "tanh", "ratio": 0.5, "switch": True}),
    data=Data("folder:pets", batch_size=24, image_size=(32, 48), validation=0.1, mixup=0.2),
    optim=Optim("sgd", schedule="steps", schedule_options={"at": [0.5, 0.75]}, options={"momentum": 0.9}),
    train=Train(epochs=1.5, eval_every=10, ema_decay=0.99, accumulate=2, early_stopping=3),
)


def changed(**parts: dict) -> Experiment:
    """A valid experiment with fields of its parts replaced, e.g. `changed(data={"batch_size": 0})`."""
    base = Experiment(train=Train(steps=10))
    fields = {
        key: dataclasses.replace(getattr(base, key), **value) if isinstance(value, dict) else value
        for key, value in parts.items()
    }
    return dataclasses.replace(base, **fields)


@pytest.mark.parametrize("experiment", [Experiment(), RICH, config.LENET5_DIGITS], ids=lambda e: e.name)
def test_json_gives_the_same_experiment_back(experiment):
    text = json.dumps(config.to_json(experiment))
    assert config.from_json(json.loads(text)) == experiment


def test_a_file_of_an_older_version_takes_the_defaults_of_newer_fields():
    values = config.to_json(RICH)
    del values["data"]["cutmix"], values["seed"], values["optim"]
    old = config.from_json(values)
    assert (old.data.cutmix, old.seed, old.optim) == (0.0, 0, Optim())
    assert old.train == RICH.train


def test_an_unknown_field_is_named_with_the_nearest():
    with pytest.raises(InputError, match=r"field of Data 'batchsize': did you mean 'batch_size'"):
        config.from_json({"data": {"batchsize": 3}})


@pytest.mark.parametrize(
    ("parts", "flag"),
    [
        ({"data": {"batch_size": 0}}, "--data.batch-size 0"),
        ({"data": {"eval_batch_size": 0}}, "--data.eval-batch-size 0"),
        ({"data": {"crop_padding": -1}}, "--data.crop-padding -1"),
        ({"data": {"cutout": -2}}, "--data.cutout -2"),
        ({"data": {"mixup": float("nan")}}, "--data.mixup nan"),
        ({"data": {"cutmix": -0.1}}, "--data.cutmix -0.1"),
        ({"data": {"validation": 1.0}}, "--data.validation 1.0"),
        ({"data": {"validation": -0.1}}, "--data.validation -0.1"),
        ({"data": {"image_size": (0, 8)}}, r"--data.image-size \(0, 8\)"),
        ({"optim": {"learning_rate": -0.1}}, "--optim.learning-rate -0.1"),
        ({"optim": {"learning_rate": 0.0}}, "--optim.learning-rate 0.0"),
        ({"optim": {"learning_rate": float("inf")}}, "--optim.learning-rate inf"),
        ({"optim": {"weight_decay": -1e-4}}, "--optim.weight-decay -0.0001"),
        ({"optim": {"warmup": 1.0}}, "--optim.warmup 1.0"),
        ({"optim": {"clip_norm": 0.0}}, "--optim.clip-norm 0.0"),
        ({"optim": {"clip_norm": float("nan")}}, "--optim.clip-norm nan"),
        ({"train": {"steps": -1}}, "--train.steps -1"),
        ({"train": {"steps": None, "epochs": 0.0}}, "--train.epochs 0.0"),
        ({"train": {"steps": None, "epochs": float("nan")}}, "--train.epochs nan"),
        ({"train": {"log_every": 0}}, "--train.log-every 0"),
        ({"train": {"eval_every": -1}}, "--train.eval-every -1"),
        ({"train": {"checkpoint_every": 0}}, "--train.checkpoint-every 0"),
        ({"train": {"keep_latest": 1}}, "--train.keep-latest 1"),
        ({"train": {"keep_best": 0}}, "--train.keep-best 0"),
        ({"train": {"label_smoothing": 1.0}}, "--train.label-smoothing 1.0"),
        ({"train": {"ema_decay": 1.0}}, "--train.ema-decay 1.0"),
        ({"train": {"ema_decay": -0.5}}, "--train.ema-decay -0.5"),
        ({"train": {"accumulate": 0}}, "--train.accumulate 0"),
        ({"train": {"early_stopping": -1}}, "--train.early-stopping -1"),
        ({"train": {"early_stopping": 2}}, "--data.validation"),
        ({"train": {"early_stopping": 2}, "data": {"validation": 0.1}}, "--train.eval-every"),
        ({"train": {"max_skipped": 0}}, "--train.max-skipped 0"),
        ({"train": {"steps_per_call": 0}}, "--train.steps-per-call 0"),
        ({"seed": -1}, "--seed -1"),
        ({"seed": 2**32}, "--seed 4294967296"),
        ({"name": "a/b"}, "'a/b'"),
        ({"name": ""}, "''"),
        ({"name": ".."}, r"'\.\.'"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_a_value_outside_its_range_is_named(parts, flag):
    with pytest.raises(InputError, match=flag):
        config.validate(changed(**parts))


@pytest.mark.parametrize("experiment", [RICH, config.LENET5_DIGITS, changed(train={"steps": 0})], ids=lambda e: e.name)
def test_values_inside_their_range_pass_unchanged(experiment):
    assert config.validate(experiment) is experiment


def test_a_length_is_given_exactly_once():
    for train in (Train(), Train(steps=10, epochs=1)):
        with pytest.raises(InputError, match=r"--train\.steps or --train\.epochs"):
            config.total_steps(train, examples=100, batch_size=10)


def test_a_length_that_cannot_be_counted_is_refused():
    for train in (Train(steps=2**31), Train(epochs=1e12)):
        with pytest.raises(InputError, match="steps: at most"):
            config.total_steps(train, examples=100, batch_size=10)
    assert config.total_steps(Train(steps=2**31 - 1), examples=1, batch_size=1) == 2**31 - 1


@given(epochs=st.integers(1, 50), examples=st.integers(1, 10_000), batch_size=st.integers(1, 500))
def test_epochs_cover_the_data_and_the_last_batch_begins_inside(epochs, examples, batch_size):
    steps = config.total_steps(Train(epochs=epochs), examples=examples, batch_size=batch_size)
    assert (steps - 1) * batch_size < epochs * examples <= steps * batch_size


def test_the_papers_recipe_is_64000_iterations_on_any_split():
    full = runpy.run_path(str(EXPERIMENTS / "resnet20_cifar10.py"))["full"]
    assert config.total_steps(full.train, examples=50_000, batch_size=128) == 64_000
    assert config.total_steps(full.train, examples=45_000, batch_size=128) == 64_000
    assert full.data.batch_size == 128


def test_differences_name_the_leaves():
    old, new = config.to_json(RICH), config.to_json(RICH)
    assert config.differences(old, new) == []
    new["data"]["batch_size"], new["train"]["epochs"], new["model"]["overrides"] = 32, None, {"width": 32}
    assert config.differences(old, new) == [
        "data.batch_size: 24 -> 32",
        'model.overrides.act: "tanh" -> null',
        "model.overrides.ratio: 0.5 -> null",
        "model.overrides.switch: true -> null",
        "train.epochs: 1.5 -> null",
    ]


@pytest.mark.parametrize(
    "path", [p for p in sorted(EXPERIMENTS.glob("*.py")) if "run_experiment(" in p.read_text()], ids=lambda p: p.stem
)
def test_every_experiment_is_valid_and_has_a_short_version(path):
    found = runpy.run_path(str(path))
    for experiment in filter(None, (found["experiment"], found.get("full"))):
        short = config.validate(config.smoke(config.validate(experiment)))
        assert config.total_steps(short.train, examples=256, batch_size=short.data.batch_size) == 6
        assert short.data.batch_size % (8 * short.train.accumulate) == 0
        assert (short.model, short.optim) == (experiment.model, experiment.optim)


def test_smoke_keeps_what_a_run_does():
    short = config.smoke(RICH)
    kept = ("ema_decay", "accumulate", "early_stopping", "label_smoothing", "parallel")
    assert all(getattr(short.train, name) == getattr(RICH.train, name) for name in kept)
    assert 0 < short.train.eval_every <= 3
    assert config.smoke(Experiment(train=Train(steps=9))).train.eval_every == 0
