"""Transfer to few images: a pretrained ResNet-20 fine-tuned, as a fixed extractor, and trained from scratch.

    python experiments/transfer_few_shot.py --data-dir DIR --weights FILE     all of it, 5 seeds
    python experiments/transfer_few_shot.py --data-dir DIR --parts held_out   needs no weights file

Claim     features of one task carry over to another, and the more so the fewer images that one has (Yosinski et al.
          2014; Kornblith et al. 2019)
Source    fashion: the public CIFAR-10 ResNet-20 (FILE, 91.73 % there) to Fashion-MNIST, its 28x28 pixels padded with 0
          to 32x32 and repeated in three channels. held_out: a ResNet-20 trained here on 7 classes of CIFAR-10
          to the other 3: horse, ship, truck
Data      10, 50 and 250 training images a class, drawn anew with every seed, the same ones for all three ways.
          Accuracy on the first 2,000 images of the test split (of those 3 classes in held_out)
Recipe    Adam, cosine schedule to 0, 100 steps of 30 images, ImageNet's mean and deviation, no augmentation.
          scratch: rate 1e-2. fine-tuning: new head at 1e-2, all else from the source at 0.3 of that.
          linear probe: the head alone at 3e-2, all else frozen, its BatchNorm statistics too.
          Rates were chosen among 2 or 3 for each way by 2 other draws of 10 images a class of Fashion-MNIST and
          the accuracy on 1,000 further training images, and are the same everywhere
          Source of held_out: SGD, 0.1 with momentum 0.9 and cosine schedule, weight decay 5e-4, batches of 128, flips
          and crops, 2 epochs
Output    transfer.png: accuracy against images a class; summary.json: every accuracy, means, 95 % intervals over the
          seeds (Student's t), and the gain of fine-tuning over scratch, seed by seed
Expected  at 10 images a class fine-tuning is ahead of scratch by more than the 95 % interval of 5 seeds
Measured  by the first command on 2 CPU cores (mean and 95 % interval, n = 5), fashion:
          images a class   scratch          fine-tuning      linear probe     fine-tuning over scratch
          10               63.29 +- 4.05    75.06 +- 1.40    51.81 +- 2.00    11.77 +- 4.09
          50               73.84 +- 1.96    84.66 +- 1.70    58.37 +- 1.04    10.82 +- 2.35
          250              73.69 +- 0.92    86.47 +- 0.91    58.80 +- 1.36    12.78 +- 1.23
          100 steps bound what scratch makes of 250 images a class
          held_out, whose source reaches 67.01 % of its own 7,000 test images:
          10               57.08 +- 2.06    66.75 +- 5.36    73.94 +- 7.64    9.67 +- 6.68
          50               71.75 +- 1.56    82.75 +- 0.71    81.62 +- 0.41    11.00 +- 2.05
          250              75.57 +- 5.11    88.49 +- 0.89    81.89 +- 1.02    12.92 +- 5.21
          At 10 images a class of its own data set the features as they are do best
"""

import argparse
import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcnn import parallel, pretrained
from jaxcnn.cli import run_program
from jaxcnn.data import preprocess, sources
from jaxcnn.data.augment import Augmentation, augment
from jaxcnn.data.dataset import Dataset, Split
from jaxcnn.data.loader import eval_batches, gather, train_feed
from jaxcnn.errors import InputError
from jaxcnn.files import write_json
from jaxcnn.models import create
from jaxcnn.optim import make_optimizer, make_schedule
from jaxcnn.plots import BLUE, GREEN, ORANGE
from jaxcnn.spread import spread
from jaxcnn.train import create_state, evaluate, fit, make_eval_step, make_train_step, rng
from jaxcnn.transfer import Frozen, merge
from jaxcnn.types import Array, Batch, PyTree

HELD_OUT = (7, 8, 9)
BATCH, TEST_IMAGES = 30, 2000
BODY = "^(?!fc/)"
"""Everything but the head."""
SAMPLE = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
COLOURS = {"scratch": ORANGE, "fine-tuning": BLUE, "linear probe": GREEN}
TITLES = {"fashion": "CIFAR-10 to Fashion-MNIST", "held_out": "7 classes to 3 others"}


@dataclass(frozen=True)
class Way:
    learning_rate: float
    transferred: bool = True
    freeze: str = ""
    rates: Mapping[str, float] = field(default_factory=dict)


WAYS = {
    "scratch": Way(1e-2, transferred=False),
    "fine-tuning": Way(1e-2, rates={BODY: 0.3}),
    "linear probe": Way(3e-2, freeze=BODY),
}


@dataclass(frozen=True)
class Task:
    """`source`: variables of the network `fields` of another head; labels count from 0."""

    name: str
    fields: Mapping[str, Any]
    source: Mapping[str, PyTree]
    train: Split
    test: Split

    @property
    def num_classes(self) -> int:
        return int(self.train.labels.max()) + 1


def fashion(weights: Path, data_dir: Path | None) -> Task:
    if not weights.is_file():
        raise InputError(
            f"{weights} is missing: give the file of the CIFAR-10 ResNet-20 by --weights, or --parts held_out, which"
            " trains its own source"
        )
    loaded = pretrained.load("cifar_resnet20", weights)
    data = sources.load("fashion_mnist", data_dir=data_dir)
    return Task("fashion", {}, loaded.variables, rgb32(data.train), first(rgb32(data.test)))


def held_out(data: Dataset, fields: Mapping[str, Any], *, epochs: float, output: Path) -> Task:
    """Trains the source on the other classes, or finds it in `output`."""
    (seen, train), (seen_test, test) = apart(rgb32(data.train)), apart(rgb32(data.test))
    classes = len(data.classes) - len(HELD_OUT)
    steps = round(epochs * len(seen) / 128)
    prepare = preprocess.fit("imagenet", seen.images)
    settings = Augmentation(crop_padding=4, flip=data.name == "cifar10")

    def augmented(batch: Batch, key: Array) -> Batch:
        batch = ready(prepare)(gather(batch))
        images, labels = augment(
            key, batch["image"], batch["label"], settings=settings, num_classes=classes, fill=jnp.zeros(3)
        )
        return {**batch, "image": images, "label": labels}

    schedule = make_schedule("cosine", learning_rate=0.1, steps=steps)
    result = fit(
        create("cifar_resnet20", num_classes=classes, **fields),
        (seen.images, seen.labels),
        test=(seen_test.images, seen_test.labels),
        optimizer=make_optimizer("sgd", schedule=schedule, momentum=0.9, weight_decay=5e-4),
        steps=steps,
        prepare=augmented,
        prepare_eval=ready(prepare),
        directory=output / "source",
    )
    print(f"source of held_out: {100 * result.test['accuracy']:.2f} % of {result.test['count']:,} test images")
    return Task("held_out", fields, jax.device_get(result.variables), train, first(test))


def rgb32(split: Split) -> Split:
    """Images (n, 32, 32, 3): smaller ones with a border of 0, grey ones in three equal channels."""
    border = (32 - split.images.shape[1]) // 2
    images = np.pad(split.images, ((0, 0), (border, border), (border, border), (0, 0)))
    return Split(np.repeat(images, 3 // images.shape[-1], axis=-1), split.labels)


def apart(split: Split) -> tuple[Split, Split]:
    """The classes that are not HELD_OUT and those that are, each with labels from 0."""
    held = np.isin(split.labels, HELD_OUT)

    def part(mask: np.ndarray) -> Split:
        images, labels = split.images[mask], split.labels[mask]
        return Split(images, np.searchsorted(np.unique(labels), labels).astype(np.int32))

    return part(~held), part(held)


def first(split: Split) -> Split:
    return split.take(np.arange(min(TEST_IMAGES, len(split))))


def few(split: Split, per_class: int, *, seed: int) -> Split:
    """So many images of each class, drawn by `seed`."""
    order = np.random.default_rng(seed).permutation(len(split))
    labels = split.labels[order]
    rows = [order[labels == label][:per_class] for label in np.unique(labels)]
    if min(map(len, rows)) < per_class:
        raise InputError(f"{per_class} images a class: one class has {min(map(len, rows))}")
    return split.take(np.concatenate(rows))


def ready(preprocessing: preprocess.Preprocessing) -> Callable[[Batch], Batch]:
    return lambda batch: {**batch, "image": preprocessing(preprocess.to_float(batch["image"]))}


class Bench:
    """The network of a task, with what all ways have in common compiled once."""

    def __init__(self, task: Task):
        self.task = task
        self.net = create("cifar_resnet20", num_classes=task.num_classes, **task.fields)
        self.mesh = parallel.make_mesh(jax.devices()[:1])
        self.prepare = ready(preprocess.fit("imagenet", task.train.images[:1]))
        self.init = jax.jit(lambda seed: self.net.init(rng.stream(seed, "init"), jnp.zeros(SAMPLE.shape), train=False))
        self.eval_step = make_eval_step(self.net, prepare=self.prepare)
        self.batches = eval_batches(task.test.images, task.test.labels, batch_size=500, mesh=self.mesh)

    def trainer(self, way: Way, *, steps: int) -> Callable[..., float]:
        """`accuracy(images_per_class, seed=...)` in per cent; compiled once, for every number of images and seed."""
        optimizer = make_optimizer(
            "adam",
            schedule=make_schedule("cosine", learning_rate=way.learning_rate, steps=steps),
            freeze=way.freeze,
            rates=way.rates,
        )
        module = Frozen(self.net, way.freeze) if way.freeze else self.net
        step = make_train_step(module, optimizer=optimizer, prepare=lambda batch, key: self.prepare(batch))
        start = create_state(
            module, optimizer=optimizer, sample=SAMPLE, mesh=self.mesh, variables=self.init(np.uint32(0))
        )

        def accuracy(images_per_class: int, *, seed: int) -> float:
            drawn = few(self.task.train, images_per_class, seed=seed)
            feed = train_feed(drawn.images, drawn.labels, batch_size=BATCH, seed=seed, mesh=self.mesh, resident=False)
            variables = self.init(np.uint32(seed))
            if way.transferred:
                variables = merge(variables, self.task.source, replace="params/fc")
            collections = {name: tree for name, tree in variables.items() if name != "params"}
            # A step takes its state's buffers for the next one's, so `start` is copied.
            state = jax.tree.map(
                jnp.array, dataclasses.replace(start, params=variables["params"], collections=collections)
            )
            with jax.set_mesh(self.mesh):
                for i in range(steps):
                    state, _ = step(state, feed(i), np.uint32(seed))
                return 100 * evaluate(self.eval_step, state.variables(), self.batches())["accuracy"]

        return accuracy


def measure(task: Task, *, sizes: Sequence[int], seeds: int, steps: int) -> list[dict[str, Any]]:
    """One row for each number of images and way."""
    if min(sizes) * task.num_classes < BATCH:
        raise InputError(f"--sizes {min(sizes)}: {task.num_classes} classes of it do not fill a batch of {BATCH}")
    bench = Bench(task)
    trainers = {name: bench.trainer(way, steps=steps) for name, way in WAYS.items()}
    rows = []
    for size in sizes:
        values: dict[str, list[float]] = {}
        for name, accuracy in trainers.items():
            begun = time.monotonic()
            values[name] = [accuracy(size, seed=seed) for seed in range(seeds)]
            row = {"part": task.name, "way": name, "images_per_class": size, "accuracy": values[name]}
            row |= {"mean": spread(values[name]).mean, "interval_95": spread(values[name]).half}
            rows.append(row)
            print(
                f"{task.name}, {size} images a class, {name}: {row['mean']:.2f} % +- {row['interval_95']:.2f} %"
                f" (n = {seeds}, {time.monotonic() - begun:.0f} s)",
                flush=True,
            )
        gains = np.subtract(values["fine-tuning"], values["scratch"]).tolist()
        gain = spread(gains)
        row = {"part": task.name, "way": "gain", "images_per_class": size, "accuracy": gains}
        rows.append(row | {"mean": gain.mean, "interval_95": gain.half})
        print(f"  fine-tuning over scratch: {gain:+.2f} points", flush=True)
    return rows


def draw(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Accuracy against images a class, a panel for each part."""
    from matplotlib.figure import Figure

    parts = list(dict.fromkeys(row["part"] for row in rows))
    figure = Figure(figsize=(4.8 * len(parts), 3.8), layout="constrained")
    for axes, part in zip(figure.subplots(1, len(parts), squeeze=False)[0], parts, strict=True):
        for way, colour in COLOURS.items():
            points = [row for row in rows if (row["part"], row["way"]) == (part, way)]
            sizes, means, halves = zip(
                *((row["images_per_class"], row["mean"], row["interval_95"]) for row in points), strict=True
            )
            axes.errorbar(sizes, means, yerr=halves, color=colour, marker="o", markersize=4, capsize=3, label=way)
        axes.set(xscale="log", xlabel="images a class", ylabel="test accuracy (%)", title=TITLES[part])
        axes.set_xticks(sizes, [str(size) for size in sizes])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    figure.legend(*figure.axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=len(COLOURS))
    figure.savefig(path, dpi=120)


def tasks(args: argparse.Namespace, output: Path) -> list[Callable[[], Task]]:
    """What makes each part. Files are read now, so that one that is missing is said before anything is trained."""
    if args.smoke:
        return [partial(held_out, sources.load("digits"), {"depth": 8, "width": 4}, epochs=1, output=output)]
    data_dir, made = args.data_dir or sources.default_data_dir(), {}
    if "held_out" in args.parts:
        data = sources.load("cifar10", data_dir=data_dir)
        made["held_out"] = partial(held_out, data, {}, epochs=args.epochs, output=output)
    if "fashion" in args.parts:
        ready_made = fashion(args.weights or data_dir / "weights" / "cifar10_resnet20-12fca82f.npz", data_dir)
        made["fashion"] = lambda: ready_made
    return [made[part] for part in args.parts]


def run(args: argparse.Namespace, output: Path) -> None:
    if args.seeds < 2 or args.steps < 1 or args.epochs <= 0:
        raise InputError("expected at least 2 --seeds, which an interval needs, 1 of --steps and some --epochs")
    rows: list[dict[str, Any]] = []
    for make in tasks(args, output):
        rows += measure(make(), sizes=args.sizes, seeds=args.seeds, steps=args.steps)
        output.mkdir(parents=True, exist_ok=True)
        write_json(output / "summary.json", {"steps": args.steps, "seeds": args.seeds, "rows": rows})
        draw(rows, output / "transfer.png")
    print(f"wrote {output}")


def main() -> None:
    parser = argparse.ArgumentParser(description="Fine-tuning, a linear probe and training from scratch on few images.")
    parser.add_argument("--data-dir", type=Path, help="where the data sets lie (default: JAXCNN_DATA)")
    parser.add_argument("--weights", type=Path, help="the CIFAR-10 ResNet-20 (default: DIR/weights/cifar10_resnet20-*)")
    parser.add_argument("--parts", nargs="+", choices=list(TITLES), default=list(TITLES))
    parser.add_argument("--sizes", nargs="+", type=int, default=[10, 50, 250], help="images a class")
    parser.add_argument("--seeds", type=int, default=5, help="draws of images and initialisations (default: 5)")
    parser.add_argument("--steps", type=int, default=100, help="of each training (default: 100)")
    parser.add_argument("--epochs", type=float, default=2, help="of the source of held_out (default: 2)")
    run_program(parser, run, smoke={"parts": ["held_out"], "sizes": [10, 20], "seeds": 2, "steps": 5})


if __name__ == "__main__":
    main()
