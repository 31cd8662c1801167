"""A step of style transfer beside the same step in PyTorch, in one process, in alternating turns.

    python experiments/benchmarks/style_vs_torch.py                              on CPU, 256 pixels
    python experiments/benchmarks/style_vs_torch.py --size 512 --steps 100       on a GPU

Needs     PyTorch, and nothing else running
Step      VGG-19 of random weights to relu5_1, the paper's layers, one square picture, float32. Ours is `stylize`
          itself, between two calls of its callback: loss, gradient, update, a line of the log on the host. PyTorch: the
          same objective on the same weights, backward, torch.optim.Adam, the loss on the host; in both memory layouts
Method    in every round each contender has one turn after two steps that are not counted. ms are medians over all
          steps; the ratio is the median of the rounds' ratios to PyTorch's better layout. The forward pass and the
          gradient, which has it in it, are our objective's, compiled alone; L-BFGS has one gradient for each step
Expected  on CPU Adam at most 1.3 times PyTorch's time, a step of L-BFGS at most 1.3 times a gradient
Measured  see README
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcnn.cli import run_program
from jaxcnn.files import write_json
from jaxcnn.style import network
from jaxcnn.style.losses import moments
from jaxcnn.style.network import PAPER_CONTENT, PAPER_STYLE, Network
from jaxcnn.style.objective import Targets
from jaxcnn.style.settings import Settings
from jaxcnn.style.transfer import Step, Style, objective_of, stylize

SKIPPED = 2

Turn = Callable[[], list[float]]
"""Runs one turn and returns the seconds of its steps."""


def ours(frozen: Network, content: np.ndarray, style: np.ndarray, settings: Settings) -> Turn:
    def turn() -> list[float]:
        at: list[float] = []

        def mark(step: Step) -> None:
            at.append(time.perf_counter())

        stylize(content, [Style(style)], network=frozen, settings=settings, callback=mark)
        return list(np.diff(at)[SKIPPED:])

    return turn


def parts(frozen: Network, content: np.ndarray, settings: Settings) -> dict[str, Turn]:
    """Of our step, compiled alone: the forward pass, and with the gradient."""
    objective = objective_of(settings, frozen)
    x = jnp.asarray(content, jnp.float32)[None] / 255
    features = frozen.features(x, objective.layers)
    content_maps = {name: features[name] for name, _ in objective.content}
    found = {name: moments(features[name]) for name, _ in objective.style}
    targets = Targets(content_maps, found, jnp.ones((1, 1)), None)

    def turn(compiled: Callable[..., Any]) -> list[float]:
        seconds = []
        for _ in range(settings.steps):
            begun = time.perf_counter()
            jax.block_until_ready(compiled(frozen, targets, x))
            seconds.append(time.perf_counter() - begun)
        return seconds[SKIPPED:]

    forward = jax.jit(lambda frozen, targets, x: objective(frozen, targets, x))
    return {"forward": partial(turn, forward), "gradient": partial(turn, jax.jit(objective.value_and_grad))}


def theirs(frozen: Network, content: np.ndarray, style: np.ndarray, settings: Settings, layout: str) -> Turn:
    """The same in PyTorch."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    memory = torch.channels_last if layout == "channels_last" else torch.contiguous_format
    layers: list[tuple[str, Any]] = []
    for name in frozen.layers:
        if name.startswith("conv"):
            leaves = frozen.variables["params"][name]
            kernel = torch.tensor(np.asarray(leaves["kernel"]).transpose(3, 2, 0, 1).copy())
            bias = torch.tensor(np.asarray(leaves["bias"]))
            layers.append((name, (kernel.to(device, memory_format=memory), bias.to(device))))
        else:
            layers.append((name, None))
    matrix = torch.tensor(np.asarray(frozen.matrix).T.copy()).to(device).reshape(3, 3, 1, 1)
    offset = torch.tensor(np.asarray(frozen.bias)).to(device)
    wanted = (PAPER_CONTENT, *PAPER_STYLE)

    def features(x: Any) -> dict[str, Any]:
        found, x = {}, torch.nn.functional.conv2d(x, matrix, offset)
        for name, leaves in layers:
            if leaves is not None:
                x = torch.nn.functional.conv2d(x, *leaves, padding=1)
            elif name.startswith("relu"):
                x = torch.relu(x)
            elif name.startswith("pool"):
                x = torch.nn.functional.max_pool2d(x, 2)
            if name in wanted:
                found[name] = x
            if len(found) == len(wanted):
                return found
        raise AssertionError(f"not all of {wanted} found")

    def gram(x: Any) -> Any:
        flat = x.reshape(x.shape[1], -1)
        return flat @ flat.T / flat.shape[1]

    def image(picture: np.ndarray) -> Any:
        x = torch.tensor(picture.transpose(2, 0, 1)[None] / 255.0, dtype=torch.float32).to(device)
        return x.contiguous(memory_format=memory)

    with torch.no_grad():
        target = features(image(content))[PAPER_CONTENT]
        grams = {name: gram(features(image(style))[name]) for name in PAPER_STYLE}

    def turn() -> list[float]:
        x = image(content).requires_grad_()
        optimizer, seconds = torch.optim.Adam([x], lr=settings.learning_rate), []
        for _ in range(settings.steps):
            begun = time.perf_counter()
            optimizer.zero_grad()
            found = features(x)
            total = settings.content_weight * 0.5 * ((found[PAPER_CONTENT] - target) ** 2).sum()
            for name, wish in grams.items():
                difference = ((gram(found[name]) - wish) ** 2).sum()
                total = total + settings.style_weight / len(grams) * difference / (4 * len(wish) ** 2)
            total.backward()
            optimizer.step()
            total.item()
            seconds.append(time.perf_counter() - begun)
        return seconds[SKIPPED:]

    return turn


def run(args: argparse.Namespace, output: Path) -> None:
    rng = np.random.default_rng(0)
    content, style = (rng.integers(0, 256, (args.size, args.size, 3), dtype=np.uint8) for _ in range(2))
    frozen = network.random(width=args.width)
    settings = {name: Settings(args.size, args.steps, name) for name in ("adam", "lbfgs")}
    contenders: dict[str, Turn] = {name: ours(frozen, content, style, one) for name, one in settings.items()}
    contenders |= parts(frozen, content, settings["adam"])
    layouts = ("contiguous", "channels_last")
    contenders |= {f"torch {each}": theirs(frozen, content, style, settings["adam"], each) for each in layouts}
    turns: dict[str, list[list[float]]] = {name: [] for name in contenders}
    for number in range(args.rounds + 1):
        for name, turn in contenders.items():
            seconds = turn()
            if number:  # the first round compiles
                turns[name].append(seconds)
    ms = {name: 1000 * statistics.median(itertools.chain(*one)) for name, one in turns.items()}
    best = min(layouts, key=lambda each: ms[f"torch {each}"])

    def ratios(name: str, other: str) -> list[float]:
        pairs = zip(turns[name], turns[other], strict=True)
        return [statistics.median(a) / statistics.median(b) for a, b in pairs]

    report: dict[str, Any] = {"size": args.size, "steps": args.steps, "rounds": args.rounds, "ms": ms}
    report["device"] = jax.devices()[0].device_kind
    pairs = (("adam", f"torch {best}"), ("lbfgs", "gradient"), ("adam", "gradient"), ("gradient", "forward"))
    for name, other in pairs:
        each = ratios(name, other)
        line = f"{name} over {other}"
        report[line] = {"median": statistics.median(each), "least": min(each), "most": max(each)}
        print(f"{line}: {statistics.median(each):.2f} ({min(each):.2f} to {max(each):.2f})")
    print(json.dumps(ms))
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "style_vs_torch.json", report)


def main() -> None:
    parser = argparse.ArgumentParser(description="A step of style transfer in jaxcnn and in PyTorch.")
    parser.add_argument("--size", type=int, default=256, help="pixels of a side (default: 256)")
    parser.add_argument("--steps", type=int, default=10, help="of a turn (default: 10)")
    parser.add_argument("--rounds", type=int, default=5, help="turns of each contender (default: 5)")
    parser.add_argument("--width", type=int, default=64, help="of the network's first stage (default: 64)")
    run_program(parser, run, smoke={"size": 48, "steps": 4, "rounds": 1, "width": 4})


if __name__ == "__main__":
    main()
