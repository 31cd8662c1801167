"""What a picture depends on beside the images and the network. Flags of `jaxcnn stylize`; nothing heavy is imported."""

import math
from dataclasses import dataclass

from jaxcnn.errors import InputError


@dataclass(frozen=True)
class Settings:
    """Names are checked where they are used.

    Raises:
      InputError: a number out of its range.
    """

    size: int = 256
    """Pixels of the picture's longer side."""
    steps: int = 300
    """Updates at every scale; each costs one gradient."""
    optimizer: str = "lbfgs"
    """lbfgs or adam."""
    learning_rate: float = 0.02
    """Adam's, in pixels of 0..1."""
    init: str = "content"
    """content, noise, statistics (noise in the style's colours), or an image file."""
    content_layers: tuple[str, ...] = ()
    """LAYER or WEIGHT:LAYER; by default relu4_2, or the deepest one that the weights have before it."""
    style_layers: tuple[str, ...] = ()
    """LAYER or WEIGHT:LAYER, weights being relative; by default relu1_1 to relu5_1 as far as the weights go."""
    content_weight: float = 1.0
    """alpha; the paper's ratio to beta is 1e-3."""
    style_weight: float = 1000.0
    """beta."""
    tv_weight: float = 0.0
    """Of the total variation, the sum of squared differences of neighbouring pixels in 0..1."""
    style_loss: str = "gram"
    """gram, or wasserstein."""
    style_scale: float = 1.0
    """Longer side of the style images over that of the picture: below 1 for finer strokes."""
    scales: int = 1
    """Sizes to go through, each sqrt(2) times the one before, the last one being --size."""
    preserve_colors: bool = False
    """Only the luminance is transferred."""
    tile: int | None = None
    """Pixels of a tile, for pictures that do not fit in memory; 0: none; by default 512 above 2 megapixels."""
    ema: float = 0.0
    """Decay of an average over the steps' pictures, which is then the result; 0: none."""
    tolerance: float = 0.0
    """A scale ends once the total changes by less than this share in 10 steps; 0: never."""
    seed: int = 0
    """Of the noise."""

    def __post_init__(self) -> None:
        for name, least in (("size", 1), ("steps", 0), ("scales", 1), ("seed", 0), ("tile", 0)):
            value = getattr(self, name)
            if value is not None and value < least:
                raise InputError(f"{name} {value}: expected an integer of at least {least}")
        for name in ("content_weight", "style_weight", "tv_weight", "tolerance"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise InputError(f"{name} {value}: expected a number of at least 0")
        for name in ("learning_rate", "style_scale"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value > 0):
                raise InputError(f"{name} {value}: expected a number above 0")
        if not 0 <= self.ema < 1:
            raise InputError(f"ema {self.ema}: expected a decay in [0, 1)")
        if self.content_weight == self.style_weight == self.tv_weight == 0:
            raise InputError("content_weight, style_weight and tv_weight are all 0: there is nothing to optimise")


def parse_weighted(text: str) -> tuple[float, str]:
    """ "0.5:relu4_2" as (0.5, "relu4_2"); without a weight, 1.

    Raises:
      InputError: a weight that is not above 0.
    """
    before, colon, after = text.partition(":")
    try:
        weight = float(before) if colon else 1.0
    except ValueError:
        return 1.0, text  # a colon that belongs to the name
    if not (math.isfinite(weight) and weight > 0):
        raise InputError(f"{text!r} has weight {before}: expected a number above 0")
    return weight, after if colon else text
