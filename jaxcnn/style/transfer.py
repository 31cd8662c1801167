"""Style transfer from pictures to pictures: scales, steps, checkpoints (row S; Gatys, Ecker & Bethge 2016).

A step is one evaluation of the objective and one update, for every optimiser. Pixels are RGB in 0..1 and not clipped
while they are optimised; the picture that is returned is.
"""

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcnn.checkpoint import Checkpoints, Restored
from jaxcnn.errors import InputError, unknown
from jaxcnn.signals import StopRequest
from jaxcnn.style import optimizers, pictures
from jaxcnn.style.losses import STYLE_LOSSES, Moments, moments
from jaxcnn.style.network import PAPER_CONTENT, PAPER_STYLE, Network
from jaxcnn.style.objective import Objective, Targets, Terms
from jaxcnn.style.optimizers import Optimizer, State
from jaxcnn.style.pictures import Picture
from jaxcnn.style.settings import Settings, parse_weighted
from jaxcnn.style.tiles import Grid, Tiled
from jaxcnn.tree import unflatten
from jaxcnn.types import Array

UNTILED = 1 << 21
"""Pixels of a picture up to which one evaluation takes it whole, where no tile is asked for."""
TILE = 512
SECONDS_BETWEEN_CHECKPOINTS = 30.0
WINDOW = 10
"""Steps over which the relative change is taken for stopping early."""


@dataclass(frozen=True)
class Style:
    """`picture` is held against the result where `mask` (h, w) in 0..1, of any size, is high; None: everywhere."""

    picture: Picture
    weight: float = 1.0
    mask: np.ndarray | None = None


class Step(NamedTuple):
    """What a callback is given after every step: the `line` of the log, and `pictures()`, as they are."""

    line: dict[str, Any]
    done: int
    total: int
    pictures: Callable[[], list[Picture]]


class Stylized(NamedTuple):
    """`pictures`, one for each group of styles; `losses`, lines with step, size, total and every term, lists where
    there are several pictures; `stopped`: "steps", "tolerance", "converged" or "not finite"."""

    pictures: list[Picture]
    losses: list[dict[str, Any]]
    stopped: str


def stylize(
    content: Picture, styles: Sequence[Style], *, network: Network, settings: Settings, **options: Any
) -> Stylized:
    """One picture with the content of `content` in the blended style of `styles`; options as in `stylize_each`."""
    return stylize_each(content, [list(styles)], network=network, settings=settings, **options)


def stylize_each(
    content: Picture,
    groups: Sequence[Sequence[Style]],
    *,
    network: Network,
    settings: Settings,
    start: Picture | None = None,
    callback: Callable[[Step], None] | None = None,
    checkpoints: Checkpoints | None = None,
    identity: Mapping[str, str] | None = None,
    stop: StopRequest | None = None,
) -> Stylized:
    """A picture for each group of styles, all in one program.

    `start` is where the pictures begin in place of `settings.init`. With `checkpoints` the work is saved every half
    minute and when `stop` asks for it, and an earlier call with the same arguments is gone on with, to the same bits;
    `identity` names what else must be the same, such as the digests of files.

    Raises:
      InputError: no style, masks that do not fit, layers or sizes that the network cannot give, a checkpoint of another
        call.
      Stopped: `stop` asked for it; what there is was saved.
    """
    run = _Run(content, groups, network, settings, start, checkpoints, identity or {})
    return run(callback or (lambda step: None), stop or StopRequest())


class Carry(NamedTuple):
    """All that a step changes. `terms` are those of `state.x`; `average` is None without `ema`."""

    state: State
    terms: Terms
    average: Array | None


class Job(NamedTuple):
    """One scale: `content` (1, h, w, 3) in its colours, `styles` of each group as they are compared."""

    content: Array
    styles: list[list[Array]]
    targets: Targets
    tiled: Tiled | None


class _Run:
    def __init__(
        self,
        content: Picture,
        groups: Sequence[Sequence[Style]],
        network: Network,
        settings: Settings,
        start: Picture | None,
        checkpoints: Checkpoints | None,
        identity: Mapping[str, str],
    ):
        if not groups or not all(groups) or len({len(group) for group in groups}) > 1:
            raise InputError("give a style image, or as many for every picture")
        if len(groups) > 1 and any(style.mask is not None for group in groups for style in group):
            raise InputError("masks belong to one picture: call stylize for each")
        if start is None and settings.init not in pictures.STARTS:
            raise unknown("init", settings.init, pictures.STARTS)
        if settings.style_loss not in STYLE_LOSSES:
            raise unknown("style loss", settings.style_loss, STYLE_LOSSES)
        self.content, self.groups, self.network, self.settings = content, groups, network, settings
        self.start, self.checkpoints, self.identity = start, checkpoints, identity
        self.objective = objective_of(settings, network)
        self.optimizer = optimizers.make(settings.optimizer, learning_rate=settings.learning_rate)
        self.losses: list[dict[str, Any]] = []
        longest = [settings.size / math.sqrt(2) ** i for i in reversed(range(settings.scales))]
        self.contents = [pictures.fitted(content, each) for each in longest]
        for picture in self.contents:
            network.check(self.objective.layers, size=picture.shape[:2], what="the picture")

    def __call__(self, callback: Callable[[Step], None], stop: StopRequest) -> Stylized:
        saved = self._restored()
        first = saved.loop["scale"] if saved else 0
        carry, stopped = None, "steps"
        for scale in range(first, len(self.contents)):
            stop.check()
            job = self._prepare(scale)
            done = 0
            if saved and scale == first:
                like = jax.eval_shape(lambda job=job: self._begun(job.content, job))
                carry = jax.tree.map(jnp.asarray, unflatten(like, saved.arrays, what="checkpoint's arrays"))
                done, self.losses = saved.loop["done"], saved.loop["losses"]
            elif carry is None:
                carry = self._begun(self._first(job), job)
            else:
                carry = self._enlarged(carry, job)
            carry, stopped = self._optimise(scale, job, carry, done, callback, stop)
            if stopped == "not finite":
                break
        assert carry is not None
        return Stylized(self._pictures(job, carry), self.losses, stopped)

    def _optimise(
        self, scale: int, job: Job, carry: Carry, done: int, callback: Callable[[Step], None], stop: StopRequest
    ) -> tuple[Carry, str]:
        """The steps of one scale, and why they ended. Step 0 evaluates the picture as it comes."""
        steps, saved_at = self.settings.steps, time.monotonic()
        for step in range(done, steps + 1):
            if stop.signum is not None or time.monotonic() - saved_at > SECONDS_BETWEEN_CHECKPOINTS:
                self._save(scale, step, carry)
                saved_at = time.monotonic()
                stop.check()
            if job.tiled:
                terms, grad = job.tiled.value_and_grad(self.network, job.targets, carry.state.point)
                carry, stuck, fine = _told(self.optimizer, self.settings.ema, carry, terms, grad)
            else:
                carry, stuck, fine = _step(
                    self.objective, self.optimizer, self.settings.ema, self.network, job.targets, carry
                )
            if not fine and stuck:
                return carry, "not finite"
            self._log(scale * steps + step, job, carry)
            total = (steps + 1) * len(self.contents)
            callback(Step(self.losses[-1], scale * (steps + 1) + step + 1, total, partial(self._pictures, job, carry)))
            if stuck:
                return carry, "converged"
            if step >= WINDOW and self._settled():
                return carry, "tolerance"
        return carry, "steps"

    def _log(self, step: int, job: Job, carry: Carry) -> None:
        terms = {name: np.asarray(values).tolist() for name, values in carry.terms.items()}
        if len(self.groups) == 1:
            terms = {name: values[0] for name, values in terms.items()}
        self.losses.append({"step": step, "size": max(job.content.shape), **terms})

    def _settled(self) -> bool:
        now, before = (np.asarray(self.losses[i]["total"]) for i in (-1, -1 - WINDOW))
        return bool((np.abs(before - now) < self.settings.tolerance * np.abs(now)).all())

    def _prepare(self, scale: int) -> Job:
        content = pictures.to_array(self.contents[scale])
        longer = max(content.shape) * self.settings.style_scale
        styles = [[pictures.to_array(pictures.fitted(s.picture, longer)) for s in group] for group in self.groups]
        for style in (style for group in styles for style in group):
            layers = [name for name, _ in self.objective.style]
            self.network.check(layers, size=style.shape[1:3], what="a style image at this scale")
        seen = content
        if self.settings.preserve_colors:
            styles = [[pictures.matched_luminance(style, content) for style in group] for group in styles]
            seen = pictures.luminance(content)
        height, width = content.shape[1:3]
        tiled = self._tiled((height, width))
        names = [name for name, _ in self.objective.content]
        features = tiled.features(self.network, seen, names) if tiled else _features(self.network, seen, tuple(names))
        found = [[self._moments(style) for style in group] for group in styles]
        moments: Any = jax.tree.map(
            lambda *leaves: jnp.concatenate(leaves),
            *(jax.tree.map(lambda *s: jnp.concatenate(s, 1), *group) for group in found),
        )
        weights = np.array([[style.weight for style in group] for group in self.groups], np.float32)
        shares = jnp.asarray(weights / weights.sum(1, keepdims=True))
        return Job(content, styles, Targets(features, moments, shares, self._masks((height, width))), tiled)

    def _tiled(self, size: tuple[int, int]) -> Tiled | None:
        tile = self.settings.tile
        if tile is None:
            tile = TILE if size[0] * size[1] > UNTILED else 0
        return Tiled(self.objective, Grid(size, tile, self.network.reach(self.objective.layers))) if tile else None

    def _moments(self, style: Array) -> dict[str, Moments]:
        tiled = self._tiled((style.shape[1], style.shape[2]))
        names = tuple(name for name, _ in self.objective.style)
        return tiled.moments(self.network, style, None) if tiled else _moments(self.network, style, names)

    def _masks(self, size: tuple[int, int]) -> Array | None:
        masks = [style.mask for style in self.groups[0]]
        if all(mask is None for mask in masks):
            return None
        whole = np.ones(size, np.float32)
        scaled = [
            whole if mask is None else jax.image.resize(jnp.asarray(mask, jnp.float32), size, "linear")
            for mask in masks
        ]
        return jnp.stack([jnp.asarray(mask) for mask in scaled])

    def _first(self, job: Job) -> Array:
        if self.start is None:
            firsts = [group[0] for group in job.styles]
            x = pictures.start(
                self.settings.init, content=job.content, styles=firsts, count=len(firsts), seed=self.settings.seed
            )
        else:
            x = pictures.to_array(pictures.scaled(self.start, job.content.shape[1:3]))
            x = jnp.broadcast_to(x, (len(self.groups), *x.shape[1:]))
        return pictures.luminance(x) if self.settings.preserve_colors else x

    def _begun(self, x: Array, job: Job) -> Carry:
        return self._carry(self.optimizer.init(x))

    def _carry(self, state: State) -> Carry:
        zero = jnp.zeros(len(state.x), state.x.dtype)
        terms = dict.fromkeys(self.objective.names, zero)
        return jax.tree.map(jnp.array, Carry(state, terms, state.x if self.settings.ema else None))

    def _enlarged(self, carry: Carry, job: Job) -> Carry:
        """From the picture of the scale before."""
        shape = carry.state.x.shape[:1] + job.content.shape[1:]

        def resize(leaf: Array) -> Array:
            return jax.image.resize(leaf, shape, "cubic")

        x = carry.state.x if carry.average is None else carry.average
        return self._carry(self.optimizer.resized(carry.state, resize(x), resize))

    def _pictures(self, job: Job, carry: Carry) -> list[Picture]:
        x = carry.state.x if carry.average is None else carry.average
        if self.settings.preserve_colors:
            x = pictures.coloured(x, job.content)
        return [pictures.to_picture(one) for one in x]

    def _identity(self) -> dict[str, Any]:
        """What a checkpoint must have been made with, as JSON."""
        made_with = {**asdict(self.settings), "network": self.network.source, "pictures": len(self.groups)}
        return json.loads(json.dumps({**made_with, **self.identity}))

    def _save(self, scale: int, done: int, carry: Carry) -> None:
        if self.checkpoints:
            number = scale * (self.settings.steps + 1) + done
            loop = {"scale": scale, "done": done, "losses": self.losses, "made_with": self._identity()}
            self.checkpoints.save(number, carry, loop=loop)

    def _restored(self) -> Restored | None:
        saved = self.checkpoints.restore_latest() if self.checkpoints else None
        if saved is None or self.checkpoints is None:
            return None
        made_with, now = saved.loop["made_with"], self._identity()
        differ = [f"{key}: {made_with.get(key)!r} -> {now[key]!r}" for key in now if made_with.get(key) != now[key]]
        if differ:
            raise InputError(
                f"{self.checkpoints.directory.parent} holds an unfinished picture of other settings"
                f" ({'; '.join(differ)}): give these again, another output, or delete it"
            )
        return saved


def objective_of(settings: Settings, network: Network) -> Objective:
    """The objective of those layers and weights, the paper's layers as far as the network has them."""
    deepest = [name for name in network.layers if name.startswith("relu")][-1]
    usual = (PAPER_CONTENT if PAPER_CONTENT in network.layers else deepest,)
    content = _weighted(settings.content_layers or usual, settings.content_weight)
    usual = tuple(name for name in PAPER_STYLE if name in network.layers)
    style = _weighted(settings.style_layers or usual, settings.style_weight)
    return Objective(content, style, settings.tv_weight, settings.style_loss)


def _weighted(texts: Sequence[str], factor: float) -> tuple[tuple[str, float], ...]:
    """(layer, weight), the weights summing to `factor`; none where that is 0."""
    parts = [parse_weighted(text) for text in ",".join(texts).split(",")]
    total = sum(weight for weight, _ in parts)
    return tuple((name, factor * weight / total) for weight, name in parts) if factor else ()


@partial(jax.jit, static_argnums=2)
def _features(network: Network, x: Array, names: tuple[str, ...]) -> dict[str, Array]:
    return network.features(x, names)


@partial(jax.jit, static_argnums=2)
def _moments(network: Network, x: Array, names: tuple[str, ...]) -> dict[str, Moments]:
    return {name: moments(one) for name, one in network.features(x, names).items()}


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def _step(
    objective: Objective, optimizer: Optimizer, ema: float, network: Network, targets: Targets, carry: Carry
) -> tuple[Carry, Array, Array]:
    terms, grad = objective.value_and_grad(network, targets, carry.state.point)
    return _told(optimizer, ema, carry, terms, grad)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _told(optimizer: Optimizer, ema: float, carry: Carry, terms: Terms, grad: Array) -> tuple[Carry, Array, Array]:
    """What follows an evaluation; whether no picture has anywhere to go, and whether the values were finite."""
    state, kept = optimizer.tell(carry.state, terms["total"], grad)
    stuck = ~kept & (state.point == carry.state.point).all((1, 2, 3))
    terms = {name: jnp.where(kept, found, carry.terms[name]) for name, found in terms.items()}
    average = carry.average
    if average is not None:
        average = jnp.where(jnp.isinf(carry.state.value).all(), state.x, ema * average + (1 - ema) * state.x)
    fine = optimizers.finite(terms["total"], grad).all()
    return Carry(state, terms, average), stuck.all(), fine
