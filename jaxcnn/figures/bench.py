"""Where figures are measured: data sets by name, and a configuration trained over seeds."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np

from jaxcnn import build, config
from jaxcnn.config import Experiment
from jaxcnn.data import preprocess
from jaxcnn.data.dataset import Split
from jaxcnn.metrics import CLASSIFICATION
from jaxcnn.seeds import SeedsResult, fit_seeds
from jaxcnn.types import PyTree

EVALUATED = {"accuracy": CLASSIFICATION["accuracy"]}


def last_loss(found: SeedsResult) -> float:
    """The training loss at the end of the run, in nats, of the first seed."""
    return float(found.curve("loss")[1][-1, 0])


class Bench:
    """Data and training for one figure. `digests` collects the SHA-256 of the files that were read."""

    def __init__(self, *, data_dir: Path | None, smoke: bool):
        self.digests: dict[str, str] = {}
        self._data_dir, self._smoke = data_dir, smoke
        self._read: dict[str, build.Splits] = {}

    def splits(self, experiment: Experiment, *, train: int | None = None, test: int | None = None) -> build.Splits:
        """The experiment's data, or so many examples of its splits, always the same ones.

        With --smoke a few examples, and the embedded digits where the data set is not there.
        """
        key = repr((experiment.data, experiment.model.name))
        if key not in self._read:
            self._read[key] = build.splits(experiment, data_dir=self._data_dir, smoke=self._smoke)
        found = self._read[key]
        self.digests.update(found.digests)
        return dataclasses.replace(found, train=_some(found.train, train), test=_some(found.test, test))

    def prepared(self, experiment: Experiment) -> build.Splits:
        """The data of `splits` with float32 images, as a network sees them in evaluation."""
        data = self.splits(experiment)
        fitted = preprocess.fit(experiment.data.preprocessing, data.train.images)

        def ready(split: Split) -> Split:
            return dataclasses.replace(split, images=np.asarray(fitted(preprocess.to_float(split.images))))

        return dataclasses.replace(data, train=ready(data.train), test=ready(data.test))

    def train(
        self,
        experiment: Experiment,
        *,
        seeds: Sequence[int],
        module: nn.Module | None = None,
        train: int | None = None,
        test: int | None = None,
        **options: Any,
    ) -> SeedsResult:
        """What `jaxcnn train` does with the experiment, for each of `seeds`, and without files.

        `module` stands for the experiment's model; `train` and `test` are numbers of examples; `options` are further
        arguments of `fit_seeds`.
        """
        experiment = config.validate(experiment)
        data = self.splits(experiment, train=train, test=test)
        made = build.parts(experiment, data, devices=1, net=module)
        fitted = preprocess.fit(experiment.data.preprocessing, data.train.images)
        known = {**build.seeds_options(experiment, made, fitted, data), "metrics": EVALUATED}
        arrays = (data.train.images, data.train.labels)
        return fit_seeds(made.net, arrays, test=(data.test.images, data.test.labels), seeds=seeds, **(known | options))

    def best_rate(
        self,
        train: Callable[[float, Sequence[int]], SeedsResult],
        rates: Sequence[float],
        *,
        seed: int,
        score: Callable[[SeedsResult], float] = last_loss,
    ) -> tuple[float, list[float]]:
        """The learning rate of the least `score` in a trial with `seed`, and every rate's: the last training loss, say.

        `train(rate, seeds)` trains; every way that a figure compares gets its rate by the same rule, and a seed that
        the comparison has not. A score that is not finite never wins; one rate needs no trial.
        """
        if len(rates) == 1:
            return rates[0], []
        scores = [score(train(rate, [seed])) for rate in rates]
        return rates[int(np.argmin(np.nan_to_num(scores, nan=np.inf)))], scores


def accuracy_on(net: nn.Module, variables: PyTree, split: Split) -> float:
    """The share of right answers on a split of `Bench.prepared`."""
    logits = jax.jit(lambda x: net.apply(variables, x, train=False))(split.images)
    return float((np.argmax(logits, -1) == split.labels).mean())


def _some(split: Split, n: int | None) -> Split:
    if n is None or n >= len(split):
        return split
    return split.take(np.sort(np.random.default_rng(0).permutation(len(split))[:n]))
