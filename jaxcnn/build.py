"""From a configuration to plain objects: arrays, a Flax module, an Optax transformation, functions of a batch."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcnn import losses, models, optim
from jaxcnn.config import Data, Experiment, Model, total_steps
from jaxcnn.data import preprocess, sources
from jaxcnn.data.augment import Augmentation, augment
from jaxcnn.data.loader import check_batch_size, gather
from jaxcnn.data.preprocess import Preprocessing
from jaxcnn.errors import InputError
from jaxcnn.train.elastic import check_parts
from jaxcnn.transfer import Frozen
from jaxcnn.types import Array, ArrayLike, Batch

SMOKE_EXAMPLES = 256


@dataclass(frozen=True)
class Splits:
    """Host arrays of one data set; `validation` only where a fraction of the training split is held out."""

    train: sources.Split
    validation: sources.Split | None
    test: sources.Split
    classes: tuple[str, ...]
    digests: Mapping[str, str]


def splits(experiment: Experiment, *, data_dir: Path | None, smoke: bool = False, workers: int | None = None) -> Splits:
    """Reads the data. The held-out split depends on the data alone, not on the run's seed.

    `workers` processes decode images that stay on disk; None takes what the cores allow.

    A smoke run takes a few examples, and the embedded digits where the data set is not there.
    """
    data, entry = experiment.data, models.MODELS.get(experiment.model.name)
    height, width, channels = entry.input if entry and len(entry.input) == 3 else (28, 28, 1)
    usual = (height, width, channels)
    root = data_dir or sources.default_data_dir()
    try:
        dataset = _load(data, usual, data_dir, workers=workers)
    except InputError:
        if not smoke or data.name not in sources.SOURCES or (root / data.name).exists():
            raise
        print(f"{data.name} is not here: the smoke run takes the embedded digits", flush=True)
        data = dataclasses.replace(data, name="digits", storage="memory")
        dataset = _load(data, usual, data_dir, channels=usual[2])
    train, validation = dataset.train, None
    if data.validation:
        train, validation = sources.hold_out(dataset, data.validation, seed=0)
    if smoke:
        few = np.arange(SMOKE_EXAMPLES)
        train, test = train.take(few[: len(train.labels)]), dataset.test.take(few[: len(dataset.test.labels)])
        validation = validation and validation.take(few[: len(validation.labels)])
        return Splits(train, validation, test, dataset.classes, dataset.digests)
    return Splits(train, validation, dataset.test, dataset.classes, dataset.digests)


def _load(
    data: Data, usual: tuple[int, int, int], data_dir: Path | None, channels: int = 0, workers: int | None = None
) -> sources.Dataset:
    size = data.image_size
    if data.storage == "disk":
        return sources.load_disk(
            data.name, data_dir=data_dir, image_size=size, area=data.random_resized_crop, workers=workers
        )
    if data.name == "digits" and size is None:
        size = (min(usual[0], 64), min(usual[1], 64))  # they have 8x8 pixels: nothing is gained beyond
    dataset = sources.load(data.name, data_dir=data_dir, image_size=size)
    if channels <= 1:
        return dataset
    return dataclasses.replace(
        dataset,
        **{
            part: dataclasses.replace(split, images=np.repeat(split.images, channels, axis=-1))
            for part, split in (("train", dataset.train), ("test", dataset.test))
        },
    )


@dataclass(frozen=True)
class Parts:
    """An experiment's network and what trains it, checked against its data; `parameters` are the trained ones."""

    net: nn.Module
    optimizer: optax.GradientTransformation
    schedule: optax.Schedule
    steps: int
    parameters: int


def parts(experiment: Experiment, data: Splits, *, devices: int, net: nn.Module | None = None) -> Parts:
    """`net` stands for the experiment's model. `InputError`, before anything is compiled, for what does not fit."""
    examples, batch_size = len(data.train), experiment.data.batch_size
    steps = total_steps(experiment.train, examples=examples, batch_size=batch_size)
    if net is None:
        net = module(experiment.model, num_classes=len(data.classes), freeze=experiment.optim.freeze)
    transformation, schedule = optimizer(experiment, steps=steps)
    check_parts(batch_size, devices=devices, accumulate=experiment.train.accumulate, shards=experiment.train.elastic)
    parameters = check_model(net, data.train.images)
    check_batch_size(batch_size, examples=examples)
    return Parts(net, transformation, schedule, steps, parameters)


def seeds_options(experiment: Experiment, made: Parts, preprocessing: Preprocessing, data: Splits) -> dict[str, Any]:
    """The arguments that `fit` and `fit_seeds` both take, but for module, data and seeds."""
    settings = experiment.train
    return {
        "optimizer": made.optimizer,
        "steps": made.steps,
        "batch_size": experiment.data.batch_size,
        "eval_batch_size": experiment.data.eval_batch_size,
        "loss_fn": losses.classification(label_smoothing=settings.label_smoothing),
        "eval_loss_fn": losses.classification(),
        "prepare": prepare_train(experiment, preprocessing, num_classes=len(data.classes)),
        "prepare_eval": prepare_eval(experiment, preprocessing),
        "ema_decay": settings.ema_decay,
        "accumulate": settings.accumulate,
        "log_every": settings.log_every,
        "eval_every": settings.eval_every,
    }


def fit_options(experiment: Experiment, made: Parts, preprocessing: Preprocessing, data: Splits) -> dict[str, Any]:
    """Every argument of `fit` that the experiment decides, but for module and data."""
    settings = experiment.train
    return {
        **seeds_options(experiment, made, preprocessing, data),
        "seed": experiment.seed,
        "learning_rate": made.schedule,
        "early_stopping": settings.early_stopping,
        "max_skipped": settings.max_skipped,
        "checkpoint_every": settings.checkpoint_every,
        "keep_latest": settings.keep_latest,
        "keep_best": settings.keep_best,
        "parallel_mode": settings.parallel,
        "shards": settings.elastic,
        "fsdp": settings.fsdp,
        "steps_per_call": 1 if jax.default_backend() == "cpu" or settings.elastic else settings.steps_per_call,
        "tensorboard": settings.tensorboard,
    }


def module(model: Model, *, num_classes: int, freeze: str = "") -> nn.Module:
    """The model that the configuration names, for so many classes; `Frozen` where `freeze` is given."""
    overrides: dict[str, Any] = dict(model.overrides)
    for taken, remedy in (("num_classes", "the data decides"), ("dtype", "give --model.dtype"), ("name", "drop it")):
        if taken in overrides:
            raise InputError(f"--model.overrides {taken} cannot be given: {remedy}")
    if model.dtype != "float32":
        overrides["dtype"] = jnp.dtype(model.dtype)
    net = models.create(model.name, num_classes=num_classes, **overrides)
    return Frozen(net, freeze) if freeze else net


def optimizer(experiment: Experiment, *, steps: int) -> tuple[optax.GradientTransformation, optax.Schedule]:
    """The optimiser and its learning rate as a function of the step."""
    settings = experiment.optim
    schedule = optim.make_schedule(
        settings.schedule,
        learning_rate=settings.learning_rate,
        steps=max(steps, 1),
        warmup=settings.warmup,
        **settings.schedule_options,
    )
    transformation = optim.make_optimizer(
        settings.name,
        schedule=schedule,
        weight_decay=settings.weight_decay,
        decay_mask=settings.decay_mask,
        clip_norm=settings.clip_norm,
        freeze=settings.freeze,
        rates=settings.rates,
        **settings.options,
    )
    return transformation, schedule


def prepare_train(
    experiment: Experiment, preprocessing: Preprocessing, *, num_classes: int
) -> Callable[[Batch, Array], Batch]:
    """Gathers, preprocesses and augments a training batch, inside the compiled step.

    Borders and erased squares are 0 after preprocessing, as in the papers. Rotations onto principal axes mix the
    pixels, and colours are changed in 0..1, so there augmentation comes first, with the training split's mean in the
    borders.
    """
    data = experiment.data
    settings = Augmentation(**{field.name: getattr(data, field.name) for field in dataclasses.fields(Augmentation)})
    finish = prepare_eval(experiment, preprocessing)

    first = settings.needs_pixels or preprocessing.kind in ("pca", "whiten", "zca")

    def augmented(batch: Batch, key: Array, fill: ArrayLike) -> Batch:
        images, labels = augment(
            key, batch["image"], batch["label"], settings=settings, num_classes=num_classes, fill=fill
        )
        return {**batch, "image": images, "label": labels}

    def prepare(batch: Batch, key: Array) -> Batch:
        batch = gather(batch)
        if not first:
            return augmented(finish(batch), key, jnp.zeros(batch["image"].shape[-1]))
        batch = {**batch, "image": preprocess.to_float(batch["image"])}
        return finish(augmented(batch, key, preprocessing.channel_mean))

    return prepare


def prepare_eval(experiment: Experiment, preprocessing: Preprocessing) -> Callable[[Batch], Batch]:
    """Preprocesses a batch; float64 models get float64 images."""
    dtype = jnp.float64 if experiment.model.dtype == "float64" else jnp.float32

    def prepare(batch: Batch) -> Batch:
        return {**batch, "image": preprocessing(preprocess.to_float(batch["image"]).astype(dtype))}

    return prepare


def check_model(net: nn.Module, images: np.ndarray) -> int:
    """The number of trained parameters; runs nothing, so that what does not fit is said before compilation."""
    sample = jax.ShapeDtypeStruct((1, *images.shape[1:]), jnp.float32)
    try:
        shapes = jax.eval_shape(lambda x: net.init(jax.random.key(0), x, train=False), sample)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{type(net).__name__} cannot be built for images of {images.shape[1:]}: {error}") from error
    return sum(leaf.size for leaf in jax.tree.leaves(shapes["params"]))
