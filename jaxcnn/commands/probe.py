"""`jaxcnn probe`: the signal through a network, and its gradient back."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from jaxcnn.commands.network import Network
from jaxcnn.commands.output import show
from jaxcnn.errors import InputError


@dataclass(frozen=True)
class Probe:
    """Follows a signal through a network with fresh weights, and its gradient back: the moments of every layer, beside
    what theory predicts, as a table and a picture."""

    network: tyro.conf.OmitArgPrefixes[Network]
    init: str | None = None
    """Draws all kernels anew: an initialiser's NAME or NAME:OPTION=NUMBER, such as xavier_normal, normal:std=0.01."""
    activation: str | None = None
    """In place of the model's own, as --overrides act NAME."""
    batch: int = 16
    """Examples of N(0, 1) that go through."""
    seed: int = 0
    seeds: int = 1
    """Draws of the weights to average over."""
    evaluation: bool = False
    """With running statistics and without dropout, in place of training."""
    output: Path | None = None
    """The picture; by default MODEL.signal.png."""
    json: bool = False


def main(args: Sequence[str]) -> int:
    flags = tyro.cli(Probe, args=list(args), prog="jaxcnn probe")
    for name in ("batch", "seeds"):
        if getattr(flags, name) < 1:
            raise InputError(f"--{name} {getattr(flags, name)} must be at least 1")
    net, size = flags.network.created(**({"act": flags.activation} if flags.activation else {}))
    init = _initializer(flags.init) if flags.init else None
    import numpy as np

    from jaxcnn.analysis import signal_report
    from jaxcnn.analysis.signal import probe

    x = np.random.default_rng(flags.seed).standard_normal((flags.batch, *size)).astype(np.float32)
    found = probe(net, x, init=init, seed=flags.seed, seeds=flags.seeds, train=not flags.evaluation)
    output = flags.output or Path(f"{flags.network.model.rsplit(':')[-1]}.signal.png")
    signal_report.plot(found, output, title=_title(flags))
    if flags.json:
        print(json.dumps({**found.to_json(), "picture": str(output)}))
        return 0
    show(signal_report.table(found))
    print(f"{found.verdict}\n{output}")
    return 0


def _title(flags: Probe) -> str:
    network = flags.network
    own = [f"{key} {value}" for key, value in network.overrides.items()]
    given = [f"{name} {value}" for name, value in (("init", flags.init), ("act", flags.activation)) if value]
    return ", ".join((network.model, *own, *given))


def _initializer(text: str) -> Any:
    """NAME, or NAME:OPTION=NUMBER,OPTION=NUMBER."""
    from jaxcnn.layers.init import initializer

    name, _, options = text.partition(":")
    pairs = [option.partition("=") for option in options.split(",") if option]
    try:
        return initializer(name, **{key: float(value) for key, _, value in pairs})
    except (ValueError, TypeError) as error:
        raise InputError(
            f"--init {text}: {error}; expected NAME or NAME:OPTION=NUMBER, such as normal:std=0.01"
        ) from None
