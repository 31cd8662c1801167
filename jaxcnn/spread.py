"""A figure over several seeds: mean, standard deviation and confidence interval."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from jaxcnn.errors import InputError


class Spread(NamedTuple):
    """`std` divides by n - 1; `half`: half of the mean's 95 % interval by Student's t. Both are NaN where n is 1."""

    n: int
    mean: float
    std: float
    half: float

    @property
    def interval(self) -> tuple[float, float]:
        return self.mean - self.half, self.mean + self.half

    def __format__(self, spec: str) -> str:
        """The mean and `half`, each by `spec`: "82.41 +- 0.63" by ".2f"; where n is 1, the mean alone."""
        return f"{self.mean:{spec}}" + (f" +- {self.half:{spec.removeprefix('+')}}" if self.n > 1 else "")


def spread(values: Sequence[float]) -> Spread:
    """Of independent runs, one value each; `InputError` without any."""
    from scipy.stats import t as student

    n = len(values)
    if n == 0:
        raise InputError("a mean over no values: give at least one, and two for an interval")
    values = [float(value) for value in values]
    if n == 1:
        return Spread(1, values[0], float("nan"), float("nan"))
    std = statistics.stdev(values)
    return Spread(n, statistics.fmean(values), std, float(student.ppf(0.975, n - 1)) * std / n**0.5)
