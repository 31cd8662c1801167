"""Our training step beside PyTorch's on one GPU, and what else only a GPU can show.

    python experiments/benchmarks/gpu_vs_torch.py                             ResNet-18, images/s and the ratio
    python experiments/benchmarks/gpu_vs_torch.py --model cifar_resnet20      ms per step of our small step
    python experiments/benchmarks/gpu_vs_torch.py --digests                   twice the same seed, the same bits?

Needs     jax with CUDA; for the comparison torch and torchvision with CUDA
ResNet-18 224 px, batch 256, bfloat16 compute with float32 parameters, random images that lie on the device, SGD with
          momentum 0.9. PyTorch: torchvision's model, channels_last, autocast to bfloat16, as it is and compiled.
          In every round each contender has one turn of about three seconds in this process, compilation excluded;
          images/s are medians over rounds, the ratio is the median of the rounds' ratios to PyTorch's faster form
ResNet-20 32 px, batch 128, float32, at JAX's default precision (TF32 where the GPU has it) and at the highest, 1 and
          50 steps in one call, drawing the batches included
Digests   two processes train ResNet-20 on the embedded digits for 200 steps with --train.deterministic, each with
          a compile cache of its own; exit status 1 if their `state_sha256` differ

    device     jaxcnn images/s     torch images/s     torch compiled images/s     ratio
    measured: see README
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from cpu_vs_torch import SEED, OurStep, Run, alternate, environment, random_batch, ratio_to_best, sgd

from jaxcnn import models, parallel, platform
from jaxcnn.data.loader import train_feed
from jaxcnn.train import create_state, make_train_step
from jaxcnn.train.step import scan_steps


class TorchResNet18:
    """torchvision's ResNet-18 with the same step: channels_last, autocast to bfloat16."""

    def __init__(self, batch: Mapping[str, np.ndarray], *, compiled: bool):
        import torch
        import torchvision

        torch.backends.cudnn.benchmark = True
        self.torch, layout = torch, torch.channels_last
        net = torchvision.models.resnet18().cuda().to(memory_format=layout)
        self.parameters = sum(p.numel() for p in net.parameters())
        self.net = torch.compile(net) if compiled else net
        self.image = torch.tensor(batch["image"].transpose(0, 3, 1, 2).copy()).cuda().contiguous(memory_format=layout)
        self.label = torch.tensor(batch["label"]).long().cuda()
        self.sgd = torch.optim.SGD(net.parameters(), lr=0.01, momentum=0.9)
        self.loss = torch.nn.CrossEntropyLoss()

    def __call__(self, steps: int) -> None:
        for _ in range(steps):
            self.sgd.zero_grad(set_to_none=True)
            with self.torch.autocast("cuda", dtype=self.torch.bfloat16):
                loss = self.loss(self.net(self.image), self.label)
            loss.backward()
            self.sgd.step()
        self.torch.cuda.synchronize()


def no_torch() -> str | None:
    """Why PyTorch cannot be compared with here, or None."""
    for name in ("torch", "torchvision"):
        if importlib.util.find_spec(name) is None:
            return f"{name} is not installed"
    import torch

    return None if torch.cuda.is_available() else "PyTorch sees no GPU"


def compare_resnet18(*, batch_size: int, pixels: int, rounds: int, seconds: float) -> dict[str, Any]:
    """images/s of each contender, and ours divided by PyTorch's faster one."""
    batch = random_batch((pixels, pixels, 3), examples=batch_size, classes=1000)
    ours = OurStep(models.create("resnet18", dtype=jnp.bfloat16), batch)
    contenders: dict[str, Any] = {"jaxcnn": ours}
    if reason := no_torch():
        print(f"{reason}: only our own step is timed", file=sys.stderr)
    else:
        contenders["torch"] = TorchResNet18(batch, compiled=False)
        try:
            compiled = TorchResNet18(batch, compiled=True)
            compiled(1)
            contenders["torch compiled"] = compiled
        except Exception as error:  # it needs a C compiler and Triton, and fails in as many ways
            print(f"torch.compile failed, only eager PyTorch is timed: {error}", file=sys.stderr)
    for label, contender in contenders.items():
        assert contender.parameters == ours.parameters, f"{label}: {contender.parameters} != {ours.parameters}"
    times = alternate(contenders, rounds=rounds, seconds=seconds)
    result = ratio_to_best(times)
    rates = {name: sorted(1e3 * batch_size / ms for ms in t) for name, t in times.items()}
    for name, rate in rates.items():
        print(f"  {name:16}{statistics.median(rate):10.0f} images/s  ({rate[0]:.0f} .. {rate[-1]:.0f})")
    speed = statistics.median(1 / r for r in result["ratios"]) if "ratios" in result else None
    print(f"  ratio to {result['best']}: {speed:.3f}" if speed else "  no ratio")
    medians = {name: statistics.median(rate) for name, rate in rates.items()}
    return {"batch": batch_size, "pixels": pixels, "images_per_second": medians, "ratio": speed}


def time_resnet20(*, batch_size: int, rounds: int, seconds: float, many: int) -> dict[str, float]:
    """ms per step at default and highest precision, with one step and `many` steps in a call."""
    result = {}
    for precision in ("default", "highest"):
        with jax.default_matmul_precision(precision):
            runs = {str(n): feeding_run(n, batch_size=batch_size) for n in (1, many)}
            times = alternate(runs, rounds=rounds, seconds=seconds)
        for n, per_call in times.items():
            name = f"{precision} precision, steps per call {n}"
            result[name] = statistics.median(per_call) / int(n)
            print(f"  {name:40}{result[name]:8.3f} ms per step")
    return result


def feeding_run(steps_per_call: int, *, batch_size: int) -> Run:
    """Calls of so many ResNet-20 steps, fed as the trainer feeds them."""
    module, mesh = models.create("cifar_resnet20"), parallel.make_mesh(jax.devices()[:1])
    shape = models.MODELS["cifar_resnet20"].input
    data = random_batch(shape, examples=(steps_per_call + 1) * batch_size, classes=10)
    feed = train_feed(data["image"], data["label"], batch_size=batch_size, seed=0, mesh=mesh)
    step = make_train_step(module, optimizer=sgd(), mesh=mesh)
    many = scan_steps(step) if steps_per_call > 1 else step
    sample = jax.ShapeDtypeStruct((1, *shape), jnp.float32)
    state, at = create_state(module, optimizer=sgd(), sample=sample, mesh=mesh), 0

    def run(calls: int) -> None:
        nonlocal state, at
        for _ in range(calls):
            state, _ = many(state, feed(at, steps=steps_per_call), SEED)
            at += steps_per_call
        jax.block_until_ready(state)

    return run


def digests(*, steps: int) -> list[str]:
    """`state_sha256` of two deterministic runs of the same seed, each in a process of its own."""
    found = []
    for run in ("first", "second"):
        with tempfile.TemporaryDirectory() as directory:
            subprocess.run(
                [
                    *(sys.executable, "-m", "jaxcnn", "train", "--quiet", "--runs-dir", directory, "--run", run),
                    *("--name", "digests", "--model.name", "cifar_resnet20", "--data.name", "digits"),
                    *("--train.steps", str(steps), "--train.deterministic"),
                ],
                cwd=Path(__file__).parents[2],
                env={**os.environ, "JAX_COMPILATION_CACHE_DIR": f"{directory}/cache"},
                check=True,
            )
            summary = json.loads((Path(directory) / "digests" / run / "summary.json").read_text())
        found.append(summary["state_sha256"])
        print(f"  {run:8}{found[-1]}  accuracy {summary['test_accuracy']}")
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description="Our training step beside PyTorch's on one GPU.")
    parser.add_argument("--model", choices=("resnet18", "cifar_resnet20"), default="resnet18")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--digests", action="store_true", help="compare the bits of two runs instead of timing")
    parser.add_argument("--smoke", action="store_true", help="tiny, on any device: only to see that everything runs")
    args = parser.parse_args()
    if args.digests:  # before this process takes a device
        first, second = digests(steps=2 if args.smoke else 200)
        print("the same bits" if first == second else "different bits")
        return int(first != second)
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # PyTorch needs its share
    platform.setup()
    if jax.default_backend() != "gpu" and not args.smoke:
        print("JAX sees no GPU: pip install 'jax[cuda13]', or --smoke to try the script", file=sys.stderr)
        return 2
    about = {**environment("torchvision"), "device": jax.devices()[0].device_kind}
    print(", ".join(f"{key} {value}" for key, value in about.items()))
    rounds, seconds = (1, 0.0) if args.smoke else (args.rounds, 3.0)
    if args.model == "resnet18":
        batch_size, pixels = (2, 32) if args.smoke else (256, 224)
        result = compare_resnet18(batch_size=batch_size, pixels=pixels, rounds=rounds, seconds=seconds)
    else:
        batch_size, many = (2, 2) if args.smoke else (128, 50)
        result = {"ms_per_step": time_resnet20(batch_size=batch_size, rounds=rounds, seconds=seconds, many=many)}
    print(json.dumps({"model": args.model, **result, **about}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
