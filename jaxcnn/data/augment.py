"""Augmentation on the device: padded crop, flip, rotation, scaling, colour jitter, RandAugment, cutout, mixup, cutmix.

What happens to an example depends only on the key and on the example's index in the global batch, so the
number of devices changes no bit. Hence `augment` wants the global batch under `jit`, sharded or not: under
`pmap` the index would start at 0 on every device. (Label smoothing belongs to the loss.)
"""

import dataclasses
import math
import zlib
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcnn.data import color
from jaxcnn.data.randaugment import MAX_MAGNITUDE, OPERATIONS, randaugment
from jaxcnn.data.warp import rotation, warp
from jaxcnn.errors import InputError
from jaxcnn.types import Array, ArrayLike


@dataclasses.dataclass(frozen=True)
class Augmentation:
    """Settings of `augment`; the defaults do nothing. Raises InputError for a value outside its range."""

    crop_padding: int = 0
    """Pixels of border added on every side before a crop of the original size at a random place."""
    flip: bool = False
    """Mirror left and right with probability 1/2."""
    rotation: float = 0.0
    """Largest angle in degrees: uniform from minus to plus so much, about the centre."""
    scaling: float = 0.0
    """s of the magnification about the centre, uniform in [1 - s, 1 + s]."""
    color_jitter: float = 0.0
    """s of the factors of brightness, then contrast, then saturation, each uniform in [1 - s, 1 + s]."""
    randaugment: tuple[int, int] | None = None
    """(N, M): N operations of magnitude M, 0 to 30 (`jaxcnn.data.randaugment`)."""
    cutout: int = 0
    """Side of the square that is blanked, in pixels (DeVries & Taylor 2017)."""
    mixup: float = 0.0
    """alpha of lambda ~ Beta(alpha, alpha) (Zhang et al. 2018); 0 is off."""
    cutmix: float = 0.0
    """alpha of lambda ~ Beta(alpha, alpha) (Yun et al. 2019); 0 is off."""

    def __post_init__(self) -> None:
        for name in ("crop_padding", "cutout"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise InputError(f"{name} is {value!r}: expected a whole number of pixels, 0 for off")
        if not isinstance(self.flip, bool):
            raise InputError(f"flip is {self.flip!r}: expected True or False")
        for name in ("mixup", "cutmix"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < math.inf:
                raise InputError(f"{name} is {value!r}: expected alpha, a number above 0, or 0 for off")
        for name, high in (("rotation", 180), ("scaling", 0.9), ("color_jitter", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= high:
                raise InputError(f"{name} is {value!r}: expected a number from 0, for off, to {high}")
        if self.randaugment is not None and not _is_randaugment(self.randaugment):
            raise InputError(
                f"randaugment is {self.randaugment!r}: expected None for off, or two whole numbers (N, M), N operations"
                f" of magnitude M, at least 1 and 0 to {MAX_MAGNITUDE}"
            )

    @property
    def needs_pixels(self) -> bool:
        """Whether `augment` wants images in 0..1."""
        return self.color_jitter > 0 or self.randaugment is not None

    @property
    def soft_labels(self) -> bool:
        """Whether `augment` returns soft labels."""
        return self.mixup > 0 or self.cutmix > 0


def _is_randaugment(value: object) -> bool:
    if not (isinstance(value, tuple) and len(value) == 2 and all(type(part) is int for part in value)):
        return False
    return value[0] >= 1 and 0 <= value[1] <= MAX_MAGNITUDE


class Augmented(NamedTuple):
    images: Array
    labels: Array


def augment(
    key: Array,
    images: Array,
    labels: Array,
    *,
    settings: Augmentation,
    num_classes: int,
    fill: ArrayLike,
) -> Augmented:
    """Augment a whole batch: crop, flip, warp, colour jitter, RandAugment, cutout, then mixup or cutmix.

    `images` (b, h, w, c) floating point, in any range, or, with colour jitter or RandAugment, in 0..1 with 1 or 3
    channels, which stay in 0..1; shape and dtype stay. `fill` (c,), in the same range, stands wherever crop, warps and
    cutout leave nothing: the training mean where normalisation follows, 0 where it came before.
    `labels` (b,) integers, returned as they are, or as float32 (b, k) that sum to 1 with mixup or cutmix.
    Example i is mixed with example i - 1 (the first with the last), each with its own lambda, where the
    papers' code draws one per batch; with both on, a fair coin chooses per example.
    Raises InputError for images or labels of another kind.
    """
    if images.ndim != 4 or not jnp.issubdtype(images.dtype, jnp.floating):
        raise InputError(f"images {images.dtype}{list(images.shape)}: expected floating point (b, h, w, c)")
    if labels.shape != images.shape[:1] or not jnp.issubdtype(labels.dtype, jnp.integer):
        raise InputError(f"labels {labels.dtype}{list(labels.shape)}: expected one integer per image")
    fill = jnp.asarray(fill, images.dtype)
    if fill.shape != images.shape[3:]:
        raise InputError(f"fill {fill.shape}: expected one value for each of {images.shape[3]} channels")
    if settings.crop_padding or settings.flip:
        images = _crop_and_flip(key, images, fill, settings)
    if settings.needs_pixels and images.shape[3] not in (1, 3):
        raise InputError(f"images of {images.shape[3]} channels: colour jitter and RandAugment want 1 or 3")
    if settings.rotation or settings.scaling or settings.needs_pixels:
        images = _warp_and_recolour(key, images, fill, settings)
    if settings.cutout:
        box = _box(_centres(key, "cutout", images.shape), settings.cutout, images.shape)
        images = jnp.where(box[..., None], fill[None, None, None], images)
    if settings.soft_labels:
        return _mix(key, images, jax.nn.one_hot(labels, num_classes, dtype=jnp.float32), settings)
    return Augmented(images, labels)


def _draw(key: Array, stream: str, batch: int, sample: Callable[[Array], Array]) -> Array:
    """`sample(key of the example)` for each example, from a stream of its own for each purpose."""
    stream_key = jax.random.fold_in(key, zlib.crc32(stream.encode()))
    return jax.vmap(lambda index: sample(jax.random.fold_in(stream_key, index)))(jnp.arange(batch))


def _crop_and_flip(key: Array, images: Array, fill: Array, settings: Augmentation) -> Array:
    """Both as one gather from the unpadded images: the fastest of nine ways on CPU, and exact."""
    b, h, w, _ = images.shape
    rows, columns = jnp.arange(h)[None], jnp.arange(w)[None]
    if settings.crop_padding:
        p = settings.crop_padding
        shift = _draw(key, "crop", b, lambda k: jax.random.randint(k, (2,), -p, p + 1))
        rows, columns = rows + shift[:, :1], columns + shift[:, 1:]
    rows, columns = jnp.broadcast_to(rows, (b, h)), jnp.broadcast_to(columns, (b, w))
    if settings.flip:
        mirrored = _draw(key, "flip", b, jax.random.bernoulli)
        columns = jnp.where(mirrored[:, None], columns[:, ::-1], columns)
    window = jax.vmap(lambda image, r, s: image.at[r[:, None], s[None]].get(mode="clip"))(images, rows, columns)
    inside = ((rows >= 0) & (rows < h))[:, :, None] & ((columns >= 0) & (columns < w))[:, None, :]
    return jnp.where(inside[..., None], window, fill[None, None, None])


def _warp_and_recolour(key: Array, images: Array, fill: Array, settings: Augmentation) -> Array:
    """Rotation and scaling as one warp, colour jitter, RandAugment; computed in at least float32."""
    b, dtype = len(images), images.dtype
    wide, fill = images.astype(_wide(dtype)), fill.astype(_wide(dtype))
    if settings.rotation or settings.scaling:
        degrees = settings.rotation * _between(key, "rotation", b)
        zooms = 1 + settings.scaling * _between(key, "scaling", b)
        wide = jax.vmap(lambda x, turn, zoom: warp(x, rotation(turn, zoom=zoom), fill=fill))(wide, degrees, zooms)
    if settings.color_jitter:
        for change in (color.brightness, color.contrast, color.saturation):
            factors = 1 + settings.color_jitter * _between(key, f"jitter of {change.__name__}", b)
            wide = jax.vmap(change)(wide, factors.astype(wide.dtype))
    if settings.randaugment is not None:
        n, magnitude = settings.randaugment
        many = jnp.array([[len(OPERATIONS), 2]])
        choices = _draw(key, "randaugment", b, lambda k: jax.random.randint(k, (n, 2), 0, many))
        wide = jax.vmap(lambda x, choice: randaugment(x, choice, magnitude=magnitude, fill=fill))(wide, choices)
    return wide.astype(dtype)


def _between(key: Array, stream: str, batch: int) -> Array:
    """Uniform in [-1, 1) for each example: (b,)."""
    return _draw(key, stream, batch, lambda k: jax.random.uniform(k, (), jnp.float32, minval=-1))


def _wide(dtype: jnp.dtype) -> jnp.dtype:
    return jnp.dtype(jnp.float64 if dtype == jnp.float64 else jnp.float32)


def _centres(key: Array, stream: str, shape: tuple[int, ...]) -> Array:
    """A pixel of each image, anywhere: (b, 2), row and column."""
    b, h, w, _ = shape
    return _draw(key, stream, b, lambda k: jax.random.randint(k, (2,), 0, jnp.array([h, w])))


def _box(centres: Array, sides: Array | int, shape: tuple[int, ...]) -> Array:
    """Where a box lies in each image, clipped at the border: centres (b, 2), sides (b, 2) -> bool (b, h, w).

    An odd side keeps its length, where the papers' code rounds it down to an even one.
    """
    _, h, w, _ = shape
    start = centres - sides // 2
    stop = start + sides
    rows, columns = jnp.arange(h)[None], jnp.arange(w)[None]
    in_rows = (rows >= start[:, :1]) & (rows < stop[:, :1])
    in_columns = (columns >= start[:, 1:]) & (columns < stop[:, 1:])
    return in_rows[:, :, None] & in_columns[:, None, :]


def _mix(key: Array, images: Array, targets: Array, settings: Augmentation) -> Augmented:
    """Mixup, cutmix, or for each example one of them, with the example before; targets (b, k)."""
    partners = jnp.roll(images, 1, axis=0)
    ways = [
        way(key, images, partners, alpha)
        for way, alpha in ((_mixup, settings.mixup), (_cutmix, settings.cutmix))
        if alpha > 0
    ]
    mixed, share = ways[0]
    if len(ways) == 2:
        coin = _draw(key, "mixup or cutmix", images.shape[0], jax.random.bernoulli)
        mixed = jnp.where(coin[:, None, None, None], mixed, ways[1][0])
        share = jnp.where(coin, share, ways[1][1])
    share = share[:, None]
    return Augmented(mixed, share * targets + (1 - share) * jnp.roll(targets, 1, axis=0))


def _lambdas(key: Array, stream: str, batch: int, alpha: float) -> Array:
    """Beta(alpha, alpha) for each example: (b,), exactly and without rejection.

    (1 + r) / 2 is Beta(a, a) for a = alpha + 1 (Ulrich 1984; Devroye 1986, IX.4.3), and a Gamma(a) variable
    times u^(1/alpha) is Gamma(alpha). `jax.random.beta` rejects in loops, which on a sharded batch exchange
    a message between all devices at every turn, and takes a second to compile.
    """

    def sample(key: Array) -> Array:
        u = jax.random.uniform(key, (4,), jnp.float32, minval=jnp.finfo(jnp.float32).tiny)
        r = jnp.sqrt(1 - u[0] ** (2 / (2 * alpha + 1))) * jnp.cos(2 * jnp.pi * u[1])
        return jax.nn.sigmoid(2 * jnp.arctanh(r) + (jnp.log(u[2]) - jnp.log(u[3])) / alpha)

    return _draw(key, stream, batch, sample)


def _mixup(key: Array, images: Array, partners: Array, alpha: float) -> tuple[Array, Array]:
    """lambda x + (1 - lambda) partner, computed in at least float32, and lambda (b,)."""
    share = _lambdas(key, "mixup", images.shape[0], alpha)
    wide = _wide(images.dtype)
    weight = share[:, None, None, None].astype(wide)
    mixed = weight * images.astype(wide) + (1 - weight) * partners.astype(wide)
    return mixed.astype(images.dtype), share


def _cutmix(key: Array, images: Array, partners: Array, alpha: float) -> tuple[Array, Array]:
    """A box of the partner, of area 1 - lambda before it is clipped, and the share (b,) of pixels kept."""
    b, h, w, _ = images.shape
    ratio = jnp.sqrt(1 - _lambdas(key, "cutmix", b, alpha))
    sides = (ratio[:, None] * jnp.array([[h, w]], jnp.float32)).astype(jnp.int32)
    box = _box(_centres(key, "cutmix box", images.shape), sides, images.shape)
    area = box.sum((1, 2), dtype=jnp.int32).astype(jnp.float32)
    return jnp.where(box[..., None], partners, images), 1 - area / (h * w)
