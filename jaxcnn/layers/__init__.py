"""What networks are made of: convolutions, initialisers, activations, pooling, normalisation, dropout, blocks."""

from jaxcnn.layers.act import ACTIVATIONS, Activation, activation, maxout, scaled_tanh
from jaxcnn.layers.adaptive import adaptive_avg_pool, adaptive_max_pool
from jaxcnn.layers.axis import data_axis_bound, global_index
from jaxcnn.layers.blocks import BasicBlock, Stage, pad_shortcut
from jaxcnn.layers.conv import Conv, conv, convolve
from jaxcnn.layers.dropout import AlphaDropout, Dropout, StochasticDepth, UniformDropout
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
from jaxcnn.layers.pool import (
    PooledWithIndices,
    avg_pool,
    global_avg_pool,
    l2_pool,
    max_pool,
    max_pool_with_indices,
    weighted_avg_pool,
)
from jaxcnn.layers.upsample import ConvTranspose, conv_transpose, max_unpool, upsample_bilinear, upsample_nearest
from jaxcnn.layers.window import Padding, as_written, output_size

__all__ = [
    "ACTIVATIONS",
    "INITIALIZERS",
    "NORMS",
    "Activation",
    "AlphaDropout",
    "BasicBlock",
    "BatchNorm",
    "Conv",
    "ConvTranspose",
    "Dropout",
    "Fans",
    "GroupNorm",
    "Identity",
    "InstanceNorm",
    "Lambda",
    "LayerNorm",
    "Norm",
    "Padding",
    "PooledWithIndices",
    "Stage",
    "StochasticDepth",
    "UniformDropout",
    "activation",
    "adaptive_avg_pool",
    "adaptive_max_pool",
    "as_written",
    "avg_pool",
    "conv",
    "conv_transpose",
    "convolve",
    "data_axis_bound",
    "fans",
    "global_avg_pool",
    "global_index",
    "initializer",
    "l2_pool",
    "located",
    "max_pool",
    "max_pool_with_indices",
    "max_unpool",
    "maxout",
    "norm",
    "output_size",
    "pad_shortcut",
    "scaled_tanh",
    "upsample_bilinear",
    "upsample_nearest",
    "weighted_avg_pool",
]
