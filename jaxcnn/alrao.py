"""All Learning Rates At Once: Blier, Wolinski & Ollivier 2018, "Learning with Random Learning Rates" (1810.01322).

Units learn at rates of every size, so that none has to be chosen. What learns too fast must not spoil the rest: the
paper asks for a norm or a saturating activation. The output layer stands there several times, and is averaged:

    class Net(nn.Module):
        @nn.compact
        def __call__(self, x, *, train):
            x = nn.tanh(nn.Dense(100)(x.reshape(x.shape[0], -1)))
            return AveragedClassifiers(10)(x, train=train)

    fit(Net(), data, optimizer=alrao(), loss_fn=averaged_cross_entropy, ...)
"""

import math
import zlib
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcnn.errors import InputError
from jaxcnn.losses import cross_entropy
from jaxcnn.types import Array, Batch, PyTree

COPIES = ("copies_kernel", "copies_bias")
WEIGHTS = "copies_log_weights"
"""The parameters of `AveragedClassifiers`, which `alrao` knows by these names."""


def alrao(
    learning_rate: optax.ScalarOrSchedule = 1.0, *, low: float = 1e-5, high: float = 10.0, seed: int = 0
) -> optax.GradientTransformation:
    """SGD in which every unit has a rate of its own, drawn once, log-uniformly from `low` to `high`.

    `learning_rate`, or a schedule, multiplies all of them. A unit is an index of a parameter's last axis: a filter, or
    a column of a dense kernel, and its bias. Parameters of one module share its units' rates, which follow from `seed`
    and the module's path alone; a norm is a module of its own. The defaults are the paper's range for CIFAR-10.

    Copies of the output layer (`AveragedClassifiers`) have rates evenly spread in logarithm from `low` to `high`, and
    weights that follow Bayes' rule, whatever the rates. An output layer that is not copied is treated like any other,
    so that some classes learn faster than others: not so in the paper.

    Raises:
      InputError: unless 0 < low <= high < infinity and 0 <= seed; an update of copies without the parameters.
    """
    if not (_positive(low) and _positive(high) and low <= high):
        raise InputError(f"low {low!r} and high {high!r}: expected two finite learning rates, 0 < low <= high")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise InputError(f"seed is {seed!r}: expected a whole number of at least 0")

    def init(params: PyTree) -> optax.ScaleByScheduleState:
        return optax.ScaleByScheduleState(count=jnp.zeros([], jnp.int32))

    def update(updates: PyTree, state: Any, params: PyTree | None = None) -> tuple[PyTree, Any]:
        factor = learning_rate(state.count) if callable(learning_rate) else learning_rate

        def move(path: Any, gradient: Array, parameter: Array | None) -> Array:
            module, _, name = jax.tree_util.keystr(path, simple=True, separator="/").rpartition("/")
            if name == WEIGHTS:
                if parameter is None:
                    raise InputError(f"{WEIGHTS} follow Bayes' rule: give `update` the parameters too")
                return _switched(parameter, gradient, state.count) - parameter
            at = _evenly(gradient.shape) if name in COPIES else _drawn(seed, module, gradient.shape)
            rates = jnp.asarray(low * (high / low) ** at, gradient.real.dtype)
            return -rates * jnp.asarray(factor, rates.dtype) * gradient

        known = jax.tree.map(lambda _: None, updates) if params is None else params
        moved = jax.tree_util.tree_map_with_path(move, updates, known)
        return moved, optax.ScaleByScheduleState(count=optax.safe_increment(state.count))

    return optax.GradientTransformation(init, update)


def _positive(rate: Any) -> bool:
    return isinstance(rate, int | float) and not isinstance(rate, bool) and 0 < rate < math.inf


def _drawn(seed: int, module: str, shape: tuple[int, ...]) -> np.ndarray:
    """A number of [0, 1) for every index of the last axis, of a module's units: (1, ..., 1, units)."""
    units = shape[-1:]
    values = np.random.default_rng([seed, zlib.crc32(module.encode())]).random(units)
    return values.reshape((1,) * (len(shape) - 1) + units)


def _evenly(shape: tuple[int, ...]) -> np.ndarray:
    """0 to 1 over the copies, which are the first axis: (copies, 1, ..., 1)."""
    return np.linspace(0, 1, shape[0]).reshape(shape[:1] + (1,) * (len(shape) - 1))


def _switched(log_weights: Array, losses: Array, count: Array) -> Array:
    """The weights after the copies' mean losses over one batch, (n,) each: Bayes' rule, then the switch.

    At step t = 1, 2, ... a share 1 / (t + 1) of the weights is given to all copies alike, so that a copy which was
    behind can come to the front (van Erven, Grunwald & de Rooij 2008, "Catching up faster", algorithm 1). The share of
    those that never switch, 1e-4 in the authors' code, is 0 here.
    """
    posterior = jax.nn.log_softmax(log_weights - losses)
    share = 1 / (count + 2)
    return jnp.logaddexp(posterior + jnp.log1p(-share), jnp.log(share / losses.size))


class AveragedOutputs(NamedTuple):
    """What `AveragedClassifiers` gives in training, for `averaged_cross_entropy`."""

    logits: Array
    """(b, num_classes), as in evaluation; the copies' parameters get no gradient through them."""
    copies: Array
    """(b, n, num_classes), every copy's logits; the features get no gradient through them."""
    log_weights: Array
    """(n,)"""


class AveragedClassifiers(nn.Module):
    """`copies` dense output layers, averaged: features (b, d) -> logits (b, num_classes), in training with the copies'.

    logits = log sum_j a_j softmax(W_j x + b_j), with weights a that start equal. In training each copy learns as if it
    were alone and the features by the average, as in section 2 of the paper, with `averaged_cross_entropy` and
    `alrao`, which moves a by Bayes' rule. Raises InputError for other features and for fewer than 2 copies.
    """

    num_classes: int
    copies: int = 10
    kernel_init: nn.initializers.Initializer = nn.initializers.lecun_normal(in_axis=1, out_axis=2, batch_axis=0)

    @nn.compact
    def __call__(self, x: Array, *, train: bool) -> Array | AveragedOutputs:
        if x.ndim != 2 or self.copies < 2:
            raise InputError(f"{self.copies} copies on features {x.shape}: expected at least 2, and features (b, d)")
        n, k = self.copies, self.num_classes
        kernel = self.param(COPIES[0], self.kernel_init, (n, x.shape[1], k))
        bias = self.param(COPIES[1], nn.initializers.zeros, (n, k))
        log_weights = self.param(WEIGHTS, nn.initializers.constant(-math.log(n)), (n,))

        def each(x: Array, kernel: Array, bias: Array) -> Array:
            return jnp.einsum("bd,ndk->bnk", x, kernel.astype(x.dtype)) + bias.astype(x.dtype)[None]

        still = jax.lax.stop_gradient
        log_p = jax.nn.log_softmax(each(x, still(kernel), still(bias)).astype(log_weights.dtype))
        logits = jax.nn.logsumexp(log_p + still(log_weights)[None, :, None], axis=1)
        return AveragedOutputs(logits, each(still(x), kernel, bias), log_weights) if train else logits


def averaged_cross_entropy(outputs: Array | AveragedOutputs, batch: Batch) -> Array:
    """The average's cross-entropy (b,) in nats; in training with the gradients of the paper's three updates.

    Those of the features are the average's, those of each copy its own loss's, and those of `log_weights` are the
    copies' losses, which is what Bayes' rule takes. Of logits it is `losses.cross_entropy` with `batch["label"]`.
    """
    if not isinstance(outputs, AveragedOutputs):
        return cross_entropy(outputs, batch["label"])
    own = jax.vmap(lambda logits: cross_entropy(logits, batch["label"]), in_axes=1, out_axes=1)(outputs.copies)
    taught = own.sum(1) + jax.lax.stop_gradient(own) @ outputs.log_weights
    return cross_entropy(outputs.logits, batch["label"]) + (taught - jax.lax.stop_gradient(taught))
