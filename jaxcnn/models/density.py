"""Networks that predict a density of the target, p(y | x), by its parameters.

Nix and Weigend 1994, "Estimating the Mean and Variance of the Target Probability Distribution": one Gaussian, whose
variance depends on the input. Bishop 1994, "Mixture Density Networks": several, where one input has several answers.
Train them by `losses.gaussian_nll` and `losses.mixture_nll`.

Standard deviations are softplus(a) + floor of a network output a. The papers take exp(a), which overflows where
softplus grows linearly; the floor bounds the likelihood, which is infinite for a Gaussian shrunk onto one target.
"""

from typing import Any, NamedTuple

import flax.linen as nn

from jaxcnn.errors import InputError
from jaxcnn.layers.act import activation
from jaxcnn.layers.init import initializer
from jaxcnn.layers.named import Lambda
from jaxcnn.models.table import Entry
from jaxcnn.types import Array


class GaussianParameters(NamedTuple):
    """Independent normals: `mean` (b, d) and standard deviation `scale` (b, d), positive, in units of the target."""

    mean: Array
    scale: Array


class MixtureParameters(NamedTuple):
    """k spherical normals in d dimensions: `logits` (b, k) of the weights, `means` (b, k, d), `scales` (b, k)."""

    logits: Array
    means: Array
    scales: Array


class Density(nn.Module):
    """What density networks share: `depth` hidden layers of `width` units on the flattened input.

    `outputs` is d, the dimension of the target; `floor` the smallest standard deviation, in units of the target.
    """

    outputs: int = 1
    depth: int = 1
    width: int = 20
    act: str = "tanh"
    kernel_init: str = "lecun_normal"
    floor: float = 1e-3
    dtype: Any = None

    def __post_init__(self):
        if self.outputs < 1:
            raise InputError(f"{self.outputs} outputs: a density is over at least 1 dimension of the target")
        if not self.floor > 0:
            raise InputError(f"floor {self.floor}: expected a positive number, the smallest standard deviation")
        super().__post_init__()

    def _trunk(self, x: Array) -> Array:
        if x.ndim < 2 or 0 in x.shape[1:]:
            raise InputError(f"expected vectors (b, d) or images (b, h, w, c), got shape {x.shape}")
        x = x.reshape(x.shape[0], -1)
        for i in range(1, self.depth + 1):
            x = self._dense(self.width, f"dense{i}")(x)
            x = Lambda(activation(self.act), name=f"act{i}")(x)
        return x

    def _dense(self, features: int, name: str) -> nn.Dense:
        return nn.Dense(features, kernel_init=initializer(self.kernel_init), dtype=self.dtype, name=name)

    def _positive(self, x: Array) -> Array:
        return nn.softplus(x) + self.floor


class GaussianDensity(Density):
    """(b, ...) -> `GaussianParameters` over the target (b, outputs)."""

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> GaussianParameters:
        del train
        x = self._trunk(x)
        mean = self._dense(self.outputs, "mean")(x)
        return GaussianParameters(mean, self._positive(self._dense(self.outputs, "scale")(x)))


class MixtureDensity(Density):
    """(b, ...) -> `MixtureParameters` of `components` Gaussians over the target (b, outputs).

    Spherical as in the paper, equation 23: each component has one standard deviation, so that a network has
    (outputs + 2) components numbers at its end.
    """

    components: int = 3

    def __post_init__(self):
        if self.components < 1:
            raise InputError(f"{self.components} components: a mixture needs at least 1")
        super().__post_init__()

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> MixtureParameters:
        del train
        x = self._trunk(x)
        logits = self._dense(self.components, "logits")(x)
        means = self._dense(self.components * self.outputs, "means")(x)
        scales = self._positive(self._dense(self.components, "scales")(x))
        return MixtureParameters(logits, means.reshape(-1, self.components, self.outputs), scales)


VARIANTS = {
    "gaussian_density": Entry(GaussianDensity, (1,), "Nix & Weigend 1994"),
    "mixture_density": Entry(MixtureDensity, (1,), "Bishop 1994"),
}
