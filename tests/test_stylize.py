"""`jaxcnn stylize`: what it writes and says, how it says no, and that signals and kills change nothing in the end."""

import hashlib
import io
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from PIL import Image

from jaxcnn import cli
from jaxcnn.commands import stylize as stylize_command
from jaxcnn.style import network, pictures, transfer

RNG = np.random.default_rng(0)
QUICK = ["--size", "32", "--content-layers", "relu2_1", "--style-layers", "relu1_1,relu2_1"]
FLAGS = (
    *("content", "style", "output", "weights", "size", "steps", "optimizer", "init", "content-layers", "style-layers"),
    *("content-weight", "style-weight", "tv-weight", "pooling", "preserve-colors", "tile", "seed"),
)


@pytest.fixture(scope="module", autouse=True)
def own_caches(tmp_path_factory) -> Iterator[None]:
    """Compile cache and XLA flags of this session alone, for its processes too."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("xla")))
        patch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
        patch.setenv("COLUMNS", "200")
        yield
    for name, value in before.items():
        jax.config.update(name, value)


def stylize(*args: str | Path) -> int:
    """The exit status of `jaxcnn stylize ARGS`."""
    try:
        return cli.main(["stylize", *(str(arg) for arg in args)])
    except SystemExit as stop:  # what the parser of flags ends with
        return stop.code


def smooth(height: int, width: int) -> np.ndarray:
    return pictures.scaled(RNG.integers(0, 256, (5, 6, 3), dtype=np.uint8), (height, width))


def narrow_vgg(width: int) -> dict[str, np.ndarray]:
    params = network.random(width=width).variables["params"]
    return {f"{layer}/{leaf}": np.asarray(one) for layer, leaves in params.items() for leaf, one in leaves.items()}


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> Path:
    """A directory of images, and weights of a narrow VGG-19 in one of the layouts that are read."""
    directory = tmp_path_factory.mktemp("given")
    pictures.write(directory / "content.png", smooth(24, 32))
    pictures.write(directory / "style.png", smooth(40, 36))
    pictures.write(directory / "other.jpg", smooth(32, 32))
    pictures.write(directory / "init.losses.png", smooth(24, 32))
    Image.fromarray(smooth(20, 20)[..., 0]).save(directory / "mask.png")
    arrays = narrow_vgg(2)
    np.savez(directory / "vgg.npz", **arrays)
    np.savez(directory / "nan.npz", **{**arrays, "conv2_1/bias": np.full_like(arrays["conv2_1/bias"], np.nan)})
    np.savez(directory / "other.npz", **{"features.0.weight": np.ones((64, 3, 3, 3), np.float32)})
    with open(directory / "pickle.safetensors", "wb") as file:
        pickle.dump({"conv1_1/kernel": [1.0]}, file)
    return directory


@pytest.fixture
def usual(given, tmp_path) -> list[str]:
    """Flags that make `tmp_path`/out.png of the given images and weights in a few small steps."""
    paths = {"content": "content.png", "style": "style.png", "weights": "vgg.npz"}
    flags = [part for name, file in paths.items() for part in (f"--{name}", str(given / file))]
    return [*flags, "--output", str(tmp_path / "out.png"), "--steps", "3", "--optimizer", "adam", *QUICK]


def read_json(path: Path) -> Any:
    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def names(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


# --- what it does --------------------------------------------------------------------------------------------


def test_help_names_every_flag_once(capsys):
    assert stylize("--help") == 0
    said = capsys.readouterr().out
    lines = re.findall(r"^\W*(--[a-z][a-z-]+)", said, re.MULTILINE)
    assert len(lines) == len(set(lines))
    assert {f"--{flag}" for flag in FLAGS} <= set(lines)
    assert "settings" not in said


def test_the_picture_its_losses_and_their_plot_are_written(usual, given, tmp_path, capsys):
    assert stylize(*usual, "--tv-weight", "1") == 0
    assert names(tmp_path) == ["out.json", "out.losses.png", "out.png"]
    with Image.open(tmp_path / "out.png") as image:
        assert (image.size, image.mode) == ((32, 24), "RGB")
    written = read_json(tmp_path / "out.json")
    assert [line["step"] for line in written["losses"]] == [0, 1, 2, 3]
    for line in written["losses"]:
        terms = ("total", "content", "style", "tv", "content/relu2_1", "style/relu1_1", "style/relu2_1")
        assert set(line) == {"step", "size", *terms}
        assert line["total"] == pytest.approx(line["content"] + line["style"] + line["tv"])
    assert written["sha256"] == {
        f"{what} {given / file}": sha256(given / file)
        for what, file in (("content", "content.png"), ("style", "style.png"), ("weights", "vgg.npz"))
    }
    settings = written["settings"]
    assert (settings["size"], settings["steps"], settings["tv_weight"], settings["pooling"]) == (32, 3, 1.0, "max")
    assert settings["style"] == [str(given / "style.png")]
    assert (written["picture"], written["stopped"]) == ([24, 32, 3], "steps")
    said = capsys.readouterr()
    assert "step 0/3 size 32 total" in said.out
    assert f"{tmp_path / 'out.png'}: total" in said.out
    assert said.err == ""


def test_without_any_file_it_says_what_it_takes_and_where_weights_are(tmp_path, monkeypatch, capsys):
    real = network.random
    monkeypatch.setattr(network, "random", lambda **options: real(width=2, **options))
    monkeypatch.chdir(tmp_path)
    assert stylize("--steps", "1", *QUICK) == 0
    said = capsys.readouterr().err
    assert "without --content it is china.jpg, a photograph that comes with scikit-learn" in said
    assert "without --style it is flower.jpg, a photograph that comes with scikit-learn" in said
    assert "VGG-19 of random weights (seed 0): textures and colours come out" in said
    assert "jaxcnn weights fetch vgg19.keras" in said
    assert names(tmp_path) == ["stylized.json", "stylized.losses.png", "stylized.png"]
    written = read_json(tmp_path / "stylized.json")
    assert set(written["sha256"]) == {"content china.jpg of scikit-learn", "style flower.jpg of scikit-learn"}
    assert written["network"] == "VGG-19 of random weights (seed 0)"


def test_quiet_says_the_result_alone(usual, tmp_path, capsys):
    assert stylize(*usual, "--quiet") == 0
    said = capsys.readouterr()
    assert said.err == ""
    (line,) = said.out.splitlines()
    assert line.startswith(f"{tmp_path / 'out.png'}: total ")


def test_flags_reach_the_engine(usual, given, tmp_path, capsys):
    flags = ["--style", f"2.5:{given / 'other.jpg'}", "--mask", given / "mask.png", "--mask", given / "mask.png"]
    flags += ["--init", given / "other.jpg", "--optimizer", "lbfgs", "--preserve-colors", "--pooling", "avg"]
    flags += ["--content-layers", "3:relu1_2", "relu2_1", "--style-weight", "10", "--scales", "2", "--save-every", "2"]
    assert stylize(*usual, *flags) == 0
    assert names(tmp_path) == [
        *("out-000002.png", "out-000004.png", "out-000006.png", "out.json", "out.losses.png", "out.png")
    ]
    written = read_json(tmp_path / "out.json")
    assert [line["size"] for line in written["losses"]] == [23] * 4 + [32] * 4
    assert {"content/relu1_2", "content/relu2_1"} <= set(written["losses"][0])
    assert written["settings"]["style"] == [str(given / "style.png"), f"2.5:{given / 'other.jpg'}"]
    assert {name.split()[0] for name in written["sha256"]} == {"content", "style", "mask", "init", "weights"}
    with Image.open(tmp_path / "out-000006.png") as frame, Image.open(tmp_path / "out.png") as image:
        np.testing.assert_array_equal(np.asarray(frame), np.asarray(image))


@pytest.mark.parametrize("mode", ["L", "RGBA", "P", "I;16", "CMYK"])
def test_images_of_any_kind_become_rgb(usual, tmp_path, mode):
    """Initial picture and content are the image as RGB; transparency is dropped."""
    rgb = smooth(24, 32)
    image = Image.fromarray(rgb)
    expected = np.asarray(image.convert(mode).convert("RGB")) if mode not in ("RGBA", "I;16") else rgb
    if mode == "I;16":
        levels = rgb[..., 0].astype(np.uint16) * 257
        image, expected = Image.fromarray(levels), np.repeat(rgb[..., :1], 3, -1)
    elif mode == "RGBA":
        image.putalpha(Image.fromarray(rgb[..., 0]))
    else:
        image = image.convert(mode)
    path = tmp_path / ("image.jpg" if mode == "CMYK" else "image.png")
    image.save(path, **({"quality": 100} if mode == "CMYK" else {}))
    assert stylize(*usual, "--content", path, "--steps", "0") == 0
    with Image.open(tmp_path / "out.png") as found:
        assert np.abs(np.asarray(found).astype(int) - expected).max() <= (8 if mode == "CMYK" else 0)


# --- how it says no ------------------------------------------------------------------------------------------


@pytest.fixture
def refused(usual, tmp_path, capsys, monkeypatch):
    """Runs it with further flags: refused with status 2 before compilation, nothing written; returns the message."""

    def ran(*_: object, **__: object) -> None:
        raise AssertionError("bad input came as far as compilation")

    def refuse(*args: str | Path) -> str:
        before = names(tmp_path)
        with monkeypatch.context() as patch:
            for name in ("_features", "_moments", "_step", "_told"):
                patch.setattr(transfer, name, ran)
            assert stylize(*usual, *args) == 2
        said = capsys.readouterr()
        assert "Traceback" not in said.err + said.out
        assert names(tmp_path) == before
        assert said.out == ""
        return said.err

    return refuse


@pytest.mark.parametrize(
    ("flags", "parts"),
    [
        (["--size", "-1"], ["size -1", "at least 1"]),
        (["--size", "many"], ["--size", "many"]),
        (["--steps", "-5"], ["steps -5"]),
        (["--content-weight", "-1"], ["content_weight -1"]),
        (["--style-weight", "nan"], ["style_weight nan"]),
        (["--seed", "-1"], ["seed -1"]),
        (["--tile", "17"], ["tile 17", "multiple of 2"]),
        (["--size", "99999"], ["99999 x 74999 pixels", "at most"]),
        (["--optimizer", "lbgfs"], ["optimizer 'lbgfs'", "'lbfgs'"]),
        (["--pooling", "average"], ["pooling 'average'", "'avg'"]),
        (["--style-loss", "garm"], ["style loss 'garm'", "'gram'"]),
        (["--init", "nosie"], ["init 'nosie'", "'noise'", "an image file"]),
        (["--init", "nowhere.png"], ["init 'nowhere.png'", "an image file"]),
        (["--content-layers", "relu4_9"], ["'relu4_9'", "did you mean 'relu4_"]),
        (["--style-layers", "relu1_1,rleu2_1"], ["'rleu2_1'", "'relu2_1'"]),
        (["--style-layers", "0:relu1_1"], ["'relu1_1' has weight 0"]),
        (["--style-layers", "relu1_1,relu1_1"], ["relu1_1 is given twice"]),
        (["--save-every", "-1"], ["--save-every -1"]),
        (["--seeed", "1"], ["--seeed", "--seed"]),
        (["--weights", "vgg19.kears"], ["weights 'vgg19.kears'", "did you mean 'vgg19.keras'", "a file"]),
        (["--weights", "nowhere.npz"], ["weights 'nowhere.npz'", "a file"]),
        (["--style", "0:{given}/other.jpg"], ["has weight 0", "above 0"]),
        (["--style", "-1:{given}/other.jpg"], ["has weight -1"]),
        (["--style", "x:"], ["cannot read image x:"]),
        (["--style", "1:"], ["'1:' names nothing"]),
        (["--mask", "{given}/mask.png", "--mask", "{given}/mask.png"], ["2 --mask for 1 --style"]),
        (["--content", "{given}/nowhere.png"], ["nowhere.png", "No such file"]),
        (["--content", "{given}"], ["cannot read image {given}", "directory"]),
        (["--content", "{given}/vgg.npz"], ["cannot read image {given}/vgg.npz"]),
        (["--weights", "{given}/nan.npz"], ["conv2_1/bias holds values that are not finite"]),
        (["--weights", "{given}/other.npz"], ["other.npz", "weights of vgg19"]),
        (["--weights", "{given}/pickle.safetensors"], ["pickle.safetensors cannot be read as safetensors"]),
        (["--weights", "{given}/content.png"], ["suffix '.png'"]),
        (["--output", "{out}/a.gif"], ["suffix '.gif'", ".png, .jpg"]),
        (["--output", "{given}/content.png/a.png"], ["cannot be written"]),
        (["--output", "{given}/content.png"], ["content.png is an input"]),
        (["--output", "{given}/../{given.name}/style.png"], ["style.png is an input"]),
        (["--output", "{given}/init.png", "--init", "{given}/init.losses.png"], ["init.losses.png is an input"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_input_is_one_clear_error(refused, given, tmp_path, flags, parts):
    said = refused(*(flag.format(given=given, out=tmp_path) for flag in flags))
    for part in parts:
        assert part.format(given=given) in said
    assert said.count("error: ") <= 1  # the parser of flags has a frame of its own


def test_images_that_are_none(refused, given, tmp_path):
    png = (given / "content.png").read_bytes()
    Image.fromarray(smooth(7, 40)).save(tmp_path / "tiny.png")
    Image.fromarray(np.zeros((20, 20), np.uint8)).save(tmp_path / "black.png")
    for name, data, parts in (
        ("text.png", b"This is no image.", ["cannot identify image file"]),
        ("empty.png", b"", ["cannot identify image file"]),
        ("cut.png", png[: len(png) // 2], ["truncated"]),
        ("enormous.png", png_of(30_000, 30_000), ["decompression bomb"]),
    ):
        (tmp_path / name).write_bytes(data)
        said = refused("--style", tmp_path / name)
        for part in (f"cannot read image {tmp_path / name}", *parts):
            assert part in said
    said = refused("--content", tmp_path / "tiny.png", "--content-layers", "relu5_1", "--size", "64")
    assert "the content image has 40 x 7 pixels, fewer than the stride of relu5_1, 16" in said
    said = refused("--style", tmp_path / "tiny.png", "--style-layers", "relu2_1,relu4_2", "--size", "64")
    assert "a style image has 40 x 7 pixels, fewer than the stride of relu4_2, 8" in said
    assert "black.png is black everywhere" in refused("--mask", tmp_path / "black.png")


def png_of(width: int, height: int) -> bytes:
    """A PNG whose header says so: reading it would take that memory."""
    buffer = io.BytesIO()
    Image.new("L", (1, 1)).save(buffer, "PNG")
    data = bytearray(buffer.getvalue())
    data[16:24] = width.to_bytes(4, "big") + height.to_bytes(4, "big")
    data[29:33] = zlib.crc32(data[12:29]).to_bytes(4, "big")
    return bytes(data)


def test_a_loss_that_is_not_finite_to_begin_with_writes_nothing(usual, tmp_path, capsys):
    assert stylize(*usual, "--style-weight", "1e38") == 1
    assert "error: the loss is not finite to begin with" in capsys.readouterr().err
    assert names(tmp_path) == []


def test_a_loss_that_is_not_finite_later_keeps_the_last_good_picture(usual, given, tmp_path, capsys):
    assert stylize(*usual, "--optimizer", "adam", "--learning-rate", "1e30") == 1
    said = capsys.readouterr().err
    assert f"the loss after step 0 is not finite: {tmp_path / 'out.png'} is the last good picture" in said
    assert names(tmp_path) == ["out.json", "out.losses.png", "out.png"]
    written = read_json(tmp_path / "out.json")
    assert (written["stopped"], len(written["losses"])) == ("not finite", 1)
    with Image.open(tmp_path / "out.png") as found, Image.open(given / "content.png") as content:
        np.testing.assert_array_equal(np.asarray(found), np.asarray(content))


@pytest.mark.parametrize(("signum", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_an_unfinished_picture_of_other_inputs_is_refused(usual, given, tmp_path, capsys, monkeypatch, signum, status):
    with monkeypatch.context() as patch:
        patch.setattr(stylize_command._Shown, "__call__", lambda self, step: os.kill(os.getpid(), signum))
        assert stylize(*usual) == status
    assert names(tmp_path) == ["out.unfinished"]
    assert f"stopped by {signum.name}" in capsys.readouterr().err
    assert stylize(*usual, "--content", given / "other.jpg", "--seed", "7") == 2
    said = capsys.readouterr().err
    assert "seed: 0 -> 7; content: " in said
    assert "give those again, or another output, or delete it" in said
    assert stylize(*usual) == 0
    assert names(tmp_path) == ["out.json", "out.losses.png", "out.png"]


# --- processes -----------------------------------------------------------------------------------------------


def process(*args: str | Path) -> subprocess.Popen:
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "1"}
    command = [sys.executable, "-c", "import sys; from jaxcnn.cli import main; sys.exit(main())", "stylize"]
    return subprocess.Popen(
        [*command, *map(str, args)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def completed(*args: str | Path) -> str:
    """What a process that succeeds says."""
    out, err = process(*args).communicate(timeout=300)
    assert "(steps)" in out, err
    return out + err


def interrupted(frame: Path, signum: int, *args: str | Path) -> int:
    """Starts a process, sends it a signal once it has written `frame`, and returns its exit status."""
    running = process(*args)
    until = time.monotonic() + 240
    while not frame.exists() and running.poll() is None and time.monotonic() < until:
        time.sleep(0.005)
    running.send_signal(signum)
    out, err = running.communicate(timeout=120)
    assert "(steps)" not in out, "it was done before the signal"
    assert "Traceback" not in err
    return running.returncode


def made(output: Path) -> tuple[bytes, list[dict[str, Any]]]:
    return output.read_bytes(), read_json(output.with_suffix(".json"))["losses"]


LONG = ["--init", "noise", "--seed", "1", "--scales", "2", "--ema", "0.9"]
LONG += ["--steps", "75", "--save-every", "15"]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_stopped_interrupted_and_killed_it_makes_the_same_picture(usual, tmp_path, optimizer):
    whole, again = tmp_path / "whole" / "a.png", tmp_path / "again" / "a.png"
    flags = [*usual, *LONG, "--optimizer", optimizer, "--output"]
    completed(*flags, whole)
    for number, signum, status in (
        (15, signal.SIGKILL, -9),  # before any checkpoint
        (30, signal.SIGINT, 130),
        (90, signal.SIGTERM, 143),
        (120, signal.SIGKILL, -9),  # after one
    ):
        assert interrupted(again.with_name(f"a-{number:06}.png"), signum, *flags, again) == status
        assert "a.png" not in names(again.parent)
    assert "a.unfinished" in names(again.parent)
    assert "step 0/" not in completed(*flags, again)  # it went on
    assert made(again) == made(whole)
    assert names(again.parent) == names(whole.parent)


# --- real weights, and memory --------------------------------------------------------------------------------


DATA = os.environ.get("JAXCNN_DATA", "")
real_data = pytest.mark.skipif(
    not (Path(DATA) / "style").is_dir(), reason="JAXCNN_DATA points at no style/ and weights/"
)


@real_data
@pytest.mark.parametrize("init", ["noise", "content"])
@pytest.mark.parametrize(
    ("size", "weights"),
    [
        pytest.param("128", "vgg19_16x_encoder_relu5_1.npz", marks=pytest.mark.slow),
        pytest.param("256", "vgg19_16x_encoder_relu5_1.npz", marks=pytest.mark.slow),
        pytest.param("256", "vgg16_to_conv3_3.npz", marks=pytest.mark.slow),
    ],
)
def test_real_weights_bring_the_total_under_a_twentieth(tmp_path, size, weights, init):
    paths = {"content": "style/content/tubingen.jpg", "style": "style/paintings/starry_night.jpg"}
    flags = [part for name, file in paths.items() for part in (f"--{name}", Path(DATA) / file)]
    flags += ["--weights", Path(DATA) / "weights" / weights, "--output", tmp_path / "a.png"]
    assert stylize(*flags, "--size", size, "--steps", "200", "--init", init, "--optimizer", "lbfgs", "--quiet") == 0
    losses = read_json(tmp_path / "a.json")["losses"]
    assert losses[-1]["total"] < 0.05 * losses[0]["total"]


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's account of a process's memory")
def test_tiles_need_less_memory(usual, tmp_path):
    """2.3 megapixels in one step, by the operating system's own account: not `getrusage`, which begins with what the
    process that started this one held."""
    code = (
        "import pathlib, sys; from jaxcnn.cli import main; status = main();"
        "lines = pathlib.Path('/proc/self/status').read_text().splitlines();"
        "print('peak', next(line.split()[1] for line in lines if line.startswith('VmHWM'))); sys.exit(status)"
    )
    np.savez(tmp_path / "vgg.npz", **narrow_vgg(16))
    flags = [*usual, "--weights", tmp_path / "vgg.npz", "--size", "1760", "--steps", "1"]
    peaks = []
    for tile in ("256", "0"):
        command = [sys.executable, "-c", code, "stylize", *map(str, flags), "--tile", tile]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600, check=True)
        peaks.append(int(done.stdout.split("peak ")[1]))
    assert peaks[0] < 0.6 * peaks[1], peaks
