"""The configuration of a run: frozen dataclasses, which are also the command line's flags.

Everything that can change a result is in `Experiment` and so in a run's `config.json`; where files lie is not.
A duration is given in steps or in epochs, everything inside a schedule as a fraction of the run.
"""

import dataclasses
import json
import math
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from jaxcnn.errors import InputError, unknown

Scalar = bool | int | float | str
Options = dict[str, Scalar]


@dataclass(frozen=True)
class Model:
    name: str = "lenet5"
    """One of `jaxcnn list`."""
    dtype: Literal["float32", "bfloat16", "float64"] = "float32"
    """Compute type; parameters and BatchNorm statistics stay float32 (float64 with float64)."""
    overrides: Options = field(default_factory=dict)
    """Switches of the model's family, as `NAME VALUE` pairs: width, norm, act, kernel_init, statistics, ..."""


@dataclass(frozen=True)
class Data:
    name: str = "digits"
    """digits, mnist, fashion_mnist, cifar10, cifar100, folder:NAME or tfds:NAME."""
    batch_size: int = 128
    """Training examples in one step, over all devices."""
    eval_batch_size: int = 1000
    storage: Literal["memory", "disk"] = "memory"
    """disk: the images of a folder stay compressed in their files and are decoded for every step."""
    image_size: tuple[int, int] | None = None
    """Height and width that images are scaled to; by default the data's own (digits: the model's input)."""
    preprocessing: str = "standardize"
    """none, scale, channel_mean, mean_image, standardize, pca, whiten or zca, fitted on the training split; imagenet or
    inception, what published weights were trained with."""
    validation: float = 0.0
    """Fraction of the training split held out to select the model; 0 trains on all of it."""
    random_resized_crop: tuple[float, float] | None = None
    """With storage disk: train on random crops of so much of an image's area, 0.08 to 1 in most papers, scaled to
    image-size; evaluate on the central 7/8 of height and width."""
    crop_padding: int = 0
    """Random crop after padding by so many pixels."""
    flip: bool = False
    """Mirror left and right with probability 1/2."""
    rotation: float = 0.0
    """Largest angle in degrees of a rotation either way, drawn uniformly; up to 180."""
    scaling: float = 0.0
    """Magnify by a factor drawn uniformly from 1 - this to 1 + this, up to 0.9."""
    color_jitter: float = 0.0
    """Change brightness, contrast and saturation by factors drawn uniformly from 1 - this to 1 + this, up to 1."""
    randaugment: tuple[int, int] | None = None
    """RandAugment: the number of operations, and their magnitude from 0 to 30; None is off."""
    cutout: int = 0
    """Side in pixels of the erased square."""
    mixup: float = 0.0
    """Alpha of mixup's Beta distribution; 0 is off."""
    cutmix: float = 0.0
    """Alpha of cutmix's Beta distribution; 0 is off."""


@dataclass(frozen=True)
class Optim:
    name: str = "sgd"
    """Any Optax optimiser, or alrao: a random learning rate for every unit."""
    learning_rate: float = 0.1
    """The schedule's peak."""
    schedule: str = "constant"
    """constant, steps, cosine, cyclic or triangle."""
    warmup: float = 0.0
    """Fraction of the run over which the learning rate rises from zero."""
    schedule_options: Options = field(default_factory=dict)
    """Further arguments of the schedule, as `NAME VALUE` pairs."""
    weight_decay: float = 0.0
    decay_mask: str = r"kernel$"
    """Regular expression over parameter paths: what weight decay applies to."""
    clip_norm: float | None = None
    """Largest global norm of the gradient."""
    freeze: str = ""
    """Regular expression over parameter paths: what stays as it starts; BatchNorm there uses its running statistics."""
    rates: dict[str, float] = field(default_factory=dict)
    """Factors of the learning rate as `PATTERN FACTOR` pairs; the first pattern found in a parameter's path counts."""
    options: Options = field(default_factory=dict)
    """Further arguments of the Optax optimiser, as `NAME VALUE` pairs: momentum, nesterov, b1, ..."""


@dataclass(frozen=True)
class Train:
    steps: int | None = None
    """Length of the run in optimiser steps; give this or epochs."""
    epochs: float | None = None
    """Length of the run in passes over the training split."""
    log_every: int = 50
    """Steps between lines of metrics.jsonl."""
    eval_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""
    checkpoint_every: int = 500
    """Steps between checkpoints; one more is written at the end."""
    keep_latest: int = 2
    keep_best: int = 1
    """Checkpoints kept by validation accuracy, beside the latest ones."""
    label_smoothing: float = 0.0
    ema_decay: float | None = None
    """Decay of the moving average of parameters and BatchNorm statistics that is evaluated instead."""
    accumulate: int = 1
    """Micro-batches in one step; BatchNorm normalises each one by itself and moves its statistics by each."""
    early_stopping: int = 0
    """Evaluations without a better validation accuracy after which training stops; 0 is off."""
    max_skipped: int = 20
    """Consecutive steps with a non-finite loss or gradient, each skipped whole, after which the run fails."""
    parallel: Literal["jit", "pmap"] = "jit"
    steps_per_call: int = 1
    """Steps compiled into one call, for accelerators that are faster than their host's dispatch; 1 on CPU."""
    deterministic: bool = False
    """On GPU: only kernels that give the same bits every time."""
    elastic: int = 0
    """Virtual shards of a batch, each augmented and normalised by itself, so that the result does not depend on the
    number of devices, processes or cores; at most so many devices can share the work. 0 is off."""
    fsdp: bool = False
    """Divide large parameters, their moving averages and the optimiser's over the devices, for what does not fit on
    each of them."""
    tensorboard: bool = False


@dataclass(frozen=True)
class Experiment:
    name: str = "lenet5_digits"
    """Directory of the runs below `--runs-dir`."""
    seed: int = 0
    init_from: str | None = None
    """Run directory, .safetensors, .npz or .h5 file, or NAME.TAG of `jaxcnn weights list`, once fetched, whose weights
    a new run starts from."""
    init_replace: str = ""
    """Regular expression over paths such as params/fc/kernel: what --init-from does not give, a new head."""
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    optim: Optim = field(default_factory=Optim)
    train: Train = field(default_factory=Train)


def total_steps(train: Train, *, examples: int, batch_size: int) -> int:
    """The length of the run in steps: every epoch sees every example once, the last batch is full."""
    if (train.steps is None) == (train.epochs is None):
        raise InputError("give the length of the run once: either --train.steps or --train.epochs")
    if train.steps is not None:
        steps = train.steps
    else:
        assert train.epochs is not None
        steps = math.ceil(train.epochs * examples / batch_size)
    if steps >= 2**31:
        raise InputError(f"a run of {steps} steps: at most 2**31 - 1 can be counted")
    return steps


def validate(experiment: Experiment) -> Experiment:
    """The experiment itself, if every number is in its range; `InputError` otherwise."""
    data, optim, train = experiment.data, experiment.optim, experiment.train
    if not experiment.name or "/" in experiment.name or experiment.name.startswith("."):
        raise InputError(f"the experiment's name {experiment.name!r} must be one directory name, without '/'")
    if not 0 <= experiment.seed < 2**32:
        raise InputError(f"--seed {experiment.seed} must be from 0 to 2**32 - 1")
    for flag, value, low in [
        ("--data.batch-size", data.batch_size, 1),
        ("--data.eval-batch-size", data.eval_batch_size, 1),
        ("--data.crop-padding", data.crop_padding, 0),
        ("--data.cutout", data.cutout, 0),
        ("--data.mixup", data.mixup, 0),
        ("--data.cutmix", data.cutmix, 0),
        ("--optim.weight-decay", optim.weight_decay, 0),
        ("--train.log-every", train.log_every, 1),
        ("--train.eval-every", train.eval_every, 0),
        ("--train.checkpoint-every", train.checkpoint_every, 1),
        ("--train.keep-latest", train.keep_latest, 2),
        ("--train.keep-best", train.keep_best, 1),
        ("--train.accumulate", train.accumulate, 1),
        ("--train.elastic", train.elastic, 0),
        ("--train.early-stopping", train.early_stopping, 0),
        ("--train.max-skipped", train.max_skipped, 1),
        ("--train.steps-per-call", train.steps_per_call, 1),
        ("--train.steps", 0 if train.steps is None else train.steps, 0),
    ]:
        if not (math.isfinite(value) and value >= low):
            raise InputError(f"{flag} {value} must be at least {low}")
    for flag, value in [("--optim.learning-rate", optim.learning_rate), ("--train.epochs", train.epochs)]:
        if value is not None and not (math.isfinite(value) and value > 0):
            raise InputError(f"{flag} {value} must be a positive number")
    if train.elastic and (train.accumulate > 1 or train.parallel == "pmap"):
        raise InputError(
            f"--train.elastic {train.elastic} divides the batch itself: give neither --train.accumulate nor pmap"
        )
    if train.fsdp and (train.elastic or train.parallel == "pmap"):
        raise InputError("--train.fsdp divides the state over the devices: give neither --train.elastic nor pmap")
    if optim.clip_norm is not None and not optim.clip_norm > 0:
        raise InputError(f"--optim.clip-norm {optim.clip_norm} must be positive")
    for flag, value in [
        ("--data.validation", data.validation),
        ("--train.label-smoothing", train.label_smoothing),
        ("--optim.warmup", optim.warmup),
        ("--train.ema-decay", train.ema_decay or 0.0),
    ]:
        if not 0 <= value < 1:
            raise InputError(f"{flag} {value} must be from 0 up to, but not including, 1")
    for flag, value, high in [
        ("--data.rotation", data.rotation, 180),
        ("--data.scaling", data.scaling, 0.9),
        ("--data.color-jitter", data.color_jitter, 1),
    ]:
        if not 0 <= value <= high:
            raise InputError(f"{flag} {value} must be from 0 to {high}")
    if data.randaugment is not None and not (data.randaugment[0] >= 1 and 0 <= data.randaugment[1] <= 30):
        raise InputError(f"--data.randaugment {data.randaugment} must be 1 operation or more, and a magnitude 0 to 30")
    if experiment.init_replace and experiment.init_from is None:
        raise InputError(f"--init-replace {experiment.init_replace!r} belongs to --init-from: give both")
    if data.image_size is not None and min(data.image_size) < 1:
        raise InputError(f"--data.image-size {data.image_size} must be two positive numbers: height and width")
    if (area := data.random_resized_crop) is not None:
        if data.storage != "disk":
            raise InputError(f"--data.random-resized-crop {area} needs whole images: give --data.storage disk")
        if not 0 < area[0] <= area[1] <= 1:
            raise InputError(f"--data.random-resized-crop {area} must be two shares of the area, 0 < low <= high <= 1")
    if train.early_stopping and not (data.validation and train.eval_every):
        raise InputError(
            "--train.early-stopping selects by validation accuracy: also give --data.validation (0.1, say)"
            " and --train.eval-every"
        )
    return experiment


def to_json(experiment: Experiment) -> dict[str, Any]:
    """Plain JSON types; `from_json` gives an equal experiment back."""
    return json.loads(json.dumps(dataclasses.asdict(experiment)))


def from_json(values: Mapping[str, Any], cls: type = Experiment) -> Any:
    """The inverse of `to_json`. Fields that a newer version added keep their default; unknown ones are errors."""
    hints = typing.get_type_hints(cls)
    fields = {f.name for f in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise unknown(f"field of {cls.__name__}", key, sorted(fields))
    return cls(**{key: _convert(hints[key], value) for key, value in values.items()})


def _convert(hint: Any, value: Any) -> Any:
    if dataclasses.is_dataclass(hint):
        return from_json(value, typing.cast(type, hint))
    alternatives = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    if isinstance(value, list) and any(typing.get_origin(a) is tuple for a in alternatives):
        return tuple(value)
    return value


def differences(old: Mapping[str, Any], new: Mapping[str, Any], prefix: str = "") -> list[str]:
    """One line `path: old -> new` for each leaf in which two JSON objects differ."""
    lines = []
    for key in sorted({*old, *new}):
        a, b = old.get(key), new.get(key)
        if isinstance(a, Mapping) and isinstance(b, Mapping):
            lines += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            lines.append(f"{prefix}{key}: {json.dumps(a)} -> {json.dumps(b)}")
    return lines


LENET5_DIGITS = Experiment(
    name="lenet5_digits",
    model=Model("lenet5"),
    data=Data("digits", batch_size=64, crop_padding=2),
    optim=Optim("adam", learning_rate=3e-3, schedule="cosine"),
    train=Train(epochs=40, log_every=50, checkpoint_every=300),
)
"""What `jaxcnn train` runs when nothing is said."""


def smoke(experiment: Experiment) -> Experiment:
    """The same experiment in a few small steps, to see that every part of it runs."""
    train = dataclasses.replace(
        experiment.train,
        steps=6,
        epochs=None,
        log_every=2,
        eval_every=min(experiment.train.eval_every, 3),
        checkpoint_every=3,
        steps_per_call=1,
    )
    data = dataclasses.replace(
        experiment.data,
        batch_size=16 * experiment.train.accumulate,
        eval_batch_size=min(experiment.data.eval_batch_size, 64),
    )
    return dataclasses.replace(experiment, data=data, train=train)
