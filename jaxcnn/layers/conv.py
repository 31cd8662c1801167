"""Placeholder until the fast convolution lands."""
from typing import Any, Sequence
import flax.linen as nn
import jax, jax.numpy as jnp

def _pads(p, n):
    return [(p, p)] * n if isinstance(p, int) else p

def conv(x, kernel, *, strides=1, padding=0, dilation=1, groups=1):
    n = kernel.ndim - 2
    return jax.lax.conv_general_dilated(x, kernel, (strides,) * n, _pads(padding, n), dimension_numbers=("NHWC", "HWIO", "NHWC"), feature_group_count=groups)

class Conv(nn.Module):
    features: int
    kernel_size: Sequence[int]
    strides: int = 1
    padding: Any = "SAME"
    use_bias: bool = True
    kernel_init: Any = nn.initializers.he_normal()
    dtype: Any = None
    @nn.compact
    def __call__(self, x):
        k = self.param("kernel", self.kernel_init, (*self.kernel_size, x.shape[-1], self.features))
        dt = self.dtype or x.dtype
        y = conv(x.astype(dt), k.astype(dt), strides=self.strides, padding=self.padding)
        if self.use_bias:
            y = y + self.param("bias", nn.initializers.zeros, (self.features,)).astype(dt).reshape(1, 1, 1, -1)
        return y
