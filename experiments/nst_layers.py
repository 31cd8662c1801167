"""What each layer keeps of an image: Gatys, Ecker & Bethge 2016, figure 1.

    python experiments/nst_layers.py --content PHOTO --style PAINTING --weights FILE

Claim     content: from the features of lower layers the image comes back almost exactly, from higher ones its objects
          and their places without the pixels. Style: from the Gram matrices of more and more layers comes the texture,
          at a larger and larger scale, without any place
Network   VGG to relu5_1 by --weights, or as far as the file goes; without one, a VGG-19 of random weights;
          average pooling
Recipe    from white noise, L-BFGS, 200 steps, 256 pixels. Content: relu1_1, relu2_1, ... each alone. Style: relu1_1;
          relu1_1 and relu2_1; and so on, in equal parts
Output    sheet.png: reconstructions of content above, of style below; losses.json: every term of every step, and how
          far the pixels of the content's reconstructions are from the photograph, by layer
Expected  the distance of the pixels grows with the layer's depth
Measured  a view of Tuebingen and the Starry Night, VGG-19 distilled to 1/16; root mean square distance of the pixels:
            relu1_1 0.010, relu2_1 0.154, relu3_1 0.175, relu4_1 0.217, relu5_1 0.271
          Every total fell to at most 0.35 % of the start. On the sheet colours blur from relu4_1 on and lines bend at
          relu5_1; the style goes from specks (relu1_1) to brush strokes and swirls (relu4_1)
"""

import argparse
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from jaxcnn.cli import run_program
from jaxcnn.data.images import read_image
from jaxcnn.files import write_json
from jaxcnn.style import network, pictures
from jaxcnn.style.network import PAPER_STYLE
from jaxcnn.style.settings import Settings
from jaxcnn.style.transfer import Style, Stylized, stylize


def draw(rows: Sequence[Sequence[tuple[str, np.ndarray]]], path: Path) -> None:
    """Pictures with titles, row by row."""
    from matplotlib.figure import Figure

    columns = max(map(len, rows))
    figure = Figure(figsize=(3 * columns, 2.8 * len(rows)), layout="constrained")
    for axes, row in zip(figure.subplots(len(rows), columns, squeeze=False), rows, strict=True):
        for axis in axes:
            axis.axis("off")
        for axis, (title, picture) in zip(axes, row, strict=False):
            axis.imshow(picture)
            axis.set_title(title)
    figure.savefig(path, dpi=110)


def distance(picture: np.ndarray, original: np.ndarray) -> float:
    """Root mean square difference of pixels in 0..1."""
    return float(np.sqrt(np.mean((picture / 255.0 - original / 255.0) ** 2)))


def run(args: argparse.Namespace, output: Path) -> None:
    if args.weights:
        frozen = network.load(args.weights, pooling="avg")
    else:
        frozen = network.random(width=8 if args.smoke else 64, pooling="avg")
    print(f"{frozen.source}, to {frozen.layers[-1]}", flush=True)
    photo, flower = pictures.photograph("china.jpg"), pictures.photograph("flower.jpg")
    content = read_image(args.content) if args.content else photo
    style = read_image(args.style) if args.style else flower
    base = Settings(size=args.size, steps=args.steps, init="noise")
    layers = [name for name in PAPER_STYLE if name in frozen.layers]
    cases = {name: replace(base, content_layers=(name,), style_weight=0) for name in layers}
    cases |= {
        f"up to {name}": replace(base, style_layers=tuple(layers[:i]), content_weight=0)
        for i, name in enumerate(layers, 1)
    }
    results: dict[str, Stylized] = {}
    for name, settings in cases.items():
        results[name] = stylize(content, [Style(style)], network=frozen, settings=settings)
        first, last = (results[name].losses[i]["total"] for i in (0, -1))
        print(f"{name}: the total fell to {last / first:.2%}", flush=True)
    shown, painting = (pictures.scaled(one, pictures.fitted_size(one, args.size)) for one in (content, style))
    distances = {name: distance(results[name].pictures[0], shown) for name in layers}
    for name, far in distances.items():
        print(f"content from {name}: pixels {far:.3f} from the photograph's (root mean square, of 0..1)")
    output.mkdir(parents=True, exist_ok=True)
    losses = {name: result.losses for name, result in results.items()}
    write_json(output / "losses.json", {"network": frozen.source, "distances": distances, "losses": losses})
    rows = [
        [("content", shown), *((f"content: {name}", results[name].pictures[0]) for name in layers)],
        [("style", painting), *((f"style: {n}", r.pictures[0]) for n, r in results.items() if n not in layers)],
    ]
    draw(rows, output / "sheet.png")
    print(f"wrote {output}")


def main() -> None:
    parser: Any = argparse.ArgumentParser(description="Content and style rebuilt from single layers.")
    parser.add_argument("--content", type=Path, help="photograph (default: one that comes with scikit-learn)")
    parser.add_argument("--style", type=Path, help="painting (default: another photograph)")
    parser.add_argument("--weights", help="a VGG: file, or NAME.TAG once fetched (default: random weights)")
    parser.add_argument("--size", type=int, default=256, help="of the longer side (default: 256)")
    parser.add_argument("--steps", type=int, default=200, help="of L-BFGS (default: 200)")
    run_program(parser, run, smoke={"size": 48, "steps": 2})


if __name__ == "__main__":
    main()
