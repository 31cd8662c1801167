"""`jaxcnn predict`: what is on pictures."""

import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import tyro

from jaxcnn.commands.source import Source
from jaxcnn.errors import InputError


@dataclass(frozen=True)
class Predict:
    """Names what is on pictures, by a trained run or published weights."""

    paths: tyro.conf.Positional[tuple[Path, ...]]
    """Run directory, unless --weights is given, and JPEG or PNG files."""
    source: tyro.conf.OmitArgPrefixes[Source] = dataclasses.field(default_factory=Source)
    top_k: int = 5
    json: bool = False


def main(args: Sequence[str]) -> int:
    flags = tyro.cli(Predict, args=list(args), prog="jaxcnn predict")
    run, images = (None, flags.paths) if flags.source.weights else (flags.paths[:1], flags.paths[1:])
    if not images:
        raise InputError("give at least one image: jaxcnn predict RUN IMAGE...")
    if flags.top_k < 1:
        raise InputError(f"--top-k {flags.top_k} must be at least 1")
    trained = flags.source.trained(run[0] if run else None)
    import jax
    import jax.numpy as jnp
    import numpy as np

    pictures = trained.preprocess(np.stack([trained.read(path) for path in images]))
    logits = jax.jit(lambda v, x: trained.network.apply(v, x, train=False))(trained.variables, pictures)
    shares = np.asarray(jax.nn.softmax(jnp.asarray(logits, jnp.float32)))
    classes = trained.classes or tuple(f"class {i}" for i in range(shares.shape[1]))
    for path, row in zip(images, shares, strict=True):
        order = np.argsort(-row, kind="stable")[: flags.top_k]
        best = [{"class": classes[i], "probability": round(float(row[i]), 6)} for i in order]
        if flags.json:
            print(json.dumps({"image": str(path), "top": best}))
        else:
            print(f"{path}: " + ", ".join(f"{one['class']} {one['probability']:.1%}" for one in best))
    return 0
