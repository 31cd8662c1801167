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

from jaxcnn.errors import InputError, TrainingFailed
from jaxcnn.files import write_json
from jaxcnn.signals import stop_on_signals
from jaxcnn.style.settings import Settings, parse_weighted


@dataclass(frozen=True)
class Stylize:
    """Neural style transfer (Gatys, Ecker & Bethge 2016): optimises the pixels of a picture so that a frozen VGG sees
    the content of one image and the style of others. Without --weights the network is random, for textures only."""

    content: Path | None = None
    """JPEG or PNG file; by default a photograph that comes with scikit-learn."""
    style: Annotated[tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="[WEIGHT:]FILE")] = ()
    """JPEG or PNG file; repeat it to blend several; by default another photograph."""
    mask: tyro.conf.UseAppendAction[tuple[Path, ...]] = ()
    """Grey image file, white where the style counts: one for each --style, in their order."""
    output: Path = Path("stylized.png")
    """Picture to write, .png or .jpg; the losses go to its stem with .json, their plot with .losses.png."""
    weights: str | None = None
    """VGG in a .safetensors, .npz or Keras .h5 file, or NAME.TAG of `jaxcnn weights list`, once fetched."""
    pooling: str = "max"
    """max, as the weights were trained, or avg, as Gatys et al. prefer."""
    settings: tyro.conf.OmitArgPrefixes[Settings] = field(default_factory=Settings)
    save_every: int = 0
    """Write a frame, STEM-STEP.png, every so many steps; 0: none."""
    quiet: bool = False
    """Say nothing but errors and the result."""


def main(args: Sequence[str]) -> int:
    flags = tyro.cli(Stylize, args=list(args), prog="jaxcnn stylize")
    from jaxcnn.style import pictures

    pictures.check_output(flags.output)
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

    inputs = _Inputs.read(flags)
    flags.output.parent.mkdir(parents=True, exist_ok=True)
    unfinished = flags.output.with_name(f"{flags.output.stem}.unfinished")
    checkpoints = Checkpoints(unfinished / "checkpoints", keep_latest=1, keep_best=0)
    begun = time.monotonic()
    show = _Shown(flags)
    try:
        result = stylize(
            inputs.content,
            inputs.styles,
            network=inputs.network,
            settings=flags.settings,
            start=inputs.start,
            callback=show,
            checkpoints=checkpoints,
            identity=inputs.digests,
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
    write_json(flags.output.with_suffix(".json"), described)
    plot.losses(result.losses, flags.output.with_suffix(".losses.png"))
    shutil.rmtree(unfinished, ignore_errors=True)
    return _conclude(flags, result)


@dataclass(frozen=True)
class _Inputs:
    content: Any
    styles: list[Any]
    start: Any
    network: Any
    digests: dict[str, str]

    @classmethod
    def read(cls, flags: Stylize) -> "_Inputs":
        from jaxcnn.data.images import read_image
        from jaxcnn.style import network, pictures
        from jaxcnn.style.transfer import Style

        digests: dict[str, str] = {}

        def picture(path: Path, what: str, channels: int = 3) -> Any:
            image = read_image(path, channels=channels)
            digests[f"{what} {path}"] = hashlib.sha256(path.read_bytes()).hexdigest()
            return image

        masks: list[Any] = [picture(path, "mask", 1)[..., 0] / 255 for path in flags.mask] or [None] * len(flags.style)
        for path, mask in zip(flags.mask, masks, strict=False):
            if not mask.any():
                raise InputError(f"mask {path} is black everywhere: the style would count nowhere")
        styles = []
        for text, mask in zip(flags.style, masks, strict=True):
            weight, path = parse_weighted(text)
            styles.append(Style(picture(Path(path), "style"), weight, mask))
        start = None
        if flags.settings.init not in pictures.STARTS and Path(flags.settings.init).suffix:
            start = picture(Path(flags.settings.init), "init")
        if flags.weights:
            frozen = network.load(flags.weights, pooling=flags.pooling)
            if Path(flags.weights).is_file():
                digests[f"weights {flags.weights}"] = hashlib.sha256(Path(flags.weights).read_bytes()).hexdigest()
        else:
            frozen = network.random(pooling=flags.pooling)
            print(f"note: without --weights the network is {frozen.source}: {network.RANDOM_NOTE}", file=sys.stderr)
        photographs = _photographs() if flags.content is None or not styles else {}
        content = picture(flags.content, "content") if flags.content else photographs["china.jpg"]
        return cls(content, styles or [Style(photographs["flower.jpg"])], start, frozen, digests)


def _photographs() -> dict[str, Any]:
    from sklearn.datasets import load_sample_image

    return {name: load_sample_image(name) for name in ("china.jpg", "flower.jpg")}


class _Shown:
    """Progress, and frames on the way."""

    def __init__(self, flags: Stylize):
        from jaxcnn.train.log import Progress

        settings = flags.settings
        self.flags, self.begun, self.first = flags, time.monotonic(), 0
        self.progress = Progress((settings.steps + 1) * settings.scales, quiet=flags.quiet, what="stylizing")

    def __call__(self, step: Any) -> None:
        from jaxcnn.style import pictures

        self.first = self.first or step.done
        self.progress.step(step.done)
        number, every = step.line["step"], self.flags.save_every
        if step.done == self.first or step.done % 10 == 0 or step.done == step.total:
            fresh = step.done - self.first
            pace = (time.monotonic() - self.begun) / fresh if fresh else 0.0
            shown = {name: step.line[name] for name in ("step", "size", "total", "content", "style", "tv")}
            self.progress.line(shown, eta=pace * (step.total - step.done) if fresh else None)
        if every and number and number % every == 0:
            pictures.write(self.flags.output.with_name(f"{self.flags.output.stem}-{number:06}.png"), step.pictures()[0])

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
    if flags.settings.init == "content" and last["style"] > 0.5 * first["style"]:
        print(
            f"note: the style term fell by {1 - last['style'] / first['style']:.0%} only. It grows with the fourth"
            " power of the features' scale, the content term with the second: networks of small features, as"
            " torchvision's or a normalised one, need a larger --style-weight",
            file=sys.stderr,
        )
    return 0
