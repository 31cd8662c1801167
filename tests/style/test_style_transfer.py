"""The engine: what a step logs, where pictures begin and end, what is carried, what stops it, and that it resumes."""

import json
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcnn import checkpoint
from jaxcnn.checkpoint import Checkpoints
from jaxcnn.errors import InputError, TrainingFailed
from jaxcnn.signals import Stopped, StopRequest
from jaxcnn.style import network, pictures, transfer
from jaxcnn.style.settings import Settings
from jaxcnn.style.transfer import Style, Stylized, objective_of, stylize, stylize_each

RNG = np.random.default_rng(0)
LAYERS: dict[str, Any] = {"content_layers": ("relu2_1",), "style_layers": ("relu1_1", "relu2_1")}
YIQ = np.array([[0.299, 0.587, 0.114], [0.5959, -0.2746, -0.3213], [0.2115, -0.5227, 0.3112]])


def picture(height: int, width: int) -> np.ndarray:
    """Smooth colours."""
    return pictures.scaled(RNG.integers(0, 256, (5, 6, 3), dtype=np.uint8), (height, width))


CONTENT, STYLE, OTHER = picture(24, 32), picture(40, 36), picture(32, 32)


@pytest.fixture(scope="module", autouse=True)
def summed_up_once() -> Iterator[None]:
    """The layers of the one network here, which every call of `stylize` asks for."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(network, "summary", lru_cache(network.summary))
        yield


@pytest.fixture(scope="module")
def narrow() -> network.Network:
    return network.random(width=2)


@pytest.fixture
def run(narrow) -> Callable[..., Stylized]:
    """`stylize` of one small picture in one style, by two shallow layers: settings by name."""

    def run(*styles: Style, content: np.ndarray = CONTENT, options: dict[str, Any] | None = None, **settings: Any):
        made = Settings(**{"size": 32, "steps": 4, "optimizer": "adam", **LAYERS, **settings})
        return stylize(content, styles or [Style(STYLE)], network=narrow, settings=made, **(options or {}))

    return run


def total(result: Stylized) -> np.ndarray:
    return np.array([line["total"] for line in result.losses])


# --- what is logged ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_every_step_is_logged_and_called_back_once(run, optimizer):
    steps = []

    def called(step: transfer.Step) -> None:
        steps.append((step.line, step.done, step.total, step.pictures()[0]))

    result = run(optimizer=optimizer, steps=6, tv_weight=10.0, options={"callback": called})
    assert result.stopped == "steps"
    assert [line["step"] for line in result.losses] == [*range(7)]
    assert [line for line, *_ in steps] == result.losses
    assert [(done, of) for _, done, of, _ in steps] == [(i, 7) for i in range(1, 8)]
    np.testing.assert_array_equal(steps[0][-1], CONTENT)
    np.testing.assert_array_equal(steps[-1][-1], result.pictures[0])
    assert (steps[-1][-1] != steps[0][-1]).any()
    for line in result.losses:
        assert list(line) == [
            *("step", "size", "total", "content", "style", "tv"),
            *("content/relu2_1", "style/relu1_1", "style/relu2_1"),
        ]
        assert line["size"] == 32
        assert line["total"] == pytest.approx(line["content"] + line["style"] + line["tv"])
        assert line["style"] == pytest.approx(line["style/relu1_1"] + line["style/relu2_1"])
        assert line["content"] == line["content/relu2_1"]
        assert line["tv"] > 0
    assert total(result)[-1] < total(result)[0]


@pytest.mark.parametrize("tile", [0, 16])
@pytest.mark.parametrize("alone", ["content", "style", "tv"])
def test_each_term_alone(run, alone, tile):
    weights = {f"{name}_weight": 10.0 if name == alone else 0.0 for name in ("content", "style", "tv")}
    losses = run(**weights, init="noise", steps=4, tile=tile).losses
    assert losses[4]["total"] == losses[4][alone] < losses[0]["total"]
    assert {name.split("/")[0] for name in losses[0] if "/" in name} == {alone} - {"tv"}


def test_the_style_weights_are_relative_and_sum_to_beta(narrow):
    texts = ("3:relu1_1", "1:relu2_1")
    made = objective_of(Settings(style_layers=texts, style_weight=8.0, content_layers=("relu2_2",)), narrow)
    assert made.style == (("relu1_1", 6.0), ("relu2_1", 2.0))
    assert made.content == (("relu2_2", 1.0),)
    for same in (("3:relu1_1,1:relu2_1",), ("3:relu1_1, relu2_1",)):
        assert objective_of(Settings(style_layers=same, style_weight=8.0), narrow).style == made.style


def test_the_papers_layers_as_far_as_there_are_weights(narrow):
    whole = objective_of(Settings(), narrow)
    assert whole.content == (("relu4_2", 1.0),)
    assert dict(whole.style) == dict.fromkeys(network.PAPER_STYLE, 200.0)
    short = replace(narrow, layers=narrow.layers[: narrow.layers.index("relu3_1") + 1])
    part = objective_of(Settings(), short)
    assert part.content == (("relu3_1", 1.0),)
    assert [name for name, _ in part.style] == ["relu1_1", "relu2_1", "relu3_1"]


# --- where it begins and how it ends -------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["content", "noise", "statistics"])
def test_no_steps_give_the_picture_that_it_begins_with(run, init):
    result = run(init=init, steps=0, seed=5)
    content, style = pictures.to_array(CONTENT), pictures.to_array(pictures.scaled(STYLE, (32, 29)))
    expected = pictures.start(init, content=content, styles=[style], seed=5)
    np.testing.assert_array_equal(result.pictures[0], pictures.to_picture(expected[0]))
    assert [line["step"] for line in result.losses] == [0]


def test_it_begins_with_a_picture_of_any_size(run):
    result = run(init="whatever", steps=0, options={"start": OTHER})
    np.testing.assert_array_equal(result.pictures[0], pictures.scaled(OTHER, (24, 32)))


def test_the_same_seed_gives_the_same_bytes_and_another_does_not(run):
    one, same, other = (run(init="noise", seed=seed) for seed in (1, 1, 2))
    assert one.pictures[0].tobytes() == same.pictures[0].tobytes()
    assert one.losses == same.losses
    assert (one.pictures[0] != other.pictures[0]).mean() > 0.5


def test_it_ends_early_once_little_changes(run):
    full = run(optimizer="adam", steps=60)
    early = run(optimizer="adam", steps=60, tolerance=0.2)
    assert (full.stopped, early.stopped) == ("steps", "tolerance")
    assert early.losses == full.losses[: len(early.losses)]
    totals = total(full)
    change = np.abs(totals[:-10] - totals[10:]) / totals[10:]
    assert len(early.losses) == 11 + np.argmax(change < 0.2) < 61


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_a_picture_that_is_already_right_stays(run, optimizer):
    result = run(Style(CONTENT), optimizer=optimizer, steps=5, content_weight=0.0)
    assert np.abs(result.pictures[0].astype(int) - CONTENT).max() <= (26 if optimizer == "adam" else 1)
    assert result.losses[0]["total"] < 1e-3


# --- a loss that is not finite -------------------------------------------------------------------------------


def test_a_step_too_far_keeps_the_last_good_picture(run):
    result = run(optimizer="adam", learning_rate=1e30)
    assert result.stopped == "not finite"
    assert [line["step"] for line in result.losses] == [0]
    np.testing.assert_array_equal(result.pictures[0], CONTENT)
    json.dumps(result.losses, allow_nan=False)


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_a_loss_that_is_not_finite_to_begin_with(run, optimizer):
    with pytest.raises(TrainingFailed, match="not finite to begin with"):
        run(optimizer=optimizer, style_weight=1e38)


def test_the_picture_before_a_scale_that_fails_is_kept_at_its_size(run, monkeypatch):
    real = transfer._enlarged

    def broken(*args):
        enlarged = real(*args)
        return enlarged._replace(state=enlarged.state._replace(point=enlarged.state.point * jnp.nan))

    monkeypatch.setattr(transfer, "_enlarged", broken)
    result = run(optimizer="adam", scales=2, steps=3)
    assert result.stopped == "not finite"
    assert {line["size"] for line in result.losses} == {23}
    assert result.pictures[0].shape == (24, 32, 3)
    assert result.pictures[0].std() > 5


def test_a_batch_stops_as_one(narrow):
    """One picture of two cannot go on: neither does the other, whose log would stand beside no value."""
    content, settings = CONTENT, Settings(size=32, steps=4, optimizer="adam", **LAYERS)
    work = transfer._Run(content, [[Style(STYLE)], [Style(OTHER)]], narrow, settings, None, None)
    job = work._prepare(0)
    carry = work._begun(job.content)
    point = carry.state.point.at[1].set(jnp.inf)
    carry = carry._replace(state=carry.state._replace(point=point))
    after, stopped = work._optimise(0, job, carry, 0, lambda step: None, StopRequest())
    assert (stopped, work.losses) == ("not finite", [])
    np.testing.assert_array_equal(after.state.x, np.broadcast_to(job.content, (2, 24, 32, 3)))


# --- scales, averages, tiles ---------------------------------------------------------------------------------


def test_scales_grow_to_the_size_and_carry_adams_moments(run, monkeypatch):
    seen = []
    real = transfer._enlarged

    def spied(*args):
        after = real(*args)
        seen.append((jax.device_get(args[-1].state.inner[0]), jax.device_get(after.state.inner[0])))
        return after

    monkeypatch.setattr(transfer, "_enlarged", spied)
    result = run(optimizer="adam", steps=3, scales=3)
    assert [line["size"] for line in result.losses] == [16] * 4 + [23] * 4 + [32] * 4
    assert [line["step"] for line in result.losses] == [0, 1, 2, 3, 3, 4, 5, 6, 6, 7, 8, 9]
    assert result.pictures[0].shape == (24, 32, 3)
    assert [int(before.count) for before, _ in seen] == [4, 8]
    for (before, after), size in zip(seen, [(17, 23), (24, 32)], strict=True):
        assert after.count == before.count
        assert before.mu.shape[1:3] != after.mu.shape[1:3] == size
        for moment in ("mu", "nu"):
            old, new = getattr(before, moment), getattr(after, moment)
            np.testing.assert_allclose(new, jax.image.resize(old, new.shape, "linear"), rtol=1e-6)
            assert np.abs(new).max() > 0
        assert (after.nu >= 0).all()
        assert not after.mu[after.nu == 0].any()  # else the next step would be without bound


def test_the_average_over_the_steps(run):
    def frames(ema: float) -> list[np.ndarray]:
        seen = []
        options = {"callback": lambda step: seen.append(step.pictures()[0])}
        run(optimizer="adam", steps=8, ema=ema, content=CONTENT // 3 + 80, options=options)
        return seen

    plain, averaged = frames(0.0), frames(0.7)
    mean = plain[0].astype(float)
    for raw, found in zip(plain, averaged, strict=True):
        mean = 0.7 * mean + 0.3 * raw
        np.testing.assert_allclose(found, mean, atol=1.6)  # the plain ones are rounded, and rounding adds up
    assert (plain[-1] != averaged[-1]).any()


@pytest.mark.parametrize("optimizer", ["adam", "lbfgs"])
def test_tiles_change_nothing(run, optimizer):
    whole, tiled = (run(optimizer=optimizer, steps=3, tile=tile) for tile in (0, 16))
    np.testing.assert_allclose(total(tiled), total(whole), rtol=1e-4)
    assert np.abs(tiled.pictures[0].astype(int) - whole.pictures[0]).max() <= 1


# --- styles --------------------------------------------------------------------------------------------------


def test_a_batch_of_styles_equals_each_alone(narrow):
    settings = Settings(size=32, steps=4, optimizer="adam", init="noise", tv_weight=0.1, **LAYERS)
    groups = [[Style(STYLE), Style(OTHER, 0.5)], [Style(OTHER), Style(CONTENT)]]
    both = stylize_each(CONTENT, groups, network=narrow, settings=settings)
    assert len(both.pictures) == 2
    for i, group in enumerate(groups):
        alone = stylize(CONTENT, group, network=narrow, settings=settings)
        for line, expected in zip(both.losses, alone.losses, strict=True):
            assert {name: value[i] for name, value in line.items() if isinstance(value, list)} == pytest.approx(
                {name: value for name, value in expected.items() if name not in ("step", "size")}, rel=1e-4
            )
        assert np.abs(both.pictures[i].astype(int) - alone.pictures[0]).max() <= 1


def test_blended_styles_count_by_their_weights(run):
    def style(*styles: Style) -> float:
        return run(*styles, steps=0).losses[0]["style"]

    one, other = style(Style(STYLE)), style(Style(OTHER))
    assert style(Style(STYLE, 3.0), Style(OTHER)) == pytest.approx(0.75 * one + 0.25 * other, rel=1e-4)
    assert style(Style(STYLE, 3e38), Style(STYLE, 3e38)) == pytest.approx(one, rel=1e-4)


def test_the_styles_scale_is_that_of_its_longer_side(run):
    half = pictures.scaled(STYLE, (16, 14))
    one, same = run(Style(STYLE), style_scale=0.5), run(Style(half), style_scale=0.5)
    np.testing.assert_array_equal(one.pictures[0], same.pictures[0])
    assert one.losses == same.losses != run(Style(STYLE)).losses


def test_masks_part_the_picture(run):
    """Where no style counts nothing pulls, and so Adam does not move it; the mask is of another size."""
    left, right = np.zeros((6, 8)), np.zeros((12, 16))
    left[:, :4], right[:, 8:] = 1, 1
    options: dict[str, Any] = {"optimizer": "adam", "style_layers": ("relu1_1",), "content_weight": 0.0, "steps": 5}
    moved = [
        np.abs(run(Style(STYLE, mask=mask), **options).pictures[0].astype(int) - CONTENT).max((0, 2))
        for mask in (left, right)
    ]
    assert moved[0][:14].min() > 0 == moved[0][20:].max()
    assert moved[1][18:].min() > 0 == moved[1][:12].max()
    everywhere, none = (run(Style(STYLE, mask=mask), steps=0).losses[0] for mask in (np.ones((3, 3)), None))
    assert everywhere == pytest.approx(none)


def test_original_colours_are_kept(run):
    seen = []
    real = pictures.coloured
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pictures, "coloured", lambda x, content: seen.append(real(x, content)) or seen[-1])
        result = run(preserve_colors=True, steps=8)
    (found,) = seen
    expected = pictures.to_array(CONTENT)
    np.testing.assert_allclose(found @ YIQ[1:].T, expected @ YIQ[1:].T, atol=1e-5)
    assert np.abs(np.asarray(found - expected) @ YIQ[0]).max() > 0.02
    np.testing.assert_array_equal(result.pictures[0], pictures.to_picture(found[0]))
    start = run(preserve_colors=True, steps=0).pictures[0]
    assert np.abs(start.astype(int) - CONTENT).max() <= 1


# --- stopped and gone on with --------------------------------------------------------------------------------


class Killed(BaseException):
    """Ends the process in the eyes of the code under test: nothing catches it."""


CASES = {
    "adam": {"optimizer": "adam", "scales": 2, "steps": 12, "ema": 0.5, "init": "noise", "seed": 3},
    "lbfgs": {"optimizer": "lbfgs", "scales": 2, "steps": 12, "ema": 0.5, "init": "noise", "seed": 3},
}


def outcome(result: Stylized) -> tuple[bytes, list[dict[str, Any]], str]:
    return result.pictures[0].tobytes(), result.losses, result.stopped


def until(done: int, then: Callable[[], None], seen: list[int]) -> Callable[[transfer.Step], None]:
    def callback(step: transfer.Step) -> None:
        seen.append(step.done)
        if step.done == done:
            then()

    return callback


def terminated(run, directory: Path, done: int, case: dict[str, Any]) -> list[int]:
    """Runs until SIGTERM comes in step `done`; which steps were called back."""
    stop, seen = StopRequest(), []

    def ask() -> None:
        stop.signum = signal.SIGTERM

    with pytest.raises(Stopped) as stopped:
        run(
            **case,
            options={"checkpoints": Checkpoints(directory), "stop": stop, "callback": until(done, ask, seen)},
        )
    assert stopped.value.exit_code == 143
    return seen


def gone_on(run, directory: Path, case: dict[str, Any]) -> tuple[Stylized, list[int]]:
    seen: list[int] = []
    options = {"checkpoints": Checkpoints(directory), "callback": until(-1, lambda: None, seen)}
    return run(**case, options=options), seen


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("done", [13, *(pytest.param(done, marks=pytest.mark.slow) for done in (1, 14, 25))])
def test_stopped_and_started_again_ends_in_the_same_bits(run, tmp_path, case, done):
    """13 is the last step of the first scale, 14 the first of the second, 25 the last but one."""
    before = terminated(run, tmp_path / "checkpoints", done, CASES[case])
    result, after = gone_on(run, tmp_path / "checkpoints", CASES[case])
    assert [*before, *after] == [*range(1, 27)]
    assert outcome(result) == outcome(run(**CASES[case]))


@pytest.fixture
def hasty(monkeypatch):
    """A clock by which every look takes longer than the time between checkpoints."""

    class Clock:
        now = 0.0

        def monotonic(self) -> float:
            self.now += 31.0
            return self.now

    monkeypatch.setattr(transfer, "time", Clock())


@pytest.mark.usefixtures("hasty")
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("done", [pytest.param(5, marks=pytest.mark.slow), 22])
def test_killed_between_checkpoints_ends_in_the_same_bits(run, tmp_path, case, done):
    def kill() -> None:
        raise Killed

    options = {"checkpoints": Checkpoints(tmp_path / "checkpoints"), "callback": until(done, kill, [])}
    with pytest.raises(Killed):
        run(**CASES[case], options=options)
    result, after = gone_on(run, tmp_path / "checkpoints", CASES[case])
    assert after == [*range(after[0], 27)]
    assert after[0] <= done
    assert (after[0] > 1) == (done > 11)  # saved at first, and every ten steps
    assert outcome(result) == outcome(run(**CASES[case]))


def test_a_finished_one_asked_again_is_the_same(run, tmp_path):
    terminated(run, tmp_path / "checkpoints", 20, CASES["adam"])
    first, _ = gone_on(run, tmp_path / "checkpoints", CASES["adam"])
    again, _ = gone_on(run, tmp_path / "checkpoints", CASES["adam"])
    assert outcome(again) == outcome(first)


def test_stopped_before_anything_leaves_nothing(run, tmp_path):
    stop = StopRequest()
    stop.signum = signal.SIGINT
    with pytest.raises(Stopped) as stopped:
        run(options={"checkpoints": Checkpoints(tmp_path / "checkpoints"), "stop": stop})
    assert stopped.value.exit_code == 130
    assert list(tmp_path.iterdir()) == []


def test_an_unfinished_picture_of_other_settings_or_inputs_is_refused(run, narrow, tmp_path):
    case = {**CASES["adam"], "scales": 1}
    terminated(run, tmp_path / "checkpoints", 3, case)
    mask = np.ones((4, 4))
    again = partial(run, options={"checkpoints": Checkpoints(tmp_path / "checkpoints")})
    for call, message in (
        (lambda: again(**{**case, "seed": 4}), r"\(seed: 3 -> 4\)"),
        (lambda: again(**{**case, "size": 48, "steps": 3}), r"\(size: 32 -> 48; steps: 12 -> 3\)"),
        (lambda: again(**case, content=OTHER), r"\(content: '\w{16}' -> '\w{16}'\)"),
        (lambda: again(Style(OTHER), **case), r"\(style 0\.0: \['\w{16}', 1\.0, None\] -> \['\w{16}', 1\.0, None\]\)"),
        (lambda: again(Style(STYLE, 2.0), **case), r"1\.0, None\] -> \['\w{16}', 2\.0, None\]\)"),
        (lambda: again(Style(STYLE, mask=mask), **case), r"1\.0, None\] -> \['\w{16}', 1\.0, '\w{16}'\]\)"),
        (lambda: again(Style(STYLE), Style(OTHER), **case), r"\(style 0\.1: None -> \["),
        (
            lambda: run(**case, options={"checkpoints": Checkpoints(tmp_path / "checkpoints"), "start": OTHER}),
            r"\(start: None -> '\w{16}'\)",
        ),
    ):
        with pytest.raises(InputError, match=message) as refused:
            call()
        assert f"{tmp_path / 'checkpoints'} holds an unfinished picture" in str(refused.value)
        assert "give those again, or another output, or delete it" in str(refused.value)
    settings = Settings(**{"size": 32, **LAYERS, **case})
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for weights, message in (
        (network.random(width=2, seed=1), r"\(weights: '\w{16}' -> '\w{16}'\)"),
        (network.random(width=2, pooling="avg"), r"\(pooling: 'max' -> 'avg'\)"),
    ):
        with pytest.raises(InputError, match=message):
            stylize(CONTENT, [Style(STYLE)], network=weights, settings=settings, checkpoints=checkpoints)
    result, _ = gone_on(run, tmp_path / "checkpoints", case)  # it is still there
    assert outcome(result) == outcome(run(**case))


def test_after_damage_the_picture_is_begun_anew(run, tmp_path, capsys):
    terminated(run, tmp_path / "checkpoints", 9, CASES["adam"])
    (file, *_) = sorted((tmp_path / "checkpoints" / "9" / "state" / "ocdbt.process_0" / "d").iterdir())
    data = bytearray(file.read_bytes())
    data[-1] ^= 128
    file.write_bytes(data)
    result, after = gone_on(run, tmp_path / "checkpoints", CASES["adam"])
    assert after == [*range(1, 27)]
    assert outcome(result) == outcome(run(**CASES["adam"]))
    said = capsys.readouterr().out
    assert "checkpoints/9 is damaged" in said
    assert "no whole checkpoint is left: the picture is begun anew" in said


@pytest.mark.usefixtures("hasty")
def test_a_checkpoint_that_cannot_be_written_is_reported_and_the_work_goes_on(run, tmp_path, monkeypatch):
    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_write_manifest", full)
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path / "checkpoints", report=said.append)
    result = run(**CASES["adam"], options={"checkpoints": checkpoints})
    assert outcome(result) == outcome(run(**CASES["adam"]))
    assert len(said) > 1
    assert "No space left on device" in said[0]
    assert "; the next one tries again" in said[0]
    assert checkpoints.steps() == []


# --- what is refused -----------------------------------------------------------------------------------------


@pytest.fixture
def nothing_runs(monkeypatch):
    def ran(*_: Any, **__: Any) -> None:
        raise AssertionError("bad input came as far as compilation")

    for name in ("_features", "_moments", "_step", "_told"):
        monkeypatch.setattr(transfer, name, ran)


SMALL = picture(7, 40)


@pytest.mark.usefixtures("nothing_runs")
@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"init": "nosie"}, {}, "unknown init 'nosie': did you mean 'noise'"),
        ({"optimizer": "lbgfs"}, {}, "did you mean 'lbfgs'"),
        ({"style_loss": "garm"}, {}, "did you mean 'gram'"),
        ({"content_layers": ("relu4_9",)}, {}, "'relu4_9': did you mean 'relu4_"),
        ({"style_layers": ("1:relu1_1,x:relu2_1",)}, {}, "'x:relu2_1': did you mean 'relu2_1'"),
        ({"style_layers": ("relu1_1", "2:relu1_1")}, {}, "layer relu1_1 is given twice"),
        ({"style_layers": ("0:relu1_1",)}, {}, "'relu1_1' has weight 0"),
        ({"style_layers": ("relu1_1,",)}, {}, "'' names nothing"),
        ({"content_layers": ("relu5_1",), "size": 12}, {}, "12 x 9 pixels, fewer than the stride of relu5_1, 16"),
        ({"content_layers": ("relu5_1",), "scales": 5}, {}, "the picture at its first scale has 8 x 6 pixels"),
        ({"style_layers": ("relu5_1",), "style_scale": 0.25}, {}, "a style image at its scale has 7 x 8 pixels"),
        ({"content_layers": ("relu4_1",), "size": 256}, {"content": SMALL}, "40 x 7 pixels.* stride of relu4_1, 8"),
        ({"tile": 17}, {}, "tile 17: expected a multiple of 2"),
        ({"size": 40_000}, {}, "40000 x 30000 pixels: expected at most"),
        ({"style_scale": 1000.0}, {}, "pixels: expected at most"),
        ({}, {"content": CONTENT / 255}, "the content image is float64"),
        ({}, {"options": {"start": CONTENT[..., 0]}}, r"to start from is uint8 of shape \(24, 32\)"),
    ],
)
def test_bad_input_is_refused_before_anything_is_compiled(run, settings, options, message):
    with pytest.raises(InputError, match=message):
        run(**settings, **options)


@pytest.mark.usefixtures("nothing_runs")
def test_groups_that_are_none(narrow):
    masked = Style(STYLE, mask=np.ones((4, 4)))
    for groups, message in (
        ([], "give a style image"),
        ([[]], "give a style image"),
        ([[Style(STYLE)], [Style(STYLE), Style(OTHER)]], "as many for every picture"),
        ([[Style(STYLE)], [masked]], "masks belong to one picture"),
    ):
        with pytest.raises(InputError, match=message):
            stylize_each(CONTENT, groups, network=narrow, settings=Settings())


# --- how far it gets -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("init", ["noise", "content"])
def test_200_steps_of_lbfgs_bring_the_total_under_a_twentieth(narrow, init):
    settings = Settings(size=48, steps=200, init=init)
    result = stylize(picture(36, 48), [Style(picture(48, 48))], network=narrow, settings=settings)
    assert total(result)[-1] < 0.05 * total(result)[0]
    assert result.losses[-1]["step"] == 200
