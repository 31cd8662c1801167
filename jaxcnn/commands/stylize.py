"""`jaxcnn stylize`: a picture with the content of one image in the style of others, its log, its frames."""

import dataclasses
import hashlib
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any

import tyro

from jaxcnn.errors import InputError, TrainingFailed, unknown
from jaxcnn.files import write_json
from jaxcnn.signals import stop_on_signals
from jaxcnn.style.settings import Settings, parse_weighted


@dataclass(frozen=True)
class Stylize:
    """Neural style transfer (Gatys, Ecker & Bethge 2016): optimises the pixels of a picture so that a frozen VGG sees
    the content of one image and the style of others. Without --weights the network is random, for textures only."""

    content: Annotated[Path | None, tyro.conf.arg(metavar="FILE")] = None
    """JPEG or PNG, transparency is dropped; by default a photograph that comes with scikit-learn."""
    style: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="[WEIGHT:]FILE")] = ()
    """The same; several are blended, by their weights; by default another photograph."""
    mask: Annotated[tyro.conf.UseAppendAction[tuple[Path, ...]], tyro.conf.arg(metavar="FILE")] = ()
    """Grey image, white where the style counts: one for each --style, in their order."""
    output: Annotated[Path, tyro.conf.arg(metavar="FILE")] = Path("stylized.png")
    """Picture to write, .png or .jpg; beside it STEM.json, every loss, and STEM.losses.png, their plot."""
    weights: Annotated[str | None, tyro.conf.arg(metavar="NAME|FILE")] = None
    """VGG as .safetensors, .npz or Keras .h5, or a NAME of `jaxcnn weights list`; by default random."""
    pooling: str = "max"
    """max, as the weights were trained, or avg, as Gatys et al. prefer."""
    settings: Annotated[Settings, tyro.conf.arg(name="")] = field(default_factory=Settings)
    save_every: int = 0
    """Write a frame, STEM-STEP.png, every so many steps; 0: none."""
    quiet: bool = False
    """Say nothing but errors and the result."""


def main(args: Sequence[str]) -> int:
    flags = tyro.cli(Stylize, args=list(args), prog="jaxcnn stylize", config=(tyro.conf.FlagCreatePairsOff,))
    if flags.save_every < 0:
        raise InputError(f"--save-every {flags.save_every}: expected 0 or more steps")
    if flags.mask and len(flags.mask) != len(flags.style):
        raise InputError(f"{len(flags.mask)} --mask for {len(flags.style)} --style: give one for each, in their order")
    with stop_on_signals() as stop:
        from jaxcnn import platform

        platform.setup()
        return _run(flags, stop)


def _run(flags: Stylize, stop: Any) -> int:
    from jaxcnn.checkpoint import Checkpoints
    from jaxcnn.style import pictures, plot
    from jaxcnn.style.transfer import stylize

    begun = time.monotonic()
    inputs = _Inputs.read(flags)
    unfinished = flags.output.with_name(f"{flags.output.stem}.unfinished")
    show = _Shown(flags)
    checkpoints = Checkpoints(unfinished / "checkpoints", keep_latest=1, keep_best=0, report=show.progress.warn)
    try:
        result = stylize(
            inputs.content,
            inputs.styles,
            network=inputs.network,
            settings=flags.settings,
            start=inputs.start,
            callback=show,
            checkpoints=checkpoints,
            stop=stop,
        )
    finally:
        show.close()
    pictures.write(flags.output, result.pictures[0])
    described = {
        "losses": result.losses,
        "settings": {**dataclasses.asdict(flags.settings), "pooling": flags.pooling, "style": flags.style},
        "pixels": "RGB in 0..1, not clipped while they are optimised",
        "network": inputs.network.source,
        "sha256": inputs.digests,
        "picture": list(result.pictures[0].shape),
        "stopped": result.stopped,
        "seconds": round(time.monotonic() - begun, 2),
    }
    write_json(_beside(flags.output, ".json"), described)
    plot.losses(result.losses, _beside(flags.output, ".losses.png"))
    shutil.rmtree(unfinished, ignore_errors=True)
    return _conclude(flags, result)


def _beside(output: Path, ending: str) -> Path:
    return output.with_name(f"{output.stem}{ending}")


@dataclass(frozen=True)
class _Inputs:
    content: Any
    styles: list[Any]
    start: Any
    network: Any
    digests: dict[str, str]
    """SHA-256 by what it is and where it lies: of files, and of the bytes of embedded photographs."""

    @classmethod
    def read(cls, flags: Stylize) -> "_Inputs":
        from jaxcnn.data.images import read_image
        from jaxcnn.style import pictures
        from jaxcnn.style.transfer import Style

        weighted = [parse_weighted(text) for text in flags.style]
        init = None if flags.settings.init in pictures.STARTS else Path(flags.settings.init)
        if init and not init.is_file():
            raise unknown("init", flags.settings.init, (*pictures.STARTS, "an image file"))
        _check_output(flags.output, [flags.content, init, *flags.mask, *(Path(path) for _, path in weighted)])
        digests: dict[str, str] = {}

        def picture(path: Path, what: str, channels: int = 3) -> Any:
            image = read_image(path, channels=channels)
            digests[f"{what} {path}"] = _sha256(path)
            return image

        photographs = {} if flags.content and weighted else _photographs(flags, digests)
        content = picture(flags.content, "content") if flags.content else photographs["content"]
        masks: list[Any] = [None] * len(weighted)
        for i, path in enumerate(flags.mask):
            masks[i] = picture(path, "mask", 1)[..., 0] / 255
            if not masks[i].any():
                raise InputError(f"mask {path} is black everywhere: the style would count nowhere")
        styles = [
            Style(picture(Path(path), "style"), weight, mask)
            for (weight, path), mask in zip(weighted, masks, strict=True)
        ]
        start = picture(init, "init") if init else None
        return cls(content, styles or [Style(photographs["style"])], start, _network(flags, digests), digests)


def _check_output(output: Path, inputs: Sequence[Path | None]) -> None:
    from jaxcnn.style import pictures

    pictures.check_output(output)
    written = {path.resolve() for path in (output, _beside(output, ".json"), _beside(output, ".losses.png"))}
    for path in inputs:
        if path and path.resolve() in written:
            raise InputError(f"{path} is an input and would be written over: give another --output")


def _network(flags: Stylize, digests: dict[str, str]) -> Any:
    from jaxcnn.pretrained import store
    from jaxcnn.pretrained.index import INDEX
    from jaxcnn.style import network

    if flags.weights:
        if flags.weights not in INDEX and not Path(flags.weights).exists():
            vggs = [name for name, entry in INDEX.items() if entry.model in network.CANDIDATES]
            raise unknown("weights", flags.weights, (*vggs, "a file"))
        frozen = network.load(flags.weights, pooling=flags.pooling)
        held = store.held(flags.weights) if flags.weights in INDEX else Path(flags.weights)
        digests[f"weights {flags.weights}"] = _sha256(held)
        return frozen
    frozen = network.random(pooling=flags.pooling)
    _note(flags, f"without --weights the network is {frozen.source}: {network.RANDOM_NOTE}")
    return frozen


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _note(flags: Stylize, text: str) -> None:
    if not flags.quiet:
        print(f"note: {text}", file=sys.stderr, flush=True)


def _photographs(flags: Stylize, digests: dict[str, str]) -> dict[str, Any]:
    """Those that stand for the images that were not given."""
    from jaxcnn.style import pictures

    found = {}
    for what, name in (("content", "china.jpg"), ("style", "flower.jpg")):
        if not getattr(flags, what):
            found[what] = pictures.photograph(name)
            digests[f"{what} {name} of scikit-learn"] = hashlib.sha256(found[what].tobytes()).hexdigest()
            _note(flags, f"without --{what} it is {name}, a photograph that comes with scikit-learn")
    return found


class _Shown:
    """Progress, and frames on the way."""

    def __init__(self, flags: Stylize):
        from jaxcnn.train.log import Progress

        settings = flags.settings
        self.flags, self.begun, self.first = flags, time.monotonic(), 0
        self.progress = Progress(settings.steps * settings.scales, quiet=flags.quiet, what="stylizing")

    def __call__(self, step: Any) -> None:
        from jaxcnn.style import pictures

        number, every = step.line["step"], self.flags.save_every
        self.progress.step(number)
        if not self.first:  # what came before was compiling
            self.first, self.begun = step.done, time.monotonic()
        if step.done == self.first or number % 10 == 0 or step.done == step.total:
            fresh = step.done - self.first
            pace = (time.monotonic() - self.begun) / fresh if fresh else 0.0
            shown = {name: step.line[name] for name in ("step", "size", "total", "content", "style", "tv")}
            self.progress.line(shown, eta=pace * (step.total - step.done) if fresh else None)
        if every and number and number % every == 0:
            pictures.write(_beside(self.flags.output, f"-{number:06}.png"), step.pictures()[0])

    def close(self) -> None:
        self.progress.close()


def _conclude(flags: Stylize, result: Any) -> int:
    first, last = result.losses[0], result.losses[-1]
    if result.stopped == "not finite":
        raise TrainingFailed(
            f"the loss after step {last['step']} is not finite: {flags.output} is the last good picture;"
            " try a smaller --learning-rate or smaller weights"
        )
    print(f"{flags.output}: total {first['total']:.4g} -> {last['total']:.4g} ({result.stopped})")
    if flags.settings.init == "content" and last["step"] >= 100 and last["style"] > 0.5 * first["style"]:
        _note(
            flags,
            f"the style term fell by {1 - last['style'] / first['style']:.0%} only. It grows with the fourth"
            " power of the features' scale, the content term with the second: networks of small features, as"
            " torchvision's or a normalised one, need a larger --style-weight",
        )
    return 0
