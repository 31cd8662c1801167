"""Dense layers against convolutions in numbers, and both against `summary` and the matrix of the convolution."""

import flax.linen as nn
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxcnn.analysis import summary
from jaxcnn.analysis.arithmetic import convolution, dense
from jaxcnn.analysis.filters import matrix, vertical_edges
from jaxcnn.errors import InputError
from jaxcnn.layers import Conv, output_size


def test_vertical_edges_of_an_image():
    h = w = 224
    fully = dense((h, w), (h, w - 1))
    assert fully.weights == fully.macs == h * w * h * (w - 1) == 2_506_391_552
    assert fully.weights > 2.5e9
    assert fully.flops > 5e9
    shared = convolution((h, w, 1), kernel_size=(1, 2))
    assert (shared.output, shared.weights) == ((224, 223, 1), 2)
    assert shared.operations == 3 * h * (w - 1) == 149_856


def test_both_compute_the_same():
    h, w = 6, 5
    found = matrix(vertical_edges()[..., None, None], size=(h, w))
    assert found.shape[0] * found.shape[1] == dense((h, w), (h, w - 1)).weights
    assert found.nnz == convolution((h, w, 1), kernel_size=(1, 2)).macs
    assert np.unique(found.data).tolist() == [-1, 1]


@pytest.mark.parametrize(
    ("input", "output", "weights"),
    [
        ((32, 32, 3), (1,), 3_072),  # a unit on CIFAR-10
        ((1024, 1024, 3), (1,), 3_145_728),
        ((1000, 1000), (1000,), 1_000_000_000),
    ],
)
def test_weights_of_dense_units(input, output, weights):
    assert dense(input, output).weights == weights
    assert dense(input, output, use_bias=True).parameters == weights + np.prod(output)


def test_weights_of_a_filter():
    assert convolution((32, 32, 3), kernel_size=5).weights == 75
    assert convolution((32, 32, 3), kernel_size=5, use_bias=True).parameters == 76


def test_worked_example():
    found = convolution((32, 32, 8), kernel_size=5, features=16, padding=2, use_bias=True)
    assert (found.parameters, found.outputs, found.activation_bytes()) == (3_216, 16_384, 64 * 1024)
    assert (found.flops, found.macs) == (6_553_600, 3_276_800)
    result = summary(Conv(16, (5, 5), padding=2), input=(32, 32, 8))
    assert (result.parameters, result.flops, result.macs) == (found.parameters, found.flops, found.macs)
    assert (result.layers[0].output, result.activation_bytes) == (found.output, found.activation_bytes())


@pytest.mark.parametrize(
    ("options", "output"), [({"padding": 0}, (4, 7)), ({"padding": 1}, (6, 9)), ({"padding": 1, "strides": 2}, (3, 5))]
)
def test_sizes(options, output):
    assert convolution((6, 9, 1), kernel_size=3, **options).output == (*output, 1)
    stride = options.get("strides", 1)
    assert tuple(output_size(n, kernel=3, padding=options["padding"], stride=stride) for n in (6, 9)) == output


@settings(deadline=None, max_examples=10)
@given(
    st.tuples(st.integers(6, 12), st.integers(6, 12)),
    st.sampled_from([(4, 6, 1), (4, 6, 2), (4, 4, 4)]),
    st.integers(1, 3), st.integers(1, 3), st.integers(0, 2), st.integers(1, 2), st.booleans(),
)  # fmt: skip
def test_convolutions_are_those_of_the_summary(size, channels, k, stride, padding, dilation, bias):
    c, features, groups = channels
    options = {"strides": stride, "padding": padding, "dilation": dilation, "groups": groups, "use_bias": bias}
    found = convolution((*size, c), kernel_size=k, features=features, **options)
    result = summary(Conv(features, k, **options), input=(*size, c))
    assert (result.layers[0].output, result.parameters) == (found.output, found.parameters)
    assert (result.macs, result.flops) == (found.macs, found.flops)


def test_dense_layers_are_those_of_the_summary():
    result, found = summary(nn.Dense(7), input=(5,)), dense((5,), (7,), use_bias=True)
    assert (result.parameters, result.macs, result.flops) == (found.parameters, found.macs, found.flops)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: dense((3, 0), (1,)), r"shape \(3, 0\)"),
        (lambda: dense((3,), ()), r"shape \(\)"),
        (lambda: convolution((5, 5, 3), kernel_size=3, groups=2), "3 channels"),
        (lambda: convolution((5, 5, 3), kernel_size=7), "larger image"),
        (lambda: convolution((5, 5, 3), kernel_size=(3, 3, 3)), "kernel_size"),
    ],
)
def test_bad_input(call, message):
    with pytest.raises(InputError, match=message):
        call()
