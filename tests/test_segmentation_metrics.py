"""Loss and metrics of label maps against loops over pixels; the Rand error against a count of all pairs."""

import json
import subprocess
import sys
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage, special

from jaxcnn.data.loader import gather
from jaxcnn.data.segmentation import Deformation, deform, pack, tiles, unpack, weight_map
from jaxcnn.errors import InputError
from jaxcnn.losses import central, classification, segmentation
from jaxcnn.metrics import SEGMENTATION, Totals, iou, pixel_error
from jaxcnn.parallel import make_mesh
from jaxcnn.segmentation import rand_error
from jaxcnn.train import fit

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(2, 5, 4, 3)).astype(np.float32) * 3
LABELS = RNG.integers(0, 3, (2, 5, 4))
WEIGHTS = RNG.uniform(size=(2, 5, 4)).astype(np.float32)


# Loss


@pytest.mark.parametrize("class_weights", [None, [0.5, 2.0, 3.0]])
@pytest.mark.parametrize("weights", [None, WEIGHTS])
def test_each_pixels_cross_entropy_is_weighted(weights, class_weights):
    batch = {"label": jnp.asarray(LABELS)} | ({} if weights is None else {"weight": jnp.asarray(weights)})
    found = jax.jit(segmentation(class_weights=class_weights))(LOGITS, batch)
    nats = -np.log(np.take_along_axis(special.softmax(LOGITS, -1), LABELS[..., None], -1))[..., 0]
    nats = (
        nats * (1 if weights is None else weights) * (1 if class_weights is None else np.array(class_weights)[LABELS])
    )
    np.testing.assert_allclose(found, nats.mean((1, 2)), rtol=1e-5)
    assert found.dtype == jnp.float32


def test_without_weights_it_is_the_classification_loss():
    batch = {"label": jnp.asarray(LABELS)}
    np.testing.assert_allclose(
        segmentation()(jnp.asarray(LOGITS), batch), classification()(jnp.asarray(LOGITS), batch), rtol=1e-6
    )


def test_a_pixel_of_weight_0_has_no_gradient():
    weights = jnp.asarray(WEIGHTS).at[:, 1].set(0)
    grad = jax.grad(lambda x: segmentation()(x, {"label": jnp.asarray(LABELS), "weight": weights}).sum())(
        jnp.asarray(LOGITS)
    )
    assert (np.abs(grad).max((0, 2, 3)) > 0).tolist() == [True, False, True, True, True]


def test_larger_maps_are_judged_by_their_middle():
    batch = {"label": jnp.asarray(LABELS), "weight": jnp.asarray(WEIGHTS)}
    framed = jnp.pad(jnp.asarray(LOGITS), [(0, 0), (3, 3), (1, 1), (0, 0)], constant_values=9)
    np.testing.assert_array_equal(central(framed, batch["label"]), LOGITS)
    np.testing.assert_array_equal(segmentation()(framed, batch), segmentation()(jnp.asarray(LOGITS), batch))
    for metric in SEGMENTATION.values():
        assert [*map(float, metric(framed, batch))] == [*map(float, metric(jnp.asarray(LOGITS), batch))]


@pytest.mark.parametrize("shape", [(2, 4, 4, 3), (2, 6, 4, 3), (1, 5, 4, 3), (2, 5, 4)])
def test_maps_that_do_not_fit_their_labels_are_refused(shape):
    for fn in (segmentation(), pixel_error, iou(1)):
        with pytest.raises(InputError, match="with labels"):
            fn(jnp.zeros(shape), {"label": jnp.asarray(LABELS)})


def test_wrong_weights_are_refused():
    with pytest.raises(InputError, match="2 class weights for 3 classes"):
        segmentation(class_weights=[1, 2])(jnp.asarray(LOGITS), {"label": jnp.asarray(LABELS)})
    with pytest.raises(InputError, match="shapes must be equal"):
        segmentation()(jnp.asarray(LOGITS), {"label": jnp.asarray(LABELS), "weight": jnp.ones((2, 5, 3))})


# Metrics


def test_pixel_error_and_iou_over_batches_are_those_of_the_whole_split():
    logits, labels = RNG.normal(size=(7, 6, 5, 3)).astype(np.float32), RNG.integers(0, 3, (7, 6, 5))
    labels[0] = 0  # an image without class 1
    metrics = {"pixel_error": pixel_error, "iou": iou(1)}
    totals = Totals()
    for rows in ([0, 1, 2], [3, 4, 5], [6, 6, 6]):
        batch = {
            "label": jnp.asarray(labels[rows]),
            "mask": jnp.asarray([1.0, rows[1] != 6, rows[2] != 6], jnp.float32),
        }
        totals.add({name: metric(jnp.asarray(logits[rows]), batch) for name, metric in metrics.items()})
    predicted = logits.argmax(-1)
    means = totals.means()
    np.testing.assert_allclose(means["pixel_error"], (predicted != labels).mean(), rtol=1e-6)
    both, either = ((predicted == 1) & (labels == 1)).sum(), ((predicted == 1) | (labels == 1)).sum()
    assert means["iou"] == both / either
    assert totals.counts == {"pixel_error": 7, "iou": either}


def test_a_pixel_with_nan_is_wrong_and_predicts_nothing():
    logits = jnp.asarray([[[[0.0, 1.0], [jnp.nan, 1.0]]]])
    batch = {"label": jnp.ones((1, 1, 2), jnp.int32)}
    assert [*map(float, pixel_error(logits, batch))] == [0.5, 1]
    assert [*map(float, iou(1)(logits, batch))] == [1, 2]


# Rand error


def rand_error_by_pairs(predicted, truth):
    true, found = ndimage.label(truth)[0], ndimage.label(predicted)[0]
    pixels = np.argwhere(true > 0)
    in_found = in_true = in_both = 0
    for i, a in enumerate(map(tuple, pixels)):
        for j, b in enumerate(map(tuple, pixels)):
            same_found = i == j or (found[a] == found[b] > 0)
            same_true = true[a] == true[b]
            in_found, in_true, in_both = (
                in_found + same_found,
                in_true + same_true,
                in_both + (same_found and same_true),
            )
    precision, recall = in_both / in_found, in_both / in_true
    return 1 - 2 * precision * recall / (precision + recall)


maps = st.integers(0, 2**31 - 1).map(lambda seed: np.random.default_rng(seed).random((2, 6, 7)) < 0.7)


@settings(max_examples=25, deadline=None)
@given(maps)
def test_rand_error_counts_pairs_of_pixels(both):
    np.testing.assert_allclose(rand_error(*both), rand_error_by_pairs(*both), atol=1e-12)
    assert 0 <= rand_error(*both) <= 1
    assert rand_error(both[1], both[1]) == 0


def test_rand_error_of_a_merge_and_a_split():
    truth = np.ones((4, 9), bool)
    truth[:, 4] = False  # two cells of 16 pixels
    assert rand_error(truth, truth) == 0
    merged = np.ones_like(truth)
    np.testing.assert_allclose(rand_error(merged, truth), 1 - 2 * 512 / (1024 + 512))
    assert rand_error(truth, merged) > 0
    thick = truth.copy()
    thick[:, 3] = False  # 4 pixels are lost to the membrane: each is alone
    np.testing.assert_allclose(rand_error(thick, truth), 1 - 2 * (144 + 256 + 4) / (144 + 256 + 4 + 512))
    nothing = np.zeros_like(truth)
    np.testing.assert_allclose(rand_error(nothing, truth), 1 - 2 * 32 / (32 + 512))


def test_diagonal_neighbours_are_two_cells():
    truth = np.eye(2, dtype=bool)
    assert rand_error(np.ones((2, 2)), truth) > 0


def test_rand_error_refuses():
    for predicted, truth in ((np.ones((2, 3)), np.ones((3, 2))), (np.ones((2, 2)), np.zeros((2, 2)))):
        with pytest.raises(InputError, match="and a cell in truth"):
            rand_error(predicted, truth)


# The trainer


class TwoLayers(nn.Module):
    """Without padding, as the paper's net: 4 pixels fewer along each axis."""

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(nn.Conv(8, (5, 5), padding="VALID")(x))
        return nn.Conv(2, (1, 1))(x)


def test_fit_segments_with_loss_metrics_and_augmentation_alone():
    """Bright squares on a dark ground, through `fit` with weights, deformation and selection by the IoU."""
    labels = np.zeros((8, 32, 32), np.int32)
    for label, (row, column) in zip(labels, RNG.integers(2, 16, (8, 2)), strict=True):
        label[row : row + 12, column : column + 12] = 1
    images = (labels + RNG.normal(scale=0.5, size=labels.shape)).astype(np.float32)[..., None]
    weights = np.stack([weight_map(label, balance=False) for label in labels])
    options = Deformation(size=16, context=2, std=1.0)
    held = tiles(images, tile=32, context=2), labels
    result = fit(
        TwoLayers(),
        (images, pack(labels, weights)),
        optimizer=optax.adam(2e-2),
        steps=60,
        batch_size=8,
        validation=held,
        test=held,
        loss_fn=segmentation(),
        metrics=SEGMENTATION,
        select_by="iou",
        prepare=lambda batch, key: deform(key, unpack(gather(batch)), settings=options),
        eval_every=30,
        mesh=make_mesh(jax.devices()[:1]),
        quiet=True,
    )
    assert set(result.test) == {"loss", "pixel_error", "iou", "count"}
    assert result.test["count"] == 8
    assert result.test["iou"] > 0.8
    assert result.test["pixel_error"] < 0.05


@pytest.mark.slow
def test_the_experiment_runs_with_smoke(tmp_path):
    program = Path(__file__).parent.parent / "experiments" / "unet_isbi.py"
    command = [sys.executable, str(program), "--smoke", "--output", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert "made-up Voronoi cells" in done.stdout
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert summary["unet"][0].keys() >= {"pixel_error", "iou", "rand_error", "least_rand_error"}
    assert (tmp_path / "segmentation.png").stat().st_size > 10_000
