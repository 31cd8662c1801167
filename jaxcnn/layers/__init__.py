"""What networks are made of: initialisers, activations, pooling, normalisation, dropout."""

from jaxcnn.layers.act import ACTIVATIONS, Activation, activation, maxout, scaled_tanh
from jaxcnn.layers.axis import data_axis_bound, global_index
from jaxcnn.layers.dropout import Dropout
from jaxcnn.layers.init import INITIALIZERS, Fans, fans, initializer
from jaxcnn.layers.norm import (
    NORMS,
    BatchNorm,
    GroupNorm,
    Identity,
    InstanceNorm,
    LayerNorm,
    Norm,
    norm,
)
from jaxcnn.layers.pool import Padding, avg_pool, global_avg_pool, max_pool

__all__ = [
    "ACTIVATIONS",
    "INITIALIZERS",
    "NORMS",
    "Activation",
    "BatchNorm",
    "Dropout",
    "Fans",
    "GroupNorm",
    "Identity",
    "InstanceNorm",
    "LayerNorm",
    "Norm",
    "Padding",
    "activation",
    "avg_pool",
    "data_axis_bound",
    "fans",
    "global_avg_pool",
    "global_index",
    "initializer",
    "max_pool",
    "maxout",
    "norm",
    "scaled_tanh",
]
