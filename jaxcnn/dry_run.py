"""What a run would take, before a job is queued: steps, checkpoints, memory. Compiles the step and runs nothing."""

import math
import shutil
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxcnn import build, parallel
from jaxcnn.config import Experiment
from jaxcnn.data.loader import batch_shapes
from jaxcnn.data.preprocess import Preprocessing
from jaxcnn.train.state import state_shapes
from jaxcnn.train.step import make_train_step


def plan(
    experiment: Experiment, made: build.Parts, data: build.Splits, preprocessing: Preprocessing, *, run: Path
) -> dict[str, Any]:
    """Counts and bytes of the run that would be made at `run`.

    `memory` is of one device, as XLA planned the compiled step: `state`, `batch` (with a training set that lives on the
    devices), `temporary` (activations and workspace) and their sum `peak`; without the last two where the step is not
    one program (pmap, elastic). `limit` is what the device has, where it says so.
    """
    settings, mesh = experiment.train, parallel.make_mesh()
    options = build.fit_options(experiment, made, preprocessing, data)
    names = ("optimizer", "loss_fn", "prepare", "ema_decay", "accumulate", "shards", "fsdp", "parallel_mode")
    step = make_train_step(made.net, mesh=mesh, **{name: options[name] for name in names})
    dtype = jnp.float64 if experiment.model.dtype == "float64" else jnp.float32
    sample = jax.ShapeDtypeStruct((1, *data.train.images.shape[1:]), dtype)
    state = state_shapes(made.net, optimizer=made.optimizer, sample=sample, ema=settings.ema_decay is not None)
    batch_size = experiment.data.batch_size
    shapes = batch_shapes(data.train.images, data.train.labels, batch_size=batch_size, mesh=mesh)
    layout = parallel.Layout(mesh, settings.fsdp)
    placed = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, layout.of(state))
    memory: dict[str, int] = {"state": _bytes(placed), "batch": _bytes(shapes)}
    began = time.monotonic()
    if hasattr(step, "lower"):
        with jax.set_mesh(mesh):
            planned = step.lower(placed, shapes, np.uint32(0)).compile().memory_analysis()  # type: ignore[attr-defined]
        kept = planned.argument_size_in_bytes + planned.output_size_in_bytes - planned.alias_size_in_bytes
        memory |= {"temporary": planned.temp_size_in_bytes, "peak": kept + planned.temp_size_in_bytes}
    stats = jax.local_devices()[0].memory_stats() or {}
    if "bytes_limit" in stats:
        memory["limit"] = stats["bytes_limit"]
    return {
        "run": str(run),
        "parameters": made.parameters,
        "steps": made.steps,
        "epochs": made.steps * batch_size / len(data.train),
        "devices": jax.device_count(),
        "batch_per_device": batch_size // jax.device_count(),
        "evaluations": made.steps // settings.eval_every if settings.eval_every else 1,
        "checkpoints": -(-made.steps // settings.checkpoint_every),
        "checkpoint_bytes": _bytes(state),
        "disk_needed": _bytes(state) * (settings.keep_latest + settings.keep_best + 1),
        "disk_free": shutil.disk_usage(next(p for p in (run, *run.absolute().parents) if p.exists())).free,
        "memory": memory,
        "compile_seconds": round(time.monotonic() - began, 1),
    }


def show(found: dict[str, Any]) -> str:
    """The plan as lines for people."""

    def size(n: int) -> str:
        return f"{n / 2**20:,.1f} MiB"

    memory = ", ".join(f"{name} {size(n)}" for name, n in found["memory"].items())
    return "\n".join(
        [
            f"would make {found['run']}: {found['parameters']:,} parameters",
            f"steps        {found['steps']:,} ({found['epochs']:.1f} epochs),"
            f" {found['batch_per_device']} images on each of {found['devices']} devices",
            f"evaluations  {found['evaluations']:,}",
            f"checkpoints  {found['checkpoints']:,} of {size(found['checkpoint_bytes'])}; those that are kept need"
            f" {size(found['disk_needed'])} of {size(found['disk_free'])} free",
            f"memory       {memory} on each device",
            f"compiling    {found['compile_seconds']} s",
        ]
    )


def _bytes(tree: Any) -> int:
    """Of whole arrays, or of one device's part of those that have a sharding."""

    def size(leaf: jax.ShapeDtypeStruct) -> int:
        shape = leaf.shape if leaf.sharding is None else leaf.sharding.shard_shape(leaf.shape)
        return math.prod(shape) * leaf.dtype.itemsize

    return sum(map(size, jax.tree.leaves(tree)))
