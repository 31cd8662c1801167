"""Classical filters, and what convolution is: a sparse matrix, commutative, any linear shift-invariant system (A12)."""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxcnn.errors import InputError
from jaxcnn.files import replacing
from jaxcnn.layers.conv import conv, convolve
from jaxcnn.types import Array, ArrayLike

if TYPE_CHECKING:
    from scipy.sparse import sparray

Kernel = NDArray[np.float32]
"""(h, w), weights of one channel."""


def box(rows: int, columns: int) -> Kernel:
    """The mean of so many pixels: (rows, columns), sum 1; one of both 1 for a filter in one dimension.

    Raises:
        InputError: sizes that are not positive.
    """
    if min(rows, columns) < 1:
        raise InputError(f"box filter of {rows} x {columns}: expected positive sizes")
    return np.full((rows, columns), 1 / (rows * columns), np.float32)


def gaussian(sigma: float, *, size: int | None = None) -> Kernel:
    """exp(-(x^2 + y^2) / 2 s^2) / (2 pi s^2) at whole x and y: (size, size), by default 2 ceil(3 s) + 1.

    It is not scaled to sum 1: the sum falls short by what lies outside.

    Raises:
        InputError: sigma that is not above 0, a size that is not positive and odd.
    """
    if not sigma > 0:
        raise InputError(f"sigma {sigma}: expected a number above 0, in pixels")
    size = 2 * int(np.ceil(3 * sigma)) + 1 if size is None else size
    if size < 1 or size % 2 == 0:
        raise InputError(f"size {size} of a Gaussian filter: expected an odd positive number, so that it has a centre")
    x = np.arange(size) - size // 2
    squares = x.reshape(-1, 1) ** 2 + x.reshape(1, -1) ** 2
    return (np.exp(-squares / (2 * sigma**2)) / (2 * np.pi * sigma**2)).astype(np.float32)


def sharpening(strength: float = 1.0) -> Kernel:
    """The image and `strength` times its difference to a 3x3 box: (3, 3), sum 1."""
    kernel = -strength * box(3, 3)
    kernel[1, 1] += 1 + strength
    return kernel


def vertical_edges() -> Kernel:
    """[-1 1]: the difference to the pixel on the right, high at vertical edges; its transpose finds horizontal ones."""
    return np.array([[-1, 1]], np.float32)


FILTERS: dict[str, Kernel] = {
    "box 9x9": box(9, 9),
    "box 1x15": box(1, 15),
    "box 15x1": box(15, 1),
    "Gaussian, s = 3": gaussian(3),
    "sharpening": sharpening(2),
    "[-1 1]": vertical_edges(),
    "[-1 1] transposed": vertical_edges().T,
}


def filtered(x: Array, kernel: ArrayLike) -> Array:
    """Every channel of x (b, h, w, c) correlated with `kernel` (kh, kw); the size remains.

    The border's pixels are continued outward, so that it does not darken; an even window has one more behind.

    Raises:
        InputError: x is no batch of images, or the kernel has no two axes.
    """
    if x.ndim != 4 or kernel.ndim != 2:
        raise InputError(f"expected images (b, h, w, c) and a kernel (h, w), got shapes {x.shape} and {kernel.shape}")
    before = [(k - 1) // 2 for k in kernel.shape]
    after = [k // 2 for k in kernel.shape]
    padded = jnp.pad(x, [(0, 0), *zip(before, after, strict=True), (0, 0)], mode="edge")
    channels = x.shape[-1]
    each = jnp.broadcast_to(jnp.asarray(kernel, x.dtype)[..., None, None], (*kernel.shape, 1, channels))
    return conv(padded, each, groups=channels)


def matrix(kernel: ArrayLike, *, size: tuple[int, int], padding: int = 0) -> "sparray":
    """The matrix M with M x.ravel() = conv(x, kernel, padding=padding).ravel() for one image x (h, w, c) of `size`.

    `kernel` is (kh, kw, c, features). M (h' w' features, h w c), in SciPy's sparse rows, is doubly block Toeplitz:
    every weight stands on one diagonal of blocks, once for each output whose tap is not on padding. Its transpose is
    the transposed convolution, the gradient by the image.

    Raises:
        InputError: a kernel without four axes, or larger than the padded image.
    """
    from scipy import sparse

    weights = np.asarray(kernel)
    if weights.ndim != 4 or padding < 0:
        raise InputError(f"kernel {weights.shape}, padding {padding}: expected (kh, kw, c, features) and at least 0")
    rows, columns = (n + 2 * padding - k + 1 for n, k in zip(size, weights.shape, strict=False))
    if min(rows, columns) < 1:
        raise InputError(f"kernel {weights.shape} is larger than the image {size} padded by {padding}")
    total: Any = 0
    for i, j in np.ndindex(*weights.shape[:2]):
        down = sparse.eye_array(rows, size[0], k=i - padding)
        right = sparse.eye_array(columns, size[1], k=j - padding)
        total = total + sparse.kron(sparse.kron(down, right), weights[i, j].T)
    return sparse.csr_array(total)


def full_convolution(a: ArrayLike, b: ArrayLike) -> Array:
    """sum_t a[t] b[o - t] of two images or kernels (h, w): (h + h' - 1, w + w' - 1), the same for (b, a)."""
    return _full(convolve, a, b)


def full_correlation(a: ArrayLike, b: ArrayLike) -> Array:
    """sum_t a[o + t] b[t] of two images or kernels (h, w), as `full_convolution`; (b, a) gives it rotated by 180
    degrees."""
    return _full(conv, a, b)


def impulse_response(system: Callable[[Array], Array], *, size: tuple[int, int]) -> Array:
    """What a system (1, h, w, 1) -> (1, h, w, 1) makes of a single 1 in the middle, at (h // 2, w // 2): (h, w).

    A linear system that commutes with shifts is convolution with it, wherever the image's border is out of reach.

    Raises:
        InputError: the system changes the size.
    """
    impulse = jnp.zeros((1, *size, 1)).at[0, size[0] // 2, size[1] // 2, 0].set(1)
    response = system(impulse)
    if response.shape != impulse.shape:
        raise InputError(f"the system makes {response.shape} of {impulse.shape}: expected the same size, so pad")
    return response[0, ..., 0]


def respond(response: ArrayLike, x: Array) -> Array:
    """x (b, h, w, 1) convolved with an impulse response (kh, kw) whose middle is (kh // 2, kw // 2): (b, h, w, 1).

    Outside the image there are zeros.
    """
    kernel = jnp.asarray(response, x.dtype)[..., None, None]
    return convolve(x, kernel, padding=[(k - 1 - k // 2, k // 2) for k in response.shape])


def gallery(image: ArrayLike, path: Path, *, title: str = "Classical filters") -> None:
    """`FILTERS` on a grey image (h, w) in 0..1, as a PNG; differences are shown around 0.

    Raises:
        InputError: an image that has not two axes.
    """
    from matplotlib.figure import Figure

    if image.ndim != 2:
        raise InputError(f"expected a grey image (h, w) in 0..1, got shape {image.shape}")
    x = jnp.asarray(image, jnp.float32)[None, ..., None]
    figure = Figure(figsize=(17, 6), layout="constrained")
    figure.suptitle(title)
    shown = {"original": np.ones((1, 1), np.float32), **FILTERS}
    for panel, (name, kernel) in zip(figure.subplots(2, 4).ravel(), shown.items(), strict=True):
        panel.set_axis_off()
        difference = abs(float(kernel.sum())) < 0.5
        limits = {"cmap": "PuOr", "vmin": -0.3, "vmax": 0.3} if difference else {"cmap": "gray", "vmin": 0, "vmax": 1}
        picture = panel.imshow(np.asarray(filtered(x, kernel))[0, ..., 0], **limits)
        panel.set_title(name, fontsize=11)
        label, beyond = ("difference", "both") if difference else ("brightness", "neither")
        figure.colorbar(picture, ax=panel, label=label, extend=beyond, shrink=0.65)
    with replacing(path) as file:
        figure.savefig(file, format="png", dpi=100)


def _full(operation: Callable[..., Array], a: ArrayLike, b: ArrayLike) -> Array:
    """Over an image padded so that every overlap counts."""
    if a.ndim != 2 or b.ndim != 2:
        raise InputError(f"expected two arrays (h, w), got shapes {a.shape} and {b.shape}")
    a, b = jnp.asarray(a), jnp.asarray(b)
    pads = tuple((k - 1, k - 1) for k in b.shape)
    return operation(a[None, ..., None], b[..., None, None], padding=pads)[0, ..., 0]
