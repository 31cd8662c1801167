"""What a large picture costs in memory, by the operating system's own account of the process.

    python experiments/benchmarks/style_memory.py --optimizer adam
    python experiments/benchmarks/style_memory.py --optimizer lbfgs

Needs     Linux (VmHWM of /proc/self/status); a fresh process for each line, as a peak never falls
Picture   the photograph of a temple that comes with scikit-learn, enlarged; the style image is as large
Network   VGG-19 of random weights at full width, the paper's layers to relu5_1
Expected  8 megapixels in tiles of 512 within 8 GB with L-BFGS, whose ten pairs are 1.9 GB, and less with Adam; untiled,
          the maps up to relu5_1 and their gradients would take about 32 GB
Measured  3464 x 2311 pixels, L-BFGS, 2 steps: 6.76 GB after the first evaluation, 6.90 GB at most
"""

import argparse
import re
import time
from pathlib import Path

from jaxcnn.cli import run_program
from jaxcnn.files import write_json
from jaxcnn.style import network, pictures
from jaxcnn.style.settings import Settings
from jaxcnn.style.transfer import Step, Style, stylize


def peak() -> float:
    """GB (1e9 bytes) of this process that were resident at once."""
    found = re.search(r"VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text())
    assert found is not None
    return int(found[1]) * 1024 / 1e9


def run(args: argparse.Namespace, output: Path) -> None:
    begun = time.perf_counter()

    def show(step: Step) -> None:
        seconds = time.perf_counter() - begun
        print(f"step {step.done - 1}/{step.total - 1}: {peak():.2f} GB after {seconds:.0f} s", flush=True)

    photo = pictures.photograph("china.jpg")
    content = pictures.scaled(photo, pictures.fitted_size(photo, args.size))
    settings = Settings(size=args.size, steps=args.steps, optimizer=args.optimizer, tile=args.tile)
    before = peak()
    frozen = network.random(width=args.width)
    result = stylize(content, [Style(content[::-1])], network=frozen, settings=settings, callback=show)
    height, width, _ = result.pictures[0].shape
    report = {"optimizer": args.optimizer, "tile": args.tile, "megapixels": height * width / 1e6, "steps": args.steps}
    report |= {"GB before": before, "GB": peak(), "seconds": time.perf_counter() - begun}
    print(f"{width} x {height} pixels, {args.optimizer}, tile {args.tile}: {peak():.2f} GB at most")
    output.mkdir(parents=True, exist_ok=True)
    write_json(output / "style_memory.json", report)


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of the style transfer of one large picture.")
    parser.add_argument("--size", type=int, default=3464, help="of the longer side (default: 3464, 8 megapixels)")
    parser.add_argument("--optimizer", default="lbfgs", help="lbfgs or adam (default: lbfgs)")
    parser.add_argument("--tile", type=int, default=512, help="side of a tile, 0 for none (default: 512)")
    parser.add_argument("--steps", type=int, default=2, help="the second has all that a run has (default: 2)")
    parser.add_argument("--width", type=int, default=64, help="of the network's first stage (default: 64)")
    run_program(parser, run, smoke={"size": 128, "tile": 32, "steps": 1, "width": 4})


if __name__ == "__main__":
    main()
