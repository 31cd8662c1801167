"""How fast JPEG files become training batches, by worker processes, and what a training step waits for them.

    python experiments/benchmarks/jpeg_loader.py [--workers 0 1 2 4] [--images 2000] [--pixels 64] [--smoke]

Images     synthetic: noise with the spectrum of photographs (amplitude 1 / frequency), 96 to 160 pixels a side, JPEG at
           quality 75, some kB each, in a folder of ten classes
Loader     random-resized crops to --pixels, batches on the device, nothing else running: images per second over
           --batches batches after the first ones
Step       ResNet-18, SGD, float32: the share of the loop's time spent in the call that gives the batch, once compiled
Claim      the workers decode faster than the step consumes, so that the share is near 0; below that rate it is what is
           missing
Measured   2 cores, 2,000 files of 7.7 kB, 64 px: 2,961 images/s in threads; 2,550 and 3,502 by 1 worker, 5,466 and
           5,981 by 2, 4,700 and 6,721 by 4 (two runs, --steps 4 and --steps 1 --workers 1 2 4); ResNet-18 takes 6.2 to
           7.3 s for a step of 128 and waits for at most 0.1 % of it
"""

import argparse
import dataclasses
import os
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jaxcnn import models, parallel
from jaxcnn.cli import run_program
from jaxcnn.data import preprocess
from jaxcnn.data.sources import load_disk
from jaxcnn.data.stream import StreamFeed
from jaxcnn.files import write_json
from jaxcnn.train import create_state, make_train_step
from jaxcnn.types import Array, Batch

CLASSES = 10
AREA = (0.08, 1.0)
SIDES = (96, 160)


def photograph(rng: np.random.Generator, height: int, width: int) -> np.ndarray:
    """(h, w, 3) uint8: noise whose amplitude falls as 1 / frequency, the channels mostly alike."""
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width))
    frequency[0, 0] = np.inf
    noise = rng.normal(size=(4, height, width))
    field = np.fft.irfft2(np.fft.rfft2(noise) / frequency, s=(height, width))
    field = field / field.std(axis=(1, 2), keepdims=True)
    colour = field[:1] + 0.3 * field[1:]
    return np.clip(128 + 50 * colour, 0, 255).astype(np.uint8).transpose(1, 2, 0)


def make_folder(folder: Path, images: int) -> float:
    """Writes so many images in classes; the mean length of a file in kB."""
    from PIL import Image

    rng, total = np.random.default_rng(0), 0
    for i in range(images):
        path = folder / f"class{i % CLASSES}" / f"{i:05}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        height, width = rng.integers(SIDES[0], SIDES[1] + 1, 2)
        Image.fromarray(photograph(rng, height, width)).save(path, quality=75)
        total += path.stat().st_size
    return total / images / 1e3


def loader_rate(feed: StreamFeed, *, batches: int, first: int) -> float:
    """Images per second of the feed alone."""
    for step in range(first):
        feed(step)
    began = time.perf_counter()
    for step in range(first, first + batches):
        jax.block_until_ready(feed(step))
    return batches * feed.batch_size / (time.perf_counter() - began)


def training(feed: StreamFeed, *, pixels: int, steps: int) -> tuple[float, float]:
    """(ms per step, share of it spent waiting for the batch) of ResNet-18 on the feed."""
    net, optimizer = models.create("resnet18", num_classes=CLASSES), optax.sgd(0.1, 0.9)

    def prepare(batch: Batch, key: Array) -> Batch:
        return {**batch, "image": preprocess.to_float(batch["image"])}

    step = make_train_step(net, optimizer=optimizer, prepare=prepare, mesh=feed.mesh)
    sample = jax.ShapeDtypeStruct((1, pixels, pixels, 3), jnp.float32)
    with jax.set_mesh(feed.mesh):
        state = create_state(net, optimizer=optimizer, sample=sample, mesh=feed.mesh)
        state, totals = step(state, feed(0), np.uint32(0))
        jax.block_until_ready(totals)
        waited, began = 0.0, time.perf_counter()
        for at in range(1, steps + 1):
            asked = time.perf_counter()
            batch = feed(at)
            waited += time.perf_counter() - asked
            state, totals = step(state, batch, np.uint32(0))
            jax.block_until_ready(totals)
        took = time.perf_counter() - began
    return 1e3 * took / steps, waited / took


def run(args: argparse.Namespace, output: Path) -> None:
    output.mkdir(parents=True, exist_ok=True)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as directory:
        size = make_folder(Path(directory) / "synthetic", args.images)
        print(f"{args.images} JPEG files of {size:.1f} kB, {cores} cores, {jax.devices()[0].device_kind}", flush=True)
        data = load_disk("synthetic", data_dir=directory, image_size=(args.pixels, args.pixels), area=AREA)
        for workers in args.workers:
            images: Any = dataclasses.replace(data.train.images, workers=workers)  # type: ignore[type-var]
            mesh = parallel.make_mesh(jax.devices()[:1])
            feed = StreamFeed(images, data.train.labels, batch_size=args.batch_size, seed=0, mesh=mesh)
            rate = loader_rate(feed, batches=args.batches, first=4 * max(workers, 1))
            feed.close()
            ms, share = training(feed, pixels=args.pixels, steps=args.steps)
            feed.close()
            rows.append({"workers": workers, "images_per_second": rate, "ms_per_step": ms, "waiting": share})
            print(
                f"{workers} workers: {rate:8.0f} images/s alone; ResNet-18 {ms:8.1f} ms a step, {share:.1%} waiting",
                flush=True,
            )
    about = {"kB": size, "cores": cores, "device": jax.devices()[0].device_kind, "batch_size": args.batch_size}
    write_json(output / "summary.json", {**about, "pixels": args.pixels, "rows": rows})


def main() -> None:
    parser = argparse.ArgumentParser(description="Images per second of the JPEG loader, and what a step waits for it.")
    parser.add_argument("--workers", nargs="+", type=int, default=[0, 1, 2, 4], help="processes (0: threads here)")
    parser.add_argument("--images", type=int, default=2000, help="files in the folder (default: 2000)")
    parser.add_argument("--pixels", type=int, default=64, help="side of what the network sees (default: 64)")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=60, help="timed batches of the loader alone (default: 60)")
    parser.add_argument("--steps", type=int, default=20, help="timed training steps (default: 20)")
    small = {"workers": [0, 1], "images": 60, "pixels": 32, "batch_size": 8, "batches": 3, "steps": 2}
    run_program(parser, run, smoke=small)


if __name__ == "__main__":
    main()
