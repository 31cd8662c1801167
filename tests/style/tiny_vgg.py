"""VGGs of random weights so narrow that they compile at once."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxcnn.models import create
from jaxcnn.style.network import Network

SHALLOW = (1, 1, 1, 1, 1)
VGG19 = (2, 2, 4, 4, 4)


def parameters(convs=SHALLOW, *, width=2, seed=0) -> dict[str, Any]:
    """Float32 arrays that keep activations of order 1."""
    rng, channels, layers = np.random.default_rng(seed), 3, {}
    for stage, count in enumerate(convs, 1):
        for j in range(1, count + 1):
            features = width * min(2 ** (stage - 1), 8)
            kernel = rng.normal(0, (2 / (9 * channels)) ** 0.5, (3, 3, channels, features))
            bias = rng.normal(0, 0.2, features)
            layers[f"conv{stage}_{j}"] = {"kernel": np.float32(kernel), "bias": np.float32(bias)}
            channels = features
    return layers


def tiny(convs=SHALLOW, *, width=2, pooling="max", padding_mode="zeros", seed=0, dtype=np.float32) -> Network:
    """One that takes RGB in -2..2."""
    module = create(
        "vgg19", convs=convs, width=width, hidden=1, num_classes=1, pooling=pooling, padding_mode=padding_mode
    )
    layers = []
    for stage, count in enumerate(convs, 1):
        layers += [f"{kind}{stage}_{j}" for j in range(1, count + 1) for kind in ("conv", "relu")] + [f"pool{stage}"]
    params = {
        layer: {name: jnp.asarray(leaf, dtype) for name, leaf in leaves.items()}
        for layer, leaves in parameters(convs, width=width, seed=seed).items()
    }
    matrix, bias = jnp.eye(3, dtype=dtype) * 4, jnp.full(3, -2, dtype)
    return Network({"params": params}, matrix, bias, module, tuple(layers), "a tiny VGG")
