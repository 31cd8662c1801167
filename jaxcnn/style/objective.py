"""E_total of row S for a batch of pictures, from the features of one frozen network."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jaxcnn.style.losses import STYLE_LOSSES, Moments, content_loss, moments, total_variation
from jaxcnn.style.network import Network
from jaxcnn.types import Array

Terms = dict[str, Array]
"""By name, (k,): "content/relu4_2", "style/relu1_1", "tv", each as it counts; "content", "style", "total" are sums."""


class Targets(NamedTuple):
    """What k pictures are held against: `content`, features (k or 1, h, w, c) by layer; `style`, the moments of s style
    images by layer, (k or 1, s, ...), which count by `shares` (k or 1, s); `masks` (s, h, w) in 0..1, where in the
    picture each of them counts, or None: everywhere."""

    content: dict[str, Array]
    style: dict[str, Moments]
    shares: Array
    masks: Array | None


@dataclass(frozen=True)
class Objective:
    """alpha 1/2 sum (F - F_c)^2 + beta sum_l w_l E_l + gamma TV over pixels in 0..1.

    `content` and `style` give (layer, weight), the weight with alpha or beta in it; `tv` is gamma. E_l is one of
    `STYLE_LOSSES`; of several style images, the sum of theirs by share.
    """

    content: tuple[tuple[str, float], ...]
    style: tuple[tuple[str, float], ...]
    tv: float = 0.0
    style_loss: str = "gram"

    @property
    def layers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for name, _ in (*self.content, *self.style)))

    @property
    def names(self) -> tuple[str, ...]:
        """Of the terms."""
        layers = (*(f"content/{name}" for name, _ in self.content), *(f"style/{name}" for name, _ in self.style))
        return ("total", "content", "style", "tv", *layers)

    def __call__(self, network: Network, targets: Targets, x: Array) -> Terms:
        """Pictures x (k, h, w, 3), RGB in 0..1, to their terms."""
        features = network.features(x, self.layers)
        found = {name: moments(features[name], self.masks(targets, features[name])) for name, _ in self.style}
        content = {name: content_loss(features[name], targets.content[name]) for name, _ in self.content}
        return self.terms(content, self.style_terms(found, targets), x)

    def value_and_grad(self, network: Network, targets: Targets, x: Array) -> tuple[Terms, Array]:
        """The terms of pictures x, and the gradient of each one's total by its pixels."""

        def total(x: Array) -> tuple[Array, Terms]:
            terms = self(network, targets, x)
            return terms["total"].sum(), terms

        grad, terms = jax.grad(total, has_aux=True)(x)
        return terms, grad

    def style_terms(self, found: Mapping[str, Moments], targets: Targets) -> Terms:
        """w_l E_l by layer, (k,), of the moments of k pictures."""
        distance, terms = STYLE_LOSSES[self.style_loss], {}
        for name, weight in self.style:
            terms[name] = weight * (distance(found[name], targets.style[name]) * targets.shares).sum(-1)
        return terms

    def terms(self, content: Mapping[str, Array], style: Mapping[str, Array], x: Array) -> Terms:
        """All terms, from unweighted ones of content and weighted ones of style."""
        zero = jnp.zeros(len(x), x.dtype)
        content = {f"content/{name}": weight * content[name] for name, weight in self.content}
        style = {f"style/{name}": style[name] for name, _ in self.style}
        tv = self.tv * total_variation(x) if self.tv else zero
        sums = {"content": sum(content.values(), zero), "style": sum(style.values(), zero), "tv": tv}
        return {"total": sum(sums.values(), zero), **sums, **content, **style}

    def masks(self, targets: Targets, features: Array) -> Array | None:
        """The masks at the size of a layer's map, by averaging."""
        if targets.masks is None:
            return None
        shape = (len(targets.masks), *features.shape[1:3])
        return jax.image.resize(targets.masks, shape, "linear")
