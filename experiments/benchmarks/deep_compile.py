"""Seconds to compile the training step of very deep networks, and the memory it works in.

    python experiments/benchmarks/deep_compile.py [--smoke] [--models NAME...] [--batch-size 8]

Each row is one training step as `fit` compiles it (SGD with momentum and weight decay, BatchNorm, metrics, guard
against non-finite updates), without the compile cache: seconds to make the state, to trace and lower, to compile,
temporary memory of the program as XLA states it, and the median of a few steps. Stages of more than 36 blocks are
compiled as a loop; `scan` and `remat` rows force or forbid it.

Measured on 2 x86-64 cores, jax 0.10.2, batch 8:

    network                    switches   state  lowering  compilation  temporaries  step
    ResNet-110                             6.0 s    2.8 s        5.7 s      142 MiB  0.13 s
    ResNet-110                 remat       5.8 s    1.6 s        4.3 s       54 MiB  0.19 s
    pre-activation ResNet-1001            30.8 s    9.5 s       43.1 s    1,449 MiB  1.59 s
    DenseNet-BC(190, 40)                  44.8 s   11.4 s      106.8 s    5,431 MiB  9.15 s

ResNet-1001 is a program over 8,000 arrays. Its compilation, 97 s at first, fell to 43 s (other runs: 49, 51, 53) when
the slices that part a stage's stacked gradients became one kernel (`layers/stacks.py`), and when the guard's choice
between the new and the old state went into branches: XLA's time grows with the square of the operations in one
sequence. Unrolled it takes 249 s.
"""

import dataclasses
import statistics
import time
from dataclasses import dataclass

import tyro

from jaxcnn import platform


@dataclass(frozen=True)
class Flags:
    models: tuple[str, ...] = ("cifar_resnet110", "cifar_resnetv2_1001", "cifar_densenet_bc_190_k40")
    overrides: dict[str, bool] = dataclasses.field(default_factory=dict)
    """Switches of the family, such as `scan True` or `remat True`."""
    batch_size: int = 8
    steps: int = 3
    smoke: bool = False
    """One small network."""


def measure(name: str, overrides: dict[str, bool], *, batch_size: int, steps: int) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np

    from jaxcnn import optim, parallel
    from jaxcnn.models import create
    from jaxcnn.train import create_state, make_train_step

    module = create(name, **overrides)
    optimizer = optim.make_optimizer("sgd", schedule=lambda step: 0.1, weight_decay=1e-4, momentum=0.9)
    mesh = parallel.make_mesh()
    with jax.set_mesh(mesh):
        begin = time.perf_counter()
        sample = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
        state = jax.block_until_ready(create_state(module, optimizer=optimizer, sample=sample, mesh=mesh))
        made = time.perf_counter() - begin
        rng = np.random.default_rng(0)
        batch = {
            "image": jnp.asarray(rng.normal(size=(batch_size, 32, 32, 3)), jnp.float32),
            "label": jnp.asarray(rng.integers(0, 10, batch_size), jnp.int32),
        }
        step = make_train_step(module, optimizer=optimizer, mesh=mesh, prepare=lambda batch, key: batch)
        seed = jnp.uint32(0)
        begin = time.perf_counter()
        lowered = step.lower(state, batch, seed)
        traced = time.perf_counter() - begin
        begin = time.perf_counter()
        compiled = lowered.compile()
        built = time.perf_counter() - begin
        seconds = []
        for _ in range(steps + 1):
            begin = time.perf_counter()
            state, _ = jax.block_until_ready(compiled(state, batch, seed))
            seconds.append(time.perf_counter() - begin)
    memory = compiled.memory_analysis().temp_size_in_bytes / 2**20
    switches = " ".join(f"{key}={value}" for key, value in overrides.items())
    print(
        f"{name:28}{switches:24}state {made:6.1f} s, lowering {traced:5.1f} s, compilation {built:6.1f} s,"
        f" temporaries {memory:7,.0f} MiB, step {statistics.median(seconds[1:]):6.2f} s",
        flush=True,
    )


def main() -> None:
    flags = tyro.cli(Flags, description=__doc__)
    platform.setup()
    import jax

    jax.config.update("jax_enable_compilation_cache", False)
    names = ("cifar_resnet20",) if flags.smoke else flags.models
    for name in names:
        measure(name, flags.overrides, batch_size=flags.batch_size, steps=flags.steps)


if __name__ == "__main__":
    main()
