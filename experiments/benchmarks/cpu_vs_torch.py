"""Our training step beside PyTorch's on CPU, in one process, in alternating turns.

    python experiments/benchmarks/cpu_vs_torch.py                             both models, some minutes
    python experiments/benchmarks/cpu_vs_torch.py --model cifar_resnet20 --profile

Needs     pip install torch==2.13.0, and nothing else running: with the cores shared, PyTorch's step of LeNet-5 was
          ten times slower and ours was not. The script says how busy other processes were
Step      batch 128, float32, random images that lie on the device, no augmentation, SGD with momentum 0.9.
          Ours is the trainer's own step: accuracy, top-5 and the non-finite guard included. PyTorch: the same
          model, in its default and its channels_last memory format, with one thread for each core
Method    in every round each contender has one turn of about a second after a step that is not counted. ms are medians
          over rounds; the ratio is the median of the rounds' ratios to PyTorch's better format
Loop      time per step of `fit` between two lines of its log, against the bare step on batches of the same feed.
          Nothing is evaluated or saved meanwhile; drawing the batch, logging and counting are the overhead
Expected  at most 2.0 (lenet5) and 2.2 (cifar_resnet20) times PyTorch's time; overhead under 5 %

    model            ours ms   torch ms   torch channels_last ms   ratio   loop overhead
    measured: see README
"""

import argparse
import glob
import importlib.metadata
import json
import math
import os
import re
import statistics
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax

from jaxcnn import losses, models, optim, parallel, platform
from jaxcnn.data.loader import train_feed
from jaxcnn.train import create_state, fit, make_train_step

Run = Callable[[int], None]
"""Takes so many training steps and returns when they are done."""

NAMES = ("lenet5", "cifar_resnet20")
SEED = np.uint32(0)
CLASSIFY = losses.classification()


def sgd() -> optax.GradientTransformation:
    """Momentum 0.9 and a rate at which random labels do not diverge."""
    schedule = optim.make_schedule("constant", learning_rate=0.01, steps=1)
    return optim.make_optimizer("sgd", schedule=schedule, momentum=0.9)


def random_batch(shape: tuple[int, ...], *, examples: int, classes: int) -> dict[str, np.ndarray]:
    """`image` (examples, h, w, c) float32 and `label` (examples,) int32."""
    rng = np.random.default_rng(0)
    image = rng.standard_normal((examples, *shape), np.float32)
    return {"image": image, "label": rng.integers(0, classes, examples, np.int32)}


class OurStep:
    """The trainer's step on one batch that lies on the first device."""

    def __init__(self, module: nn.Module, batch: Mapping[str, np.ndarray]):
        self.module, mesh = module, parallel.make_mesh(jax.devices()[:1])
        sample = jax.ShapeDtypeStruct((1, *batch["image"].shape[1:]), np.float32)
        self.batch = jax.device_put(dict(batch), parallel.by_example(mesh))
        self.step = make_train_step(module, optimizer=sgd(), mesh=mesh)
        self.state = create_state(module, optimizer=sgd(), sample=sample, mesh=mesh)
        self.parameters = sum(leaf.size for leaf in jax.tree.leaves(self.state.params))

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            self.state, _ = self.step(self.state, self.batch, SEED)
        jax.block_until_ready(self.state)


def torch_lenet5() -> Any:
    from torch import nn

    return nn.Sequential(
        *(nn.Conv2d(1, 6, 5, padding=2), nn.ReLU(inplace=True), nn.MaxPool2d(2)),
        *(nn.Conv2d(6, 16, 5), nn.ReLU(inplace=True), nn.MaxPool2d(2), nn.Flatten()),
        *(nn.Linear(400, 120), nn.ReLU(inplace=True)),
        *(nn.Linear(120, 84), nn.ReLU(inplace=True)),
        nn.Linear(84, 10),
    )


def torch_cifar_resnet20() -> Any:
    from torch import nn

    class Block(nn.Module):
        def __init__(self, inputs: int, outputs: int, stride: int):
            super().__init__()
            self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
            self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
            self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
            self.stride, self.new = stride, outputs - inputs

        def forward(self, x: Any) -> Any:
            y = self.bn2(self.conv2(self.bn1(self.conv1(x)).relu_()))
            if self.new:  # option A: every second pixel, new channels zero
                side = self.new // 2
                x = nn.functional.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, side, self.new - side))
            return (y + x).relu_()

    layers: list[nn.Module] = [nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True)]
    inputs = 16
    for outputs in (16, 32, 64):
        for _ in range(3):
            layers.append(Block(inputs, outputs, 1 if inputs == outputs else 2))
            inputs = outputs
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 10))


TORCH_MODELS: dict[str, Callable[[], Any]] = {"lenet5": torch_lenet5, "cifar_resnet20": torch_cifar_resnet20}


class TorchStep:
    """The same step in PyTorch, the batch in `memory_format`."""

    def __init__(self, name: str, batch: Mapping[str, np.ndarray], memory_format: str):
        import torch

        layout = getattr(torch, memory_format)
        self.net = TORCH_MODELS[name]().to(memory_format=layout)
        self.image = torch.tensor(batch["image"].transpose(0, 3, 1, 2).copy()).contiguous(memory_format=layout)
        self.label = torch.tensor(batch["label"]).long()
        self.sgd = torch.optim.SGD(self.net.parameters(), lr=0.01, momentum=0.9)
        self.loss = torch.nn.CrossEntropyLoss()
        self.parameters = sum(p.numel() for p in self.net.parameters())

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            self.sgd.zero_grad(set_to_none=True)
            self.loss(self.net(self.image), self.label).backward()
            self.sgd.step()


def alternate(runs: Mapping[str, Run], *, rounds: int, seconds: float) -> dict[str, list[float]]:
    """ms per step of each contender in each round; a turn is one uncounted step, then about `seconds` of steps."""
    steps = {}
    for name, run in runs.items():
        run(2)  # compiled, caches warm
        began = time.perf_counter()
        run(1)
        steps[name] = max(1, math.ceil(seconds / (time.perf_counter() - began)))
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            run(1)  # the threads of the contender before are still spinning
            began = time.perf_counter()
            run(steps[name])
            times[name].append(1e3 * (time.perf_counter() - began) / steps[name])
    return times


def compare(name: str, *, batch_size: int, rounds: int, seconds: float, with_torch: bool) -> dict[str, Any]:
    """Times of one model, their ratio to PyTorch's, and its number of parameters."""
    batch = random_batch(models.MODELS[name].input, examples=batch_size, classes=10)
    ours = OurStep(models.create(name), batch)
    contenders: dict[str, Any] = {"jaxcnn": ours}
    if with_torch:
        contenders["torch"] = TorchStep(name, batch, "contiguous_format")
        contenders["torch channels_last"] = TorchStep(name, batch, "channels_last")
    for label, contender in contenders.items():
        assert contender.parameters == ours.parameters, f"{label}: {contender.parameters} != {ours.parameters}"
    began, busy = time.perf_counter(), seconds_of_others()
    times = alternate(contenders, rounds=rounds, seconds=seconds)
    others = (seconds_of_others() - busy) / (time.perf_counter() - began)
    return {"parameters": ours.parameters, "cores_of_others": others, **ratio_to_best(times)}


def seconds_of_others() -> float:
    """CPU seconds that other processes have used since the machine started; NaN where the system does not say."""
    try:
        user, nice, system, _, _, *rest = map(int, Path("/proc/stat").read_text().split("\n")[0].split()[1:9])
    except OSError:
        return math.nan
    return (user + nice + system + sum(rest)) / os.sysconf("SC_CLK_TCK") - time.process_time()


def ratio_to_best(times: Mapping[str, list[float]]) -> dict[str, Any]:
    """Medians and extremes in ms, and the ratio of the first contender to the fastest of the others."""
    spread = {k: {"median": statistics.median(t), "min": min(t), "max": max(t)} for k, t in times.items()}
    first, *others = times
    if not others:
        return {"ms": spread}
    best = min(others, key=lambda k: spread[k]["median"])
    ratios = [a / b for a, b in zip(times[first], times[best], strict=True)]
    return {"ms": spread, "best": best, "ratio": statistics.median(ratios), "ratios": ratios}


def loop_overhead(name: str, *, batch_size: int, rounds: int, window: int) -> dict[str, float]:
    """ms per step of `fit` and of the bare step, and what the loop adds to it, as a fraction."""
    data = random_batch(models.MODELS[name].input, examples=8 * batch_size, classes=10)
    mesh, module = parallel.make_mesh(jax.devices()[:1]), models.create(name)
    feed = train_feed(data["image"], data["label"], batch_size=batch_size, seed=0, mesh=mesh)
    bare = OurStep(module, {k: v[:batch_size] for k, v in data.items()})
    batches = [feed(i) for i in range(window)]

    def bare_window() -> float:
        began = time.perf_counter()
        for batch in batches:
            bare.state, _ = bare.step(bare.state, batch, SEED)
        jax.block_until_ready(bare.state)
        return 1e3 * (time.perf_counter() - began) / window

    def fit_window() -> float:
        steps = 4 * window
        with tempfile.TemporaryDirectory() as directory:
            result = fit(
                module,
                (data["image"], data["label"]),
                optimizer=sgd(),
                steps=steps,
                batch_size=batch_size,
                log_every=window,
                checkpoint_every=steps + 1,
                directory=directory,
                mesh=mesh,
                quiet=True,
            )
        ends = [line["seconds"] for line in result.history]  # the first line's window holds the compilation
        return 1e3 * statistics.median(np.diff(ends)) / window

    bare_window()  # compiled
    turns = [(fit_window(), statistics.median(bare_window() for _ in range(3))) for _ in range(rounds)]
    fitted, alone = (statistics.median(column) for column in zip(*turns, strict=True))
    return {"fit_ms": fitted, "step_ms": alone, "overhead": statistics.median(a / b - 1 for a, b in turns)}


def profile(name: str, *, batch_size: int, rounds: int, seconds: float) -> dict[str, Any]:
    """ms of the forward pass, of it with the backward pass, and of the whole step; ms of its kinds of operations."""
    ours = OurStep(models.create(name), random_batch(models.MODELS[name].input, examples=batch_size, classes=10))
    start = jax.tree.map(jax.numpy.copy, (ours.state.params, ours.state.collections))  # the step gives its own away

    def loss(params: Any, collections: Any) -> tuple[jax.Array, Any]:
        variables = {"params": params, **collections}
        outputs, moved = ours.module.apply(variables, ours.batch["image"], train=True, mutable=list(collections))
        return CLASSIFY(outputs, ours.batch).mean(), moved

    def repeated(compiled: Callable) -> Run:
        return lambda steps: jax.block_until_ready([compiled(*start) for _ in range(steps)][-1])

    runs = {
        "forward": repeated(jax.jit(loss)),
        "forward, backward": repeated(jax.jit(jax.value_and_grad(loss, has_aux=True))),
        "whole step": ours,
    }
    times = alternate(runs, rounds=rounds, seconds=seconds)
    return {"parts": {k: statistics.median(t) for k, t in times.items()}, "operations": operations(ours)}


def operations(ours: OurStep, *, steps: int = 3) -> dict[str, float]:
    """ms per step by primitive and direction, longest first, from a trace. Fusions count under their last operation."""
    text = ours.step.lower(ours.state, ours.batch, SEED).compile().as_text()  # type: ignore[attr-defined]
    origin = dict(re.findall(r'^\s*(?:ROOT )?%?([\w.-]+) = .*op_name="([^"]*)"', text, re.MULTILINE))
    with tempfile.TemporaryDirectory() as directory:
        with jax.profiler.trace(directory):
            ours(steps)
        path = glob.glob(f"{directory}/**/*.xplane.pb", recursive=True)[0]
        planes = list(jax.profiler.ProfileData.from_file(path).planes)
    total: dict[str, float] = defaultdict(float)
    for event in (event for plane in planes for line in plane.lines for event in line.events):
        operation = dict(event.stats).get("hlo_op")
        if operation is not None:
            source = origin.get(str(operation), re.sub(r"[.\d]+$", "", str(operation)))  # or XLA's own kind
            direction = " (backward)" if "transpose(" in source else ""
            total[source.split("/")[-1] + direction] += event.duration_ns / 1e6 / steps
    return dict(sorted(total.items(), key=lambda item: -item[1]))


def show(name: str, result: Mapping[str, Any]) -> None:
    print(f"\n{name}: {result['parameters']:,} parameters\n  {'ms per step':24}{'median':>10}{'min':>10}{'max':>10}")
    for label, ms in result["ms"].items():
        print(f"  {label:24}{ms['median']:10.2f}{ms['min']:10.2f}{ms['max']:10.2f}")
    if "ratio" in result:
        ratios = result["ratios"]
        print(f"  ratio to {result['best']}: {result['ratio']:.2f} ({min(ratios):.2f} .. {max(ratios):.2f})")
    if result["cores_of_others"] > 0.1:
        print(
            f"  WORTHLESS: other processes kept {result['cores_of_others']:.1f} cores busy meanwhile, and PyTorch's"
            " waiting threads suffer from that far more than ours: stop them and measure again"
        )
    loop = result["loop"]
    print(f"  loop: fit {loop['fit_ms']:.2f}, step {loop['step_ms']:.2f}: {loop['overhead']:+.1%} overhead")
    if "profile" in result:
        for part, ms in result["profile"]["parts"].items():
            print(f"  {part:40}{ms:8.2f} ms")
        operations = result["profile"]["operations"]
        for operation, ms in list(operations.items())[:15]:
            print(f"    {operation:38}{ms:8.2f} ms {ms / sum(operations.values()):6.1%}")


def environment(*packages: str) -> dict[str, Any]:
    """Versions (None: not installed), cores and flags that the figures belong to."""
    versions: dict[str, Any] = {}
    for name in ("jax", "jaxlib", "flax", "torch", *packages):
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            versions[name] = None
    return {**versions, "cores": cores(), "xla_flags": os.environ.get("XLA_FLAGS", "")}


def cores() -> int:
    """Those that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Our training step beside PyTorch's on CPU.")
    parser.add_argument("--model", choices=(*NAMES, "all"), default="all")
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path, help="also write every figure to this file")
    parser.add_argument("--profile", action="store_true", help="show where the time of our step goes")
    parser.add_argument("--smoke", action="store_true", help="tiny: only to see that everything runs")
    args = parser.parse_args()
    platform.setup()
    batch_size, rounds, seconds, window = (4, 2, 0.0, 2) if args.smoke else (args.batch, args.rounds, 1.0, 0)
    versions = environment()
    print(", ".join(f"{key} {value}" for key, value in versions.items()))
    if with_torch := versions["torch"] is not None:
        import torch

        torch.set_num_threads(versions["cores"])
    else:
        print("PyTorch is not installed: only our own step is timed (pip install torch==2.13.0)", file=sys.stderr)
    results = {}
    for name in NAMES if args.model == "all" else (args.model,):
        options: dict[str, Any] = {"batch_size": batch_size, "rounds": rounds, "seconds": seconds}
        result = compare(name, with_torch=with_torch, **options)
        # About two seconds between two lines of the log, as far as that is 10 to 50 steps.
        window = window or min(50, max(10, round(2e3 / result["ms"]["jaxcnn"]["median"])))
        result["loop"] = loop_overhead(name, batch_size=batch_size, rounds=min(rounds, 3), window=window)
        if args.profile:
            result["profile"] = profile(name, **options)
        results[name] = result
        show(name, result)
    if args.json:
        args.json.write_text(json.dumps({"environment": versions, "batch": batch_size, "models": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
