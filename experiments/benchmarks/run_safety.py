"""What safety costs: the elastic level beside the default one, and a checkpoint beside the steps between two.

    python experiments/benchmarks/run_safety.py [--steps 10] [--rounds 5] [--smoke]

Elastic    a training step of ResNet-20 at batch 128, default and with 8 virtual shards, in turns; one device
Stall      the time for which training stands still for a checkpoint of ResNet-18 at 64x64 pixels, momentum SGD, batch
           64, written beside the training and in its place, as a share of the 100 steps between two checkpoints
Claim      a checkpoint every 100 steps costs under 2 % of the time of a step
Measured   on 2 x86-64 cores, jax 0.10.2: default 238 ms, elastic 250 ms, ratio 1.02 (0.89 to 1.37, 5 rounds). Of
           ResNet-18 a step takes 2,900 ms; a checkpoint stops training for 7 ms (0.00 % of 100 steps) written beside
           it, for 558 ms (0.19 %) in its place
"""

import argparse
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import optax

from jaxcnn import models, parallel
from jaxcnn.checkpoint import Checkpoints
from jaxcnn.cli import run_program
from jaxcnn.data.loader import train_feed
from jaxcnn.files import write_json
from jaxcnn.train import create_state, make_train_step

SHARDS = 8
INTERVAL = 100


class Case:
    """A network in training on random images."""

    def __init__(self, name: str, size: tuple[int, int], *, batch_size: int, shards: int = 0):
        rng, mesh, optimizer = np.random.default_rng(0), parallel.make_mesh(), optax.sgd(0.1, momentum=0.9)
        images = rng.normal(size=(2 * batch_size, *size, 3)).astype(np.float32)
        self.feed = train_feed(
            images, rng.integers(0, 10, len(images)).astype(np.int32), batch_size=batch_size, seed=0, mesh=mesh
        )
        net, self.at, self.mesh = models.create(name, num_classes=10), 0, mesh
        self.one = make_train_step(net, optimizer=optimizer, shards=shards, mesh=mesh)
        with jax.set_mesh(mesh):
            sample = jax.ShapeDtypeStruct((1, *size, 3), np.float32)
            self.state = create_state(net, optimizer=optimizer, sample=sample, mesh=mesh)

    def step(self) -> None:
        with jax.set_mesh(self.mesh):
            self.state, totals = self.one(self.state, self.feed(self.at), np.uint32(0))
        jax.block_until_ready(totals)
        self.at += 1


def seconds(function: Callable[[], Any], calls: int) -> float:
    """The median over the calls."""
    taken = []
    for _ in range(calls):
        began = time.perf_counter()
        function()
        taken.append(time.perf_counter() - began)
    return float(np.median(taken))


def elastic(steps: int, rounds: int, batch_size: int) -> dict[str, Any]:
    cases = [Case("cifar_resnet20", (32, 32), batch_size=batch_size, shards=shards) for shards in (0, SHARDS)]
    for case in cases:
        case.step()
    taken = [[seconds(case.step, steps) for case in cases] for _ in range(rounds)]
    ratios = [b / a for a, b in taken]
    default, elastic = (1e3 * float(np.median([pair[i] for pair in taken])) for i in (0, 1))
    return {"default_ms": default, "elastic_ms": elastic, "ratio": float(np.median(ratios)), "ratios": sorted(ratios)}


def stall(steps: int, batch_size: int, size: int) -> dict[str, Any]:
    case = Case("resnet18", (size, size), batch_size=batch_size)
    case.step()
    found: dict[str, Any] = {"step_ms": 1e3 * seconds(case.step, steps)}
    for name, asynchronous in (("beside", True), ("in place", False)):
        with tempfile.TemporaryDirectory() as directory:
            checkpoints, stalls, slowed = Checkpoints(directory, asynchronous=asynchronous), [], []
            for _ in range(3):
                stalls.append(seconds(lambda c=checkpoints: c.save(case.at, case.state, loop={}), 1))
                slowed.append(seconds(case.step, 1))
                checkpoints.wait()
                case.step()
            found[name] = {
                "stall_ms": 1e3 * float(np.median(stalls)),
                "share": float(np.median(stalls)) / (INTERVAL * found["step_ms"] / 1e3),
                "next_step_ms": 1e3 * float(np.median(slowed)),
            }
    return found


def run(args: argparse.Namespace, output: Path) -> None:
    levels = elastic(args.steps, args.rounds, args.batch_size)
    print(
        f"ResNet-20, batch {args.batch_size}: default {levels['default_ms']:.0f} ms,"
        f" elastic {levels['elastic_ms']:.0f} ms, ratio {levels['ratio']:.2f}"
        f" ({levels['ratios'][0]:.2f} to {levels['ratios'][-1]:.2f})",
        flush=True,
    )
    saves = stall(args.steps, args.batch_size // 2, args.pixels)
    for name in ("beside", "in place"):
        one = saves[name]
        print(
            f"ResNet-18, {args.pixels} px: a step {saves['step_ms']:.0f} ms; a checkpoint written {name} stops"
            f" training for {one['stall_ms']:.0f} ms, {one['share']:.2%} of {INTERVAL} steps;"
            f" the step after it {one['next_step_ms']:.0f} ms",
            flush=True,
        )
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "run_safety.json", {"elastic": levels, "checkpoint": saves})
    print(f"wrote {output / 'run_safety.json'}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="What the elastic level and checkpoints cost.")
    parser.add_argument("--steps", type=int, default=10, help="steps of a round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--pixels", type=int, default=64)
    run_program(parser, run, smoke={"steps": 1, "rounds": 1, "batch_size": 16, "pixels": 32})
