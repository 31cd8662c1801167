"""Pictures before and after the optimisation, what they are made with, and the plot of how it went."""

import itertools
import warnings
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jaxcnn.errors import InputError
from jaxcnn.style import pictures, plot
from jaxcnn.style.pictures import Style
from jaxcnn.style.settings import Settings, parse_weighted

RNG = np.random.default_rng(0)
YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


def picture(height: int, width: int) -> np.ndarray:
    return RNG.integers(0, 256, (height, width, 3), dtype=np.uint8)


# --- sizes and files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "longer", "size"),
    [((30, 40), 80, (60, 80)), ((40, 30), 20, (20, 15)), ((1, 400), 100, (1, 100)), ((30, 40), 40 / 2**0.5, (21, 28))],
)
def test_the_longer_side_is_as_asked(shape, longer, size):
    whole = picture(*shape)
    assert pictures.fitted_size(whole, longer) == size
    assert pictures.scaled(whole, size).shape == (*size, 3)


def test_scaling_keeps_the_mean_colour_and_a_picture_of_that_size():
    whole = picture(48, 64)
    assert pictures.scaled(whole, (48, 64)) is whole
    small = pictures.scaled(whole, (12, 16))
    np.testing.assert_allclose(small.mean((0, 1)), whole.mean((0, 1)), atol=2)
    assert small.std() < whole.std() / 2  # antialiased: 16 pixels of noise became one


def test_an_enormous_size_is_refused():
    with pytest.raises(InputError, match="100000 x 75000 pixels: expected at most 89478485"):
        pictures.fitted_size(picture(30, 40), 100_000)


@pytest.mark.parametrize("name", ["a.png", "new/directory/a.PNG", "a.jpg", "a.jpeg"])
def test_a_picture_is_written_by_its_suffix(tmp_path, name):
    smooth = pictures.scaled(picture(3, 4), (48, 64))
    pictures.write(tmp_path / name, smooth)
    with Image.open(tmp_path / name) as image:
        assert image.format == ("PNG" if name.lower().endswith("png") else "JPEG")
        found = np.asarray(image)
    assert np.abs(found.astype(int) - smooth).max() <= (0 if name.lower().endswith("png") else 12)
    assert len([path for path in tmp_path.rglob("*") if path.is_file()]) == 1


def test_to_array_and_back_is_the_same_and_what_is_beyond_is_cut():
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, 2)
    np.testing.assert_array_equal(pictures.to_picture(pictures.to_array(levels)[0]), levels)
    beyond = jnp.array([-0.5, 0.5, 1.5]).reshape(1, 1, 3)
    np.testing.assert_array_equal(pictures.to_picture(beyond), np.array([[[0, 128, 255]]], np.uint8))


def test_where_nothing_can_be_written_is_known_before(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "directory.png").mkdir()
    for output, message in (
        ("a.gif", r"suffix '\.gif': expected one of \.png, \.jpg, \.jpeg"),
        ("a", "suffix ''"),
        ("directory.png", "is a directory"),
        ("file/a.png", "cannot be written: .*file: Not a directory"),
    ):
        with pytest.raises(InputError, match=message):
            pictures.check_output(tmp_path / output)
    pictures.check_output(tmp_path / "not/yet/a.png")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["directory.png", "file"]


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="no directory where even root cannot write")
def test_a_directory_that_nobody_can_write_to():
    with pytest.raises(InputError, match="cannot be written: /proc: "):
        pictures.check_output(Path("/proc/nowhere/a.png"))


# --- colours -------------------------------------------------------------------------------------------------


def test_luminance_is_the_y_of_yiq():
    x = pictures.to_array(picture(5, 7))
    expected = np.asarray(x, np.float64) @ YIQ[0]
    np.testing.assert_allclose(pictures.luminance(x), expected[..., None].repeat(3, -1), atol=1e-6)


def test_colours_are_the_contents_and_luminance_the_pictures():
    x = pictures.to_array(np.stack([picture(6, 8), picture(6, 8)]).reshape(12, 8, 3)).reshape(2, 6, 8, 3)
    content = pictures.to_array(picture(6, 8))
    found = np.asarray(pictures.coloured(x, content), np.float64) @ YIQ.T
    np.testing.assert_allclose(found[..., 0], np.asarray(x, np.float64) @ YIQ[0], atol=1e-6)
    for one in found:
        np.testing.assert_allclose(one[..., 1:], (np.asarray(content, np.float64) @ YIQ.T)[0, ..., 1:], atol=1e-6)


def test_the_styles_luminance_takes_mean_and_deviation_of_the_contents():
    style, content = pictures.to_array(picture(9, 5)), pictures.to_array(picture(6, 8) // 2)
    matched = pictures.matched_luminance(style, content)
    of_content = pictures.luminance(content)
    np.testing.assert_allclose([matched.mean(), matched.std()], [of_content.mean(), of_content.std()], rtol=1e-4)
    flat = pictures.matched_luminance(jnp.full((1, 4, 4, 3), 0.3), content)
    np.testing.assert_allclose(flat, np.full(flat.shape, of_content.mean()), rtol=1e-5)


# --- where it begins -----------------------------------------------------------------------------------------


def test_content_begins_as_the_content():
    content = pictures.to_array(picture(6, 8))
    np.testing.assert_array_equal(pictures.start("content", content=content, styles=[], seed=0), content)


def test_noise_is_uniform_and_the_seeds():
    content = pictures.to_array(picture(60, 80))
    noise = pictures.start("noise", content=content, styles=[], seed=3)
    assert noise.shape == content.shape
    assert 0 <= noise.min() < 0.01 < 0.99 < noise.max() <= 1
    np.testing.assert_allclose([noise.mean(), noise.std()], [0.5, 12**-0.5], atol=0.01)
    np.testing.assert_array_equal(noise, pictures.start("noise", content=content, styles=[], seed=3))
    assert (noise != pictures.start("noise", content=content, styles=[], seed=4)).mean() > 0.99


def test_statistics_have_mean_and_covariance_of_each_styles_colours():
    mixed = RNG.normal(size=(50, 40, 3)) @ np.array([[40, 30, 0], [0, 20, 10], [0, 0, 5]]) + [100, 120, 60]
    styles = [pictures.to_array(np.clip(mixed, 0, 255).astype(np.uint8)), pictures.to_array(picture(20, 20))]
    noise = pictures.start("statistics", content=jnp.zeros((1, 200, 200, 3)), styles=styles, seed=0)
    assert noise.shape == (2, 200, 200, 3)
    for one, style in zip(noise, styles, strict=True):
        found, expected = np.asarray(one).reshape(-1, 3), np.asarray(style).reshape(-1, 3)
        np.testing.assert_allclose(found.mean(0), expected.mean(0), atol=0.01)
        covariance = np.cov(expected.T)
        np.testing.assert_allclose(np.cov(found.T), covariance, atol=0.02 * np.abs(covariance).max())


def test_statistics_of_one_colour_are_that_colour():
    red = jnp.array([0.9, 0.1, 0.2]).reshape(1, 1, 1, 3) * jnp.ones((1, 8, 8, 1))
    noise = pictures.start("statistics", content=jnp.zeros((1, 6, 6, 3)), styles=[red], seed=0)
    np.testing.assert_allclose(noise, np.broadcast_to(red[:, :6, :6], noise.shape), atol=1e-3)


# --- what it is made with ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("relu4_2", (1.0, "relu4_2")),
        ("0.5:relu4_2", (0.5, "relu4_2")),
        ("1e3:a b.png", (1000.0, "a b.png")),
        ("2:a:b.png", (2.0, "a:b.png")),
        (r"C:\a.png", (1.0, r"C:\a.png")),
        ("x:", (1.0, "x:")),
    ],
)
def test_a_weight_before_a_colon(text, parsed):
    assert parse_weighted(text) == parsed


@pytest.mark.parametrize("text", ["0:a.png", "-1:a.png", "nan:a.png", "inf:a.png"])
def test_a_weight_that_is_none(text):
    with pytest.raises(InputError, match=r"'a\.png' has weight .*: expected a number above 0"):
        parse_weighted(text)


@pytest.mark.parametrize("text", ["", "1:"])
def test_a_weight_of_nothing(text):
    with pytest.raises(InputError, match=f"'{text}' names nothing"):
        parse_weighted(text)


@pytest.mark.parametrize(
    "wrong",
    [
        *({"size": 0}, {"size": -256}, {"size": 64.5}, {"steps": -1}, {"scales": 0}, {"tile": -1}, {"seed": -1}),
        *({"seed": 2**32}, {"content_weight": -1.0}, {"style_weight": float("nan")}, {"tv_weight": float("inf")}),
        *({"learning_rate": 0.0}, {"style_scale": -1.0}, {"ema": 1.0}, {"ema": float("nan")}, {"tolerance": -0.1}),
    ],
    ids=str,
)
def test_settings_out_of_range_are_named(wrong):
    ((name, value),) = wrong.items()
    with pytest.raises(InputError, match=f"{name} {value}: expected"):
        Settings(**wrong)


def test_nothing_to_optimise():
    with pytest.raises(InputError, match="are all 0"):
        Settings(content_weight=0.0, style_weight=0.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"picture": np.zeros((4, 4, 3))}, r"style image is float64 of shape \(4, 4, 3\): expected uint8"),
        ({"picture": np.zeros((4, 4), np.uint8)}, "expected uint8"),
        ({"picture": np.zeros((4, 0, 3), np.uint8)}, "expected uint8"),
        ({"weight": 0.0}, "a style image has weight 0"),
        ({"weight": float("nan")}, "weight nan"),
        ({"mask": np.zeros((4, 4))}, "black everywhere"),
        ({"mask": np.full((4, 4), 255)}, r"expected \(h, w\), values in 0\.\.1"),
        ({"mask": np.full((4, 4), np.nan)}, r"values in 0\.\.1"),
        ({"mask": np.ones((4, 4, 1))}, r"a mask is float64 of shape \(4, 4, 1\)"),
    ],
)
def test_a_style_that_is_none(arguments, message):
    with pytest.raises(InputError, match=message):
        Style(**{"picture": picture(4, 4), **arguments})


def test_masks_are_scaled_and_none_is_everywhere():
    mask = np.zeros((2, 2))
    mask[:, 0] = 1
    found = pictures.scaled_masks([mask, None], (8, 6))
    assert found.shape == (2, 8, 6)
    np.testing.assert_array_equal(found[1], np.ones((8, 6)))
    np.testing.assert_allclose(found[0], np.broadcast_to(found[0, :1], (8, 6)), atol=1e-6)
    assert (np.diff(found[0, 0]) <= 0).all()
    assert (found[0, 0, 0], found[0, 0, -1]) == (1, 0)


# --- the plot ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layers", [1, 2, 6, 24])
@pytest.mark.parametrize("count", [1, 50])
def test_the_plot_has_every_term_and_nothing_overlaps(tmp_path, monkeypatch, layers, count):
    from matplotlib.figure import Figure

    shown = []
    real = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda self, *a, **o: (shown.append(self), real(self, *a, **o)))
    terms = {f"style/relu{i // 4}_{i % 4}": 10.0**-i for i in range(layers)}
    lines = [
        {"step": i, "size": 64, "total": 3.0 / (i + 1), "content": 0.0, "style": 1.0, "tv": 0.0, **terms}
        for i in range(count)
    ]
    plot.losses(lines, tmp_path / "losses.png")
    with Image.open(tmp_path / "losses.png") as image:
        assert image.format == "PNG"
    (figure,) = shown
    curves, bars = figure.axes
    assert [line.get_label() for line in curves.get_lines()] == ["total", *terms]
    assert [label.get_text() for label in bars.get_yticklabels()] == ["total", *terms]
    assert all(axes.get_title() and axes.get_xlabel() for axes in figure.axes)
    looks = {(line.get_color(), line.get_linestyle()) for line in curves.get_lines()}
    assert len(looks) == layers + 1
    parts = [part.get_tightbbox() for part in (*figure.axes, *figure.legends)]
    for i, one in enumerate(parts):
        assert all(not one.overlaps(other) for other in parts[:i])
    ticks = [label.get_window_extent() for label in bars.get_yticklabels()]
    assert all(not one.overlaps(other) for one, other in itertools.pairwise(ticks))


def test_a_plot_of_nothing_but_zeros(tmp_path):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot.losses([{"step": 0, "size": 8, "total": 0.0, "style/relu1_1": 0.0}], tmp_path / "losses.png")
    assert (tmp_path / "losses.png").stat().st_size > 0
