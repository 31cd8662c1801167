"""What networks are made of: convolutions, initialisers, activations, pooling, normalisation, dropout, blocks."""

from jaxcnn.layers.act import ACTIVATIONS, Activation, activation, maxout, scaled_tanh
from jaxcnn.layers.axis import data_axis_bound, global_index
from jaxcnn.layers.blocks import BasicBlock, Stage, pad_shortcut
from jaxcnn.layers.conv import Conv, conv
from jaxcnn.layers.dropout import Dropout
from jaxcnn.layers.init import INITIALIZERS, Fans, fans, initializer
from jaxcnn.layers.named import Lambda, located
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
from jaxcnn.layers.pool import avg_pool, global_avg_pool, max_pool
from jaxcnn.layers.window import Padding, as_written, output_size

__all__ = [
    "ACTIVATIONS",
    "INITIALIZERS",
    "NORMS",
    "Activation",
    "BasicBlock",
    "BatchNorm",
    "Conv",
    "Dropout",
    "Fans",
    "GroupNorm",
    "Identity",
    "InstanceNorm",
    "Lambda",
    "LayerNorm",
    "Norm",
    "Padding",
    "Stage",
    "activation",
    "as_written",
    "avg_pool",
    "conv",
    "data_axis_bound",
    "fans",
    "global_avg_pool",
    "global_index",
    "initializer",
    "located",
    "max_pool",
    "maxout",
    "norm",
    "output_size",
    "pad_shortcut",
    "scaled_tanh",
]
