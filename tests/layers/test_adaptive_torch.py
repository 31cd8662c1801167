"""Adaptive pooling against PyTorch."""

from functools import partial

import jax
import numpy as np
import pytest

from jaxcnn.layers.adaptive import adaptive_avg_pool, adaptive_max_pool

torch = pytest.importorskip("torch")


def pooled(function, x, size):
    return jax.jit(partial(function, size=size))(x)


@pytest.mark.parametrize("spatial", [(1, 1), (7, 7), (14, 21), (8, 6), (13, 2)])
@pytest.mark.parametrize("size", [7, (6, 3)])
def test_two_dimensions(spatial, size):
    x = np.random.default_rng(0).standard_normal((2, *spatial, 3)).astype(np.float32)
    theirs = torch.from_numpy(x).permute(0, 3, 1, 2)
    for ours, function in (
        (adaptive_avg_pool, torch.nn.functional.adaptive_avg_pool2d),
        (adaptive_max_pool, torch.nn.functional.adaptive_max_pool2d),
    ):
        expected = function(theirs, size).permute(0, 2, 3, 1).numpy()
        np.testing.assert_allclose(pooled(ours, x, size), expected, atol=1e-6)


def test_one_and_three_dimensions():
    x = np.random.default_rng(0).standard_normal((2, 5, 6, 4, 3)).astype(np.float32)
    expected = torch.nn.functional.adaptive_avg_pool3d(torch.from_numpy(x).permute(0, 4, 1, 2, 3), 3)
    np.testing.assert_allclose(pooled(adaptive_avg_pool, x, 3), expected.permute(0, 2, 3, 4, 1).numpy(), atol=1e-6)
    x = x[:, :, 0, 0]
    expected = torch.nn.functional.adaptive_avg_pool1d(torch.from_numpy(x).permute(0, 2, 1), 3)
    np.testing.assert_allclose(pooled(adaptive_avg_pool, x, 3), expected.permute(0, 2, 1).numpy(), atol=1e-6)
