"""The search: where it draws, what it stops, and that a killed one ends as if nothing had happened."""

import contextlib
import dataclasses
import inspect
import itertools
import json
import math
import os
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import numpy as np
import optax
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.figure import Figure
from rich.console import Console
from scipy import stats

import jaxcnn.search
from jaxcnn import parallel, search_report
from jaxcnn.data import sources
from jaxcnn.errors import InputError, TrainingFailed
from jaxcnn.search import Choice, IntUniform, LogUniform, SearchResult, Trial, TrialStopped, Uniform, narrowed, search
from jaxcnn.signals import Stopped
from jaxcnn.train import fit

SPACE: dict[str, Any] = {
    "rate": LogUniform(1e-4, 1),
    "momentum": Uniform(0, 1),
    "width": IntUniform(4, 64),
    "act": Choice(("relu", "tanh")),
}


def objective(params, report):
    """Best at a rate of 0.01; fails at a large momentum."""
    final = 1 - 0.1 * math.log10(params["rate"] / 0.01) ** 2 - 0.05 * (params["act"] == "tanh")
    for step in (1, 2, 3):
        if step == 2 and params["momentum"] > 0.7:
            raise TrainingFailed("not finite")
        report(step, final * step / 3)
    return final


PROGRAM = f"""
import math, time
from jaxcnn.errors import TrainingFailed
from jaxcnn.search import Choice, IntUniform, LogUniform, Uniform, search

{inspect.getsource(objective)}

def slow(params, report):
    def late(step, score):
        time.sleep(0.02)
        report(step, score)
    return objective(params, late)

search(slow, {SPACE}, trials=20, seed=3, rounds=2, directory=DIRECTORY)
"""


def lines(directory: Path) -> list[bytes]:
    path = directory / "trials.jsonl"
    return path.read_bytes().splitlines(keepends=True) if path.exists() else []


def uninterrupted(**options) -> SearchResult:
    return search(objective, SPACE, **{"trials": 20, "seed": 3, "rounds": 2, **options})


def test_a_search_killed_twice_ends_as_the_uninterrupted_one(tmp_path):
    program = PROGRAM.replace("DIRECTORY", repr(str(tmp_path)))
    for enough in (4, 11):
        process = subprocess.Popen([sys.executable, "-c", program])
        deadline = time.monotonic() + 120
        while len(lines(tmp_path)) < enough and time.monotonic() < deadline:
            assert process.poll() is None
            time.sleep(0.005)
        process.kill()
        assert process.wait() == -signal.SIGKILL
        assert enough <= len(lines(tmp_path)) < 20
    resumed, whole = uninterrupted(directory=tmp_path), uninterrupted()
    assert resumed.trials == whole.trials
    assert resumed.best == whole.best
    assert {trial.state for trial in whole.trials} == {"complete", "stopped", "failed"}


@pytest.mark.parametrize("kept", [0, 1, 40, -1])
def test_a_line_cut_short_is_run_again(tmp_path, kept):
    whole = uninterrupted(directory=tmp_path)
    written = lines(tmp_path)
    (tmp_path / "trials.jsonl").write_bytes(b"".join(written[:9]) + written[9][:kept])
    called = []
    resumed = uninterrupted(directory=tmp_path, on_trial=lambda trial: called.append(trial.number))
    assert called == list(range(9, 20))
    assert resumed.trials == whole.trials
    assert len(lines(tmp_path)) == 20


@pytest.mark.parametrize("pruner", ["median", "halving", "none"])
@pytest.mark.parametrize("at", [1, 7, 13])
def test_every_pruner_resumes_after_every_kind_of_trial(tmp_path, pruner, at):
    whole = uninterrupted(directory=tmp_path, pruner=pruner)
    (tmp_path / "trials.jsonl").write_bytes(b"".join(lines(tmp_path)[:at]))
    assert uninterrupted(directory=tmp_path, pruner=pruner).trials == whole.trials
    assert any(trial.state == "stopped" for trial in whole.trials) == (pruner != "none")


def test_a_finished_search_calls_nothing_and_the_file_is_plain_json(tmp_path):
    whole = uninterrupted(directory=tmp_path)

    def never(params, report):
        raise AssertionError

    assert search(never, SPACE, trials=20, seed=3, rounds=2, directory=tmp_path).trials == whole.trials
    first = json.loads(lines(tmp_path)[0])
    assert first["number"] == 0
    assert first["params"] == whole.trials[0].params
    assert [tuple(report) for report in first["reports"]] == list(whole.trials[0].reports)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"space": {**SPACE, "rate": LogUniform(1e-3, 1)}}, r"space.rate.low: 0.0001 -> 0.001"),
        ({"space": {"rate": SPACE["rate"]}}, "space.momentum"),
        ({"seed": 4}, "seed: 3 -> 4"),
        ({"rounds": 1}, "rounds: 2 -> 1"),
        ({"pruner": "none"}, 'pruner: "median" -> "none"'),
        ({"trials": 21}, r"trials: 20 -> 21\n.*cannot grow"),
        ({"about": {"data": "mnist"}}, 'data: null -> "mnist"'),
    ],
)
def test_another_search_in_the_directory_is_refused_with_the_difference(tmp_path, changed, message):
    uninterrupted(directory=tmp_path)
    arguments = {"space": SPACE, "trials": 20, "seed": 3, "rounds": 2, "directory": tmp_path, **changed}
    with pytest.raises(InputError, match=message):
        search(objective, arguments.pop("space"), **arguments)
    assert len(lines(tmp_path)) == 20


def test_one_round_goes_on_to_more_trials(tmp_path):
    uninterrupted(rounds=1, trials=8, directory=tmp_path)
    longer = uninterrupted(rounds=1, directory=tmp_path)
    assert longer.trials == uninterrupted(rounds=1).trials
    assert uninterrupted(rounds=1, trials=8, directory=tmp_path).trials == longer.trials[:8]


def test_the_seed_and_not_the_order_of_the_space_decides():
    backwards = dict(reversed(SPACE.items()))
    assert search(objective, backwards, trials=20, seed=3, rounds=2).trials == uninterrupted().trials
    assert uninterrupted(seed=4).trials[0].params != uninterrupted().trials[0].params


def test_draws_cover_decades_intervals_numbers_and_choices_evenly():
    found = search(lambda params, report: 0.0, SPACE, trials=400, pruner="none")
    draws = {name: [trial.params[name] for trial in found.trials] for name in SPACE}
    assert stats.kstest(np.log10(draws["rate"]), stats.uniform(-4, 4).cdf).pvalue > 0.01
    decades = np.histogram(np.log10(draws["rate"]), bins=4, range=(-4, 0))[0]
    assert decades.sum() == 400
    assert stats.chisquare(decades).pvalue > 0.01
    assert stats.kstest(draws["momentum"], "uniform").pvalue > 0.01
    assert set(draws["width"]) <= set(range(4, 65))
    assert stats.chisquare(np.bincount(np.array(draws["width"]) - 4, minlength=61)).pvalue > 0.01
    assert stats.binomtest(draws["act"].count("relu"), 400).pvalue > 0.01


def complete(number: int, score: float, **params) -> Trial:
    return Trial(number, params, "complete", score)


@given(st.lists(st.floats(-4, 0), min_size=1, max_size=30), st.integers(1, 4))
def test_narrowed_ranges_halve_and_hold_the_best_inside_the_bounds(exponents, round_):
    space: dict[str, Any] = {
        "rate": LogUniform(1e-4, 1),
        "x": Uniform(-4, 0),
        "n": IntUniform(-4, 0),
        "c": Choice((1, 2)),
    }
    trials = [
        complete(i, -abs(e + 1), rate=min(max(10**e, 1e-4), 1), x=e, n=round(e), c=1) for i, e in enumerate(exponents)
    ]
    found: dict[str, Any] = narrowed(space, trials, round_)  # type: ignore[assignment]
    best = max(trials, key=lambda trial: (trial.score, -trial.number)).params
    for name in ("rate", "x", "n"):
        assert space[name].low <= found[name].low < found[name].high <= space[name].high
        assert found[name].low - 1e-12 <= best[name] <= found[name].high + 1e-12
    assert math.log10(found["rate"].high / found["rate"].low) == pytest.approx(4 / 2**round_)
    assert found["x"].high - found["x"].low == pytest.approx(4 / 2**round_)
    assert found["n"].high - found["n"].low <= 4 / 2**round_ + 2
    assert found["c"] == space["c"]


def test_narrowed_centres_on_the_best_quarter_on_the_scale_of_the_range():
    trials = [complete(i, -i, rate=rate, x=rate) for i, rate in enumerate([1e-3, 1e-1, 1, 1, 1, 1, 1, 1])]
    found: dict[str, Any] = narrowed({"rate": LogUniform(1e-6, 1e2), "x": Uniform(0, 1)}, trials, 2)  # type: ignore[assignment]
    assert (found["rate"].low, found["rate"].high) == pytest.approx((1e-3, 1e-1))
    assert (found["x"].low, found["x"].high) == pytest.approx((0, 0.25))


def test_failed_and_stopped_trials_narrow_nothing():
    trials = [Trial(0, {"rate": 0.1}, "failed", None), Trial(1, {"rate": 0.1}, "stopped", 0.9)]
    assert narrowed({"rate": SPACE["rate"]}, trials, 1) == {"rate": SPACE["rate"]}


def test_rounds_come_closer_to_the_best_rate():
    def peak(params, report):
        return -abs(math.log10(params["rate"] / 0.01))

    found = search(peak, {"rate": SPACE["rate"]}, trials=40, rounds=4)
    distances = [-(trial.score or 0.0) for trial in found.trials]
    distance = [np.mean(distances[i : i + 10]) for i in range(0, 40, 10)]
    assert all(later < earlier for earlier, later in itertools.pairwise(distance))
    assert distance[3] < 0.2
    assert min(distances) < 0.1


def test_a_bad_trial_is_stopped_with_its_last_score():
    def trial(params, report):
        score = 1.0 if report.trial < 6 else 0.5
        for step in range(10):
            report(step, score + 0.01 * step)
        return score

    found = search(trial, {"x": Uniform(0, 1)}, trials=8)
    assert [one.state for one in found.trials] == ["complete"] * 6 + ["stopped"] * 2
    assert found.trials[6].score == 0.5
    assert found.trials[6].reports == ((0, 0.5),)
    assert "step 0" in found.trials[6].reason
    assert found.best.number == 0


def test_a_trial_that_does_not_heed_the_stop_is_stopped_all_the_same():
    def stubborn(params, report):
        if report.trial < 6:
            report(1, 1.0)
            return 1.0
        with contextlib.suppress(TrialStopped):
            report(1, 0.1)
        return 2.0

    assert search(stubborn, {"x": Uniform(0, 1)}, trials=7).trials[6].state == "stopped"


def test_scores_that_are_no_numbers_and_failures_rank_last(tmp_path):
    def unsound(params, report):
        if report.trial == 0:
            report(1, math.inf)
        if report.trial == 1:
            raise TrainingFailed("20 steps were skipped")
        return [0.0, 0.0, math.nan, np.float32(0.25)][report.trial]

    found = search(unsound, {"x": Uniform(0, 1)}, trials=4, directory=tmp_path)
    assert [trial.state for trial in found.trials] == ["failed", "failed", "failed", "complete"]
    assert [trial.score for trial in found.trials] == [None, None, None, 0.25]
    assert [trial.reason for trial in found.trials] == ["score inf at step 1", "20 steps were skipped", "score nan", ""]
    assert [trial.number for trial in found.ranked] == [3, 0, 1, 2]
    assert search(unsound, {"x": Uniform(0, 1)}, trials=4, directory=tmp_path) == found


def test_where_no_trial_is_completed_there_is_no_best():
    def fails(params, report):
        raise TrainingFailed("diverged")

    with pytest.raises(TrainingFailed, match="none of 2 trials was completed; one of them: diverged"):
        _ = search(fails, {"x": Uniform(0, 1)}, trials=2).best


@pytest.mark.parametrize("error", [RuntimeError("disk"), KeyboardInterrupt()])
def test_any_other_exception_ends_the_search_and_keeps_what_was_finished(tmp_path, error):
    def breaks(params, report):
        if report.trial == 5:
            raise error
        return objective(params, report)

    with pytest.raises(type(error)):
        search(breaks, SPACE, trials=20, seed=3, rounds=2, directory=tmp_path)
    assert len(lines(tmp_path)) == 5
    assert uninterrupted(directory=tmp_path).trials == uninterrupted().trials


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_signals_stop_the_search_at_the_next_report(tmp_path, signum, code):
    def signalled(params, report):
        if report.trial == 2:
            os.kill(os.getpid(), signum)
        return objective(params, report)

    with pytest.raises(Stopped) as stopped:
        search(signalled, SPACE, trials=20, seed=3, rounds=2, directory=tmp_path)
    assert stopped.value.exit_code == code
    assert len(lines(tmp_path)) == 2
    assert uninterrupted(directory=tmp_path).trials == uninterrupted().trials


def test_two_processes_cannot_share_a_directory(tmp_path):
    def nested(params, report):
        with pytest.raises(InputError, match="in use by another process"):
            search(objective, SPACE, trials=20, directory=tmp_path)
        return 0.0

    search(nested, SPACE, trials=1, directory=tmp_path)


def test_a_damaged_record_is_an_error_that_names_the_line(tmp_path):
    uninterrupted(directory=tmp_path)
    written = lines(tmp_path)
    for damaged in (b"{}\n", b'{"number": 1\n', written[2]):
        (tmp_path / "trials.jsonl").write_bytes(written[0] + damaged + b"".join(written[2:]))
        with pytest.raises(InputError, match=r"trials.jsonl, line 2 is"):
            uninterrupted(directory=tmp_path)
    values = json.loads(written[1])
    values["params"]["rate"] *= 2
    (tmp_path / "trials.jsonl").write_bytes(written[0] + json.dumps(values).encode() + b"\n")
    with pytest.raises(InputError, match="trial 1 was made with"):
        uninterrupted(directory=tmp_path)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Uniform(1, 1), "lower one first"),
        (lambda: Uniform(0, math.inf), "finite"),
        (lambda: LogUniform(0, 1), "above 0"),
        (lambda: IntUniform(0.5, 3), "whole numbers"),
        (lambda: Choice(()), "at least one"),
        (lambda: Choice((1, 1)), "each once"),
        (lambda: Choice((None,)), "numbers, texts or booleans"),  # type: ignore[arg-type]
        (lambda: search(objective, {}, trials=1), "space is empty"),
        (lambda: search(objective, SPACE, trials=2, rounds=3), "every round with"),
        (lambda: search(objective, SPACE, trials=0), "every round with"),
        (lambda: search(objective, SPACE, trials=100, rounds=31), "at most 30"),
        (lambda: search(objective, SPACE, trials=1, seed=-1), "negative"),
        (lambda: search(objective, SPACE, trials=1, pruner="mean"), "unknown pruner 'mean': did you mean 'median'"),  # type: ignore[arg-type]
        (lambda: search(lambda params, report: None, SPACE, trials=1), "gave None as a score"),  # type: ignore[arg-type]
        (lambda: search(lambda params, report: report(2, 1.0) or report(2, 1.0), SPACE, trials=1), "steps must grow"),  # type: ignore[arg-type]
    ],
)
def test_bad_input_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


def test_without_optuna_the_remedy_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(InputError, match=r'pip install "jaxcnn\[search\]"'):
        search(objective, SPACE, trials=1)


def test_the_users_own_module_of_the_docstring_goes_through_fit(tmp_path, monkeypatch):
    digits = sources.load("digits", image_size=(8, 8)).train
    images = digits.images.astype(np.float32) / 255
    short = {"steps": 6, "eval_every": 3, "batch_size": 64, "mesh": parallel.make_mesh(jax.devices()[:1])}
    names: dict[str, Any] = {**vars(jaxcnn.search), "nn": nn, "optax": optax, "__name__": "own"}
    names["train"], names["validation"] = (images[:256], digits.labels[:256]), (images[256:384], digits.labels[256:384])
    names["fit"] = lambda *args, **options: fit(*args, **{**options, **short})
    names["search"] = lambda *args, **options: search(*args, **{**options, "trials": 2})
    monkeypatch.chdir(tmp_path)
    code = textwrap.dedent(str(jaxcnn.search.__doc__).split("anywhere:\n\n")[1])
    exec(compile(code, "docstring", "exec"), names)
    trials = names["found"].trials
    assert [[step for step, _ in trial.reports] for trial in trials] == [[3, 6], [3, 6]]
    assert names["found"].best.score == max(score for trial in trials for _, score in trial.reports) > 0.1
    assert len(lines(tmp_path / "checkpoints" / "my_search")) == 2


def test_the_table_shows_the_best_first(tmp_path):
    found = uninterrupted()
    console = Console(width=200, record=True)
    console.print(search_report.table(found))
    rows = [line for line in console.export_text().splitlines() if line.startswith("│")]
    assert len(rows) == 20
    assert rows[0].split("│")[1].strip() == str(found.best.number)
    assert "not finite" in rows[-1]


def test_the_picture_has_a_panel_for_each_parameter_on_its_scale(tmp_path, monkeypatch):
    drawn = []
    save = Figure.savefig
    monkeypatch.setattr(Figure, "savefig", lambda figure, *a, **k: (drawn.append(figure), save(figure, *a, **k))[1])
    search_report.plot(uninterrupted(), tmp_path / "trials.png", title="a title", score="accuracy")
    assert (tmp_path / "trials.png").read_bytes().startswith(b"\x89PNG")
    panels = drawn[0].axes
    assert [axes.get_xlabel() for axes in panels] == list(SPACE)
    assert [axes.get_xscale() for axes in panels] == ["log", "linear", "linear", "linear"]
    assert [label.get_text() for label in panels[3].get_xticklabels()] == ["relu", "tanh"]
    assert panels[0].get_ylabel() == "accuracy"
    labels = [text.get_text() for text in drawn[0].legends[0].get_texts()]
    assert labels == ["complete", "stopped (last report)", "failed (no score)", "best"]
    assert drawn[0].get_suptitle() == "a title"


def test_a_picture_of_failures_alone(tmp_path):
    found = dataclasses.replace(uninterrupted(), trials=(Trial(0, uninterrupted().trials[0].params, "failed", None),))
    search_report.plot(found, tmp_path / "trials.png", title="")
    assert (tmp_path / "trials.png").exists()
