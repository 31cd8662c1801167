"""What published weights expect of an image: its size and crop, and the arithmetic on its pixels."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np
from numpy.typing import NDArray

from jaxcnn.data.images import read_image
from jaxcnn.data.preprocess import Preprocessing
from jaxcnn.errors import InputError, unknown
from jaxcnn.types import Array, ArrayLike

Channels = tuple[float, ...]


@dataclass(frozen=True)
class Pixels:
    """The preprocessing of a network: (`scale` x - `mean`) / `std` of its own channels, x in 0..1.

    `size` (h, w) is what the network was evaluated at, the centre of an image that just covers `size` / `crop`.
    `mean` and `std` are per channel in the network's `order`, in units of the scaled pixels: 0..1 with `scale` 1,
    0..255 with 255.

    Raises:
      InputError: size below 1, crop outside (0, 1], scale or deviation not above 0, unknown interpolation or order.
    """

    size: tuple[int, int]
    crop: float
    interpolation: Literal["bilinear", "bicubic"]
    mean: Channels
    std: Channels
    scale: float = 1.0
    order: Literal["RGB", "BGR"] = "RGB"

    def __post_init__(self) -> None:
        if self.interpolation not in ("bilinear", "bicubic"):
            raise unknown("interpolation", self.interpolation, ("bilinear", "bicubic"))
        if self.order not in ("RGB", "BGR"):
            raise unknown("channel order", self.order, ("RGB", "BGR"))
        if min(self.size) < 1 or not 0 < self.crop <= 1:
            raise InputError(f"size {self.size} and crop {self.crop}: expected positive sides, and a share in (0, 1]")
        if min(*self.std, self.scale) <= 0:
            raise InputError(f"std {self.std} and scale {self.scale}: expected values above 0")

    def __call__(self, x: ArrayLike) -> Array:
        """Images (b, h, w, c) of any size, RGB or gray, floating point in 0..1 or uint8, to the network's input.

        uint8 becomes float32; floating point keeps its type.

        Raises:
          InputError: another shape or type.
        """
        x = jnp.asarray(x)
        if x.ndim != 4 or x.shape[-1] != len(self.mean):
            raise InputError(f"preprocessing got images of shape {x.shape}, expected (b, h, w, {len(self.mean)})")
        if x.dtype == jnp.uint8:
            x = x.astype(jnp.float32) / (255 / self.scale)
        elif jnp.issubdtype(x.dtype, jnp.floating):
            x = x * self.scale
        else:
            raise InputError(f"preprocessing got images of {x.dtype}, expected floating point in 0..1, or uint8")
        if self.order == "BGR":
            x = x[..., ::-1]
        mean, std = (jnp.asarray(each, x.dtype).reshape(1, 1, 1, -1) for each in (self.mean, self.std))
        return (x - mean) / std

    @property
    def arithmetic(self) -> str:
        """What happens to the pixels, in words."""
        mean, std = (", ".join(f"{value:.6g}" for value in values) for values in (self.mean, self.std))
        return f"{self.order} in 0..{self.scale:g}, mean ({mean}), std ({std})"

    def same_arithmetic(self, other: "Pixels") -> bool:
        """Whether pixels become the same numbers, to the rounding of float32, whatever the size they are cut to."""

        def line(pixels: Pixels) -> np.ndarray:
            mean, std = np.array(pixels.mean), np.array(pixels.std)
            return np.concatenate([-mean / std, pixels.scale / std])  # of black, and white's above it

        orders = {self.order, other.order} if len(self.mean) > 1 else {""}
        return len(orders) == 1 and len(self.mean) == len(other.mean) and np.allclose(line(self), line(other), 1e-5)

    def read(self, path: Path | str) -> NDArray[np.uint8]:
        """An image file as (h, w, c) of `size`, RGB or gray: the centre of it scaled to cover `size` / `crop`.

        Sides are rounded as torchvision's `Resize` and `CenterCrop` do, and resampling is Pillow's, antialiased.

        Raises:
          InputError: what `jaxcnn.data.images.read_image` raises.
        """
        from PIL import Image

        channels = len(self.mean)
        pixels = read_image(path, channels=channels)
        picture = Image.fromarray(pixels if channels == 3 else pixels[..., 0])
        resampling = Image.Resampling.BICUBIC if self.interpolation == "bicubic" else Image.Resampling.BILINEAR
        picture = picture.resize(self._covering(picture.width, picture.height), resampling)
        height, width = self.size
        left, top = round((picture.width - width) / 2), round((picture.height - height) / 2)
        cut = picture.crop((left, top, left + width, top + height))
        return np.asarray(cut, np.uint8).reshape(height, width, channels)

    def _covering(self, width: int, height: int) -> tuple[int, int]:
        """Width and height of an image of these proportions that just covers `size` / `crop`."""
        least_height, least_width = (int(side / self.crop) for side in self.size)
        if least_height * width >= least_width * height:
            return max(least_width, least_height * width // height), least_height
        return least_width, max(least_height, least_width * height // width)


_IMAGENET = Pixels((224, 224), 0.875, "bilinear", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))
_CAFFE = Pixels((224, 224), 0.875, "bilinear", (103.939, 116.779, 123.68), (1.0, 1.0, 1.0), scale=255.0, order="BGR")

PREPROCESSINGS: dict[str, Pixels] = {
    "unit": replace(_IMAGENET, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0)),
    "imagenet": _IMAGENET,
    "imagenet_bicubic": replace(_IMAGENET, interpolation="bicubic"),
    "inception": replace(_IMAGENET, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)),
    "caffe": _CAFFE,
    "squeezenet": replace(_CAFFE, size=(227, 227), crop=227 / 256, mean=(104.0, 117.0, 123.0)),
}
"""unit: nothing but 0..1; imagenet: torchvision, and Keras's "torch"; imagenet_bicubic: timm's DenseNets; inception:
values in -1..1, Keras's "tf"; caffe: Oxford's VGG, and Keras's "caffe"; squeezenet: the authors' release."""


def of_fitted(preprocessing: Preprocessing, size: tuple[int, int]) -> Pixels | None:
    """A run's preprocessing of images of `size` (h, w), where it is a mean and a deviation per channel, else None."""
    arrays = preprocessing.arrays
    if preprocessing.kind == "none":
        mean, std = np.zeros_like(arrays["channel_mean"]), np.ones_like(arrays["channel_mean"])
    elif "axes" in arrays or arrays["mean"].ndim > 1:
        return None
    else:
        mean, std = arrays["mean"], arrays["std"]
    return Pixels(size, 1.0, "bilinear", tuple(map(float, mean)), tuple(map(float, std)))
