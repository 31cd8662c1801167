"""One photograph in five styles: Gatys, Ecker & Bethge 2016, figure 2.

    python experiments/nst_gatys.py --content PHOTO --style PAINTING ... --weights FILE

Claim     content and style of images can be separated: the same content with the style of each painting
Network   VGG to relu5_1 by --weights, or as far as the file goes; without one, a VGG-19 of random weights;
          average pooling
Recipe    content relu4_2, style relu1_1 to relu5_1 in equal parts, alpha/beta 1e-3, from white noise, L-BFGS,
          200 steps, 256 pixels; the five styles in one program
Output    sheet.png: the content, and each painting above its result; losses.json: every term of every step
Expected  the total falls below 5 % of its value at the start in every picture
Measured  a view of Tuebingen, five paintings (Turner, van Gogh, Munch, Matisse, Kandinsky), the total after 200 steps:
            VGG-16 as far as conv3_3      1.4, 4.5, 3.6, 3.6 and 3.6 % of the start
            VGG-19 distilled to 1/16      0.3, 1.7, 0.7, 2.1 and 1.5 % of the start
          On the sheet the town is plain to see in the colours of each painting, and in strokes with VGG-16
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxcnn.cli import run_program
from jaxcnn.data.images import read_image
from jaxcnn.errors import InputError
from jaxcnn.files import write_json
from jaxcnn.style import network, pictures
from jaxcnn.style.settings import Settings
from jaxcnn.style.transfer import Step, Style, stylize_each


def draw(content: np.ndarray, styles: dict[str, np.ndarray], results: Sequence[np.ndarray], path: Path) -> None:
    """The content, and each painting, by its name, above its picture."""
    from matplotlib.figure import Figure

    columns = 1 + len(styles)
    figure = Figure(figsize=(3 * columns, 5), layout="constrained")
    axes = figure.subplots(2, columns, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    axes[1, 0].imshow(content)
    axes[1, 0].set_title("content")
    for column, (name, style), result in zip(axes.T[1:], styles.items(), results, strict=True):
        column[0].imshow(style)
        column[0].set_title(name)
        column[1].imshow(result)
    figure.savefig(path, dpi=110)


def show(step: Step) -> None:
    if step.done % 10 == 1 or step.done == step.total:
        totals = " ".join(f"{total:.3g}" for total in np.ravel(step.line["total"]))
        print(f"step {step.done - 1}/{step.total - 1}: total {totals}", flush=True)


def run(args: argparse.Namespace, output: Path) -> None:
    if args.weights:
        frozen = network.load(args.weights, pooling="avg")
    else:
        frozen = network.random(width=8 if args.smoke else 64, pooling="avg")
    print(f"{frozen.source}, to {frozen.layers[-1]}", flush=True)
    photo, flower = pictures.photograph("china.jpg"), pictures.photograph("flower.jpg")
    content = read_image(args.content) if args.content else photo
    styles = {path.stem: read_image(path) for path in args.style} or {"flower": flower, "china": photo[::-1]}
    if len(styles) < len(args.style):
        raise InputError(f"two of {' '.join(map(str, args.style))} have one name, and so would their pictures")
    settings = Settings(size=args.size, steps=args.steps, init="noise")
    groups = [[Style(style)] for style in styles.values()]
    result = stylize_each(content, groups, network=frozen, settings=settings, callback=show)
    output.mkdir(parents=True, exist_ok=True)
    first, last = (np.array(result.losses[i]["total"]) for i in (0, -1))
    for name, share in zip(styles, last / first, strict=True):
        print(f"{name}: the total fell to {share:.2%}")
    write_json(output / "losses.json", {"network": frozen.source, "styles": list(styles), "losses": result.losses})
    paintings = {name: pictures.scaled(one, pictures.fitted_size(one, args.size)) for name, one in styles.items()}
    shown = pictures.scaled(content, pictures.fitted_size(content, args.size))
    draw(shown, paintings, result.pictures, output / "sheet.png")
    for name, picture in zip(styles, result.pictures, strict=True):
        pictures.write(output / f"{name}.png", picture)
    print(f"wrote {output}")


def main() -> None:
    parser: Any = argparse.ArgumentParser(description="One photograph in several styles, in one program.")
    parser.add_argument("--content", type=Path, help="photograph (default: one that comes with scikit-learn)")
    parser.add_argument("--style", type=Path, nargs="+", default=[], help="paintings (default: photographs)")
    parser.add_argument("--weights", help="a VGG: file, or NAME.TAG once fetched (default: random weights)")
    parser.add_argument("--size", type=int, default=256, help="of the longer side (default: 256)")
    parser.add_argument("--steps", type=int, default=200, help="of L-BFGS (default: 200)")
    run_program(parser, run, smoke={"size": 64, "steps": 3})


if __name__ == "__main__":
    main()
