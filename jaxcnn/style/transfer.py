"""Style transfer from pictures to pictures: scales, steps, checkpoints (row S; Gatys, Ecker & Bethge 2016).

A step is one evaluation of the objective and one update, for every optimiser. Pixels are RGB in 0..1 and not clipped
while they are optimised; the picture that is returned is.
"""

import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxcnn.checkpoint import CheckpointError, Checkpoints, Restored
from jaxcnn.errors import InputError, TrainingFailed, unknown
from jaxcnn.signals import StopRequest
from jaxcnn.style import optimizers, pictures
from jaxcnn.style.losses import STYLE_LOSSES, Moments, moments
from jaxcnn.style.network import PAPER_CONTENT, PAPER_STYLE, Network
from jaxcnn.style.objective import Objective, Targets, Terms
from jaxcnn.style.optimizers import Optimizer, State
from jaxcnn.style.pictures import Picture, Style, digest
from jaxcnn.style.settings import Settings, parse_weighted
from jaxcnn.style.tiles import Grid, Tiled
from jaxcnn.tree import state_sha256, unflatten
from jaxcnn.types import Array

UNTILED = 1 << 21
"""Pixels of a picture up to which one evaluation takes it whole, where no tile is asked for."""
TILE = 512
SECONDS_BETWEEN_CHECKPOINTS = 30.0
"""At least; and ten times as long as saving takes."""
WINDOW = 10
"""Steps over which the relative change is taken for stopping early."""


class Step(NamedTuple):
    """What a callback is given after every step: the `line` of the log; how many evaluations of how many are `done`;
    and `pictures()`, as they are, to be called before the callback returns."""

    line: dict[str, Any]
    done: int
    total: int
    pictures: Callable[[], list[Picture]]


class Stylized(NamedTuple):
    """`pictures`, one for each group of styles; `losses`, lines with step (updates so far), size and every term, lists
    where there are several pictures; a scale begins with the step that the one before ended with. `stopped`: "steps",
    "tolerance", "converged" or "not finite", which leaves the pictures as they were before."""

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
    stop: StopRequest | None = None,
) -> Stylized:
    """A picture for each group of styles, all in one program.

    `start` is where the pictures begin in place of `settings.init`. With `checkpoints` the work is saved every half
    minute and when `stop` asks for it, and an earlier call with the same arguments is gone on with, to the same bits.

    Raises:
      InputError: no style, masks that do not fit, layers or sizes that the network cannot give, a checkpoint of another
        call.
      TrainingFailed: the loss is not finite to begin with.
      Stopped: `stop` asked for it; what there is was saved.
    """
    run = _Run(content, groups, network, settings, start, checkpoints)
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
    ):
        if not groups or not all(groups) or len({len(group) for group in groups}) > 1:
            raise InputError("give a style image, or as many for every picture")
        if len(groups) > 1 and any(style.mask is not None for group in groups for style in group):
            raise InputError("masks belong to one picture: call stylize for each")
        if start is None and settings.init not in pictures.STARTS:
            raise unknown("init", settings.init, pictures.STARTS)
        if settings.style_loss not in STYLE_LOSSES:
            raise unknown("style loss", settings.style_loss, STYLE_LOSSES)
        for picture, what in ((content, "the content image"), (start, "the picture to start from")):
            if picture is not None:
                pictures.check(picture, what=what)
        self.content, self.groups, self.network, self.settings = content, groups, network, settings
        self.start, self.checkpoints = start, checkpoints
        self.objective = objective_of(settings, network)
        self.optimizer = optimizers.make(settings.optimizer, learning_rate=settings.learning_rate)
        self.losses: list[dict[str, Any]] = []
        self.save_at = time.monotonic() + SECONDS_BETWEEN_CHECKPOINTS
        longest = [settings.size / math.sqrt(2) ** i for i in reversed(range(settings.scales))]
        self.sizes = [pictures.fitted_size(content, each) for each in longest]
        self._check_sizes()

    def _check_sizes(self) -> None:
        """Of the images as they come, which enlarging does not add to, and at the first, smallest scale."""
        seen = [(self.content.shape[:2], "the content image"), (self.sizes[0], "the picture at its first scale")]
        held = []
        for style in (style for group in self.groups for style in group):
            held.append((style.picture.shape[:2], "a style image"))
            held += [(self._style_size(style, scale), "a style image at its scale") for scale in (0, -1)]
        layers = [name for name, _ in self.objective.style]
        for names, sizes in ((self.objective.layers, seen), (layers, held)):
            size, what = min(sizes, key=lambda one: min(one[0]))
            self.network.check(names, size=size, what=what)

    def _style_size(self, style: Style, scale: int) -> tuple[int, int]:
        return pictures.fitted_size(style.picture, max(self.sizes[scale]) * self.settings.style_scale)

    def __call__(self, callback: Callable[[Step], None], stop: StopRequest) -> Stylized:
        saved = self._restored()
        first = saved.loop["scale"] if saved else 0
        carry, stopped = None, "steps"
        for scale in range(first, len(self.sizes)):
            if carry is not None and stop.signum is not None:
                self._save(scale - 1, self.settings.steps + 1, carry)
            stop.check()
            job = self._prepare(scale)
            done = 0
            if saved:
                like = jax.eval_shape(self._begun, job.content)
                carry = jax.tree.map(jnp.array, unflatten(like, saved.arrays, what="checkpoint's arrays"))
                done, self.losses = saved.loop["done"], saved.loop["losses"]
                saved = None  # as large as `carry`
            elif carry is None:
                carry = self._begun(self._first(job))
            else:
                carry = _enlarged(self.optimizer, self.objective.names, job.content.shape[1:3], carry)
            carry, stopped = self._optimise(scale, job, carry, done, callback, stop)
            if stopped == "not finite":
                break
        assert carry is not None
        if not self.losses:
            raise TrainingFailed("the loss is not finite to begin with: give smaller weights, of the layers or in all")
        return Stylized(self._pictures(job, carry), self.losses, stopped)

    def _optimise(
        self, scale: int, job: Job, carry: Carry, done: int, callback: Callable[[Step], None], stop: StopRequest
    ) -> tuple[Carry, str]:
        """The steps of one scale, and why they ended. Step 0 evaluates the picture as it comes."""
        steps = self.settings.steps
        for step in range(done, steps + 1):
            if stop.signum is not None or time.monotonic() > self.save_at:
                self._save(scale, step, carry)
                stop.check()
            if job.tiled:
                terms, grad = job.tiled.value_and_grad(self.network, job.targets, carry.state.point)
                carry, stuck, fine = _told(self.optimizer, self.settings.ema, carry, terms, grad)
            else:
                carry, stuck, fine = _step(
                    self.objective, self.optimizer, self.settings.ema, self.network, job.targets, carry
                )
            stuck, fine = jax.device_get((stuck, fine))
            if (stuck & ~fine).any():
                return carry, "not finite"
            self._log(scale * steps + step, job, carry)
            total = (steps + 1) * len(self.sizes)
            callback(Step(self.losses[-1], scale * (steps + 1) + step + 1, total, partial(self._pictures, job, carry)))
            if stuck.all():
                return carry, "converged"
            if step >= WINDOW and self._settled():
                return carry, "tolerance"
        return carry, "steps"

    def _log(self, step: int, job: Job, carry: Carry) -> None:
        found = jax.device_get(carry.terms)
        terms = {name: found[name].tolist() for name in self.objective.names}
        if len(self.groups) == 1:
            terms = {name: values[0] for name, values in terms.items()}
        self.losses.append({"step": step, "size": max(job.content.shape), **terms})

    def _settled(self) -> bool:
        now, before = (np.asarray(self.losses[i]["total"]) for i in (-1, -1 - WINDOW))
        return bool((np.abs(before - now) < self.settings.tolerance * np.abs(now)).all())

    def _prepare(self, scale: int) -> Job:
        content = pictures.to_array(pictures.scaled(self.content, self.sizes[scale]))
        styles = [
            [pictures.to_array(pictures.scaled(style.picture, self._style_size(style, scale))) for style in group]
            for group in self.groups
        ]
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
        weights = np.array([[style.weight for style in group] for group in self.groups])
        shares = jnp.asarray(weights / weights.sum(1, keepdims=True), jnp.float32)
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
        return None if all(mask is None for mask in masks) else pictures.scaled_masks(masks, size)

    def _first(self, job: Job) -> Array:
        if self.start is None:
            firsts = [group[0] for group in job.styles]
            x = pictures.start(self.settings.init, content=job.content, styles=firsts, seed=self.settings.seed)
        else:
            x = pictures.to_array(pictures.scaled(self.start, job.content.shape[1:3]))
        return pictures.luminance(x) if self.settings.preserve_colors else x

    def _begun(self, x: Array) -> Carry:
        x = jnp.broadcast_to(x, (len(self.groups), *x.shape[1:]))
        return _begun(self.optimizer, self.objective.names, self.settings.ema > 0, x)

    def _pictures(self, job: Job, carry: Carry) -> list[Picture]:
        x = carry.state.x if carry.average is None else carry.average
        if self.settings.preserve_colors:
            x = pictures.coloured(x, job.content)
        return [pictures.to_picture(one) for one in x]

    def _made_with(self) -> dict[str, Any]:
        """All that the pictures depend on, as JSON: what a checkpoint must have been made with."""
        module: Any = self.network.module
        network = {"variables": self.network.variables, "pixels": (self.network.matrix, self.network.bias)}
        made_with = {**asdict(self.settings), "weights": state_sha256(network)[:16], "pooling": module.pooling}
        made_with |= {"content": digest(self.content), "start": digest(self.start)}
        for picture, group in enumerate(self.groups):
            for i, one in enumerate(group):
                made_with[f"style {picture}.{i}"] = [digest(one.picture), one.weight, digest(one.mask)]
        return json.loads(json.dumps(made_with))

    def _save(self, scale: int, done: int, carry: Carry) -> None:
        if self.checkpoints is None:
            return
        begun = time.monotonic()
        number = scale * (self.settings.steps + 2) + done
        loop = {"scale": scale, "done": done, "losses": self.losses, "made_with": self._made_with()}
        try:
            self.checkpoints.save(number, carry, loop=loop)
        except CheckpointError as error:
            self.checkpoints.report(f"{error}; the next one tries again")
        now = time.monotonic()
        self.save_at = now + max(SECONDS_BETWEEN_CHECKPOINTS, 10 * (now - begun))

    def _restored(self) -> Restored | None:
        if self.checkpoints is None:
            return None
        saved = self.checkpoints.restore_latest()
        if saved is None:
            if self.checkpoints.damaged.exists():
                self.checkpoints.report("no whole checkpoint is left: the picture is begun anew")
            return None
        then, now = saved.loop["made_with"], self._made_with()
        keys = [key for key in {**then, **now} if then.get(key) != now.get(key)]
        if keys:
            differ = "; ".join(f"{key}: {then.get(key)!r} -> {now.get(key)!r}" for key in keys)
            raise InputError(
                f"{self.checkpoints.directory} holds an unfinished picture of other settings or inputs ({differ}):"
                " give those again, or another output, or delete it"
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
    parts = [parse_weighted(text.strip()) for text in ",".join(texts).split(",")]
    names = [name for _, name in parts]
    if twice := [name for name in names if names.count(name) > 1]:
        raise InputError(f"layer {twice[0]} is given twice: give it once, with the sum of its weights")
    total = sum(weight for weight, _ in parts)
    return tuple((name, factor * weight / total) for weight, name in parts) if factor else ()


@partial(jax.jit, static_argnums=2)
def _features(network: Network, x: Array, names: tuple[str, ...]) -> dict[str, Array]:
    return network.features(x, names)


@partial(jax.jit, static_argnums=2)
def _moments(network: Network, x: Array, names: tuple[str, ...]) -> dict[str, Moments]:
    return {name: moments(one) for name, one in network.features(x, names).items()}


@partial(jax.jit, static_argnums=(0, 1, 2))
def _begun(optimizer: Optimizer, names: tuple[str, ...], ema: bool, x: Array) -> Carry:
    return _carry(optimizer.init(x), names, ema)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _enlarged(optimizer: Optimizer, names: tuple[str, ...], size: tuple[int, int], carry: Carry) -> Carry:
    """From the picture of the scale before. Adam's moments are resized linearly: the second must not fall below 0, nor
    to 0 where the first does not, which would be a step without bound."""
    x = carry.state.x if carry.average is None else carry.average
    shape = (len(x), *size, x.shape[-1])
    linear = partial(jax.image.resize, shape=shape, method="linear")
    state = optimizer.resized(carry.state, jax.image.resize(x, shape, "cubic"), linear)
    return _carry(state, names, carry.average is not None)


def _carry(state: State, names: tuple[str, ...], ema: bool) -> Carry:
    """Each leaf in memory of its own, since a step gives all of it away."""
    terms = dict.fromkeys(names, jnp.zeros(len(state.x), state.x.dtype))
    return jax.tree.map(jnp.array, Carry(state, terms, state.x if ema else None))


@partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=5)
def _step(
    objective: Objective, optimizer: Optimizer, ema: float, network: Network, targets: Targets, carry: Carry
) -> tuple[Carry, Array, Array]:
    terms, grad = objective.value_and_grad(network, targets, carry.state.point)
    return _told(optimizer, ema, carry, terms, grad)


@partial(jax.jit, static_argnums=(0, 1), donate_argnums=2)
def _told(optimizer: Optimizer, ema: float, carry: Carry, terms: Terms, grad: Array) -> tuple[Carry, Array, Array]:
    """What follows an evaluation; by picture (k,), whether it has nowhere to go, and whether all was finite."""
    state, kept = optimizer.tell(carry.state, terms["total"], grad)
    same = (state.point == carry.state.point) | (jnp.isnan(state.point) & jnp.isnan(carry.state.point))
    stuck = ~kept & same.all((1, 2, 3))
    fine = optimizers.finite(terms["total"], grad)
    terms = {name: jnp.where(kept, found, carry.terms[name]) for name, found in terms.items()}
    average = carry.average
    if average is not None:
        average = jnp.where(jnp.isinf(carry.state.value).all(), state.x, ema * average + (1 - ema) * state.x)
    return Carry(state, terms, average), stuck, fine
