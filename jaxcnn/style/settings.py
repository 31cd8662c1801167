"""What a picture depends on beside the images and the network. Flags of `jaxcnn stylize`; nothing heavy is imported."""

import math
from dataclasses import dataclass

from jaxcnn.errors import InputError


@dataclass(frozen=True)
class Settings:
    """What the picture depends on. Names are checked where they are used, numbers here (`InputError`)."""

    size: int = 256
    """Pixels of the picture's longer side."""
    steps: int = 300
    """Updates at every scale; each costs one gradient."""
    optimizer: str = "lbfgs"
    """lbfgs or adam."""
    learning_rate: float = 0.02
    """Adam's, in pixels of 0..1."""
    init: str = "content"
    """content, noise, statistics (noise in the first style's colours), or an image file."""
    content_layers: tuple[str, ...] = ()
    """LAYER or WEIGHT:LAYER, several by spaces or commas; by default relu4_2, or the deepest that there is."""
    style_layers: tuple[str, ...] = ()
    """As above; weights are relative; by default relu1_1, relu2_1, ... relu5_1, as far as the weights go."""
    content_weight: float = 1.0
    """alpha: the paper's ratio to beta is 1e-3."""
    style_weight: float = 1000.0
    """beta."""
    tv_weight: float = 0.0
    """Of the total variation, the sum of squared differences of neighbouring pixels in 0..1."""
    style_loss: str = "gram"
    """gram, or wasserstein."""
    style_scale: float = 1.0
    """Longer side of the style images over the picture's: below 1 for finer strokes."""
    scales: int = 1
    """Sizes to go through, each sqrt(2) times the one before, up to --size."""
    preserve_colors: bool = False
    """Transfer the luminance only."""
    tile: int | None = None
    """Side of a tile, for pictures too large for memory; 0: none; by default 512 above 2 megapixels."""
    ema: float = 0.0
    """Decay of an average over the steps' pictures, then the result; 0: none."""
    tolerance: float = 0.0
    """A scale ends once 10 steps change the total by less than this share; 0: never."""
    seed: int = 0
    """Of the noise."""

    def __post_init__(self) -> None:
        tile = 0 if self.tile is None else self.tile
        for name, value, least in (
            *(("size", self.size, 1), ("steps", self.steps, 0), ("scales", self.scales, 1)),
            *(("seed", self.seed, 0), ("tile", tile, 0)),
        ):
            if not (isinstance(value, int) and value >= least):
                raise InputError(f"{name} {value}: expected an integer of at least {least}")
        if self.seed >= 2**32:
            raise InputError(f"seed {self.seed}: expected an integer below 2**32")
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
      InputError: a weight that is not above 0, or nothing that it belongs to.
    """
    before, colon, after = text.partition(":")
    try:
        weight = float(before) if colon else 1.0
    except ValueError:
        return 1.0, text  # a colon that belongs to the name
    name = after if colon else text
    if not name:
        raise InputError(f"{text!r} names nothing: expected NAME or WEIGHT:NAME")
    check_weight(weight, of=repr(name))
    return weight, name


def check_weight(weight: float, *, of: str) -> None:
    """`InputError` where that is no finite number above 0."""
    if not (math.isfinite(weight) and weight > 0):
        raise InputError(f"{of} has weight {weight:g}: expected a number above 0")
