"""What augmentation must never change, and what it must do, for any key."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from jaxcnn.data.augment import Augmentation, augment
from jaxcnn.errors import InputError

B, H, W, C, K = 16, 8, 6, 3, 4
FILL = np.array([-1.0, -2.0, -3.0], np.float32)
IMAGES: Any = np.arange(B * H * W * C, dtype=np.float32).reshape(B, H, W, C) / 7  # every value once
LABELS: Any = np.arange(B, dtype=np.int32) % K

seeds = st.integers(0, 2**31 - 1)
few = settings(max_examples=15, deadline=None)
jitted = jax.jit(augment, static_argnames=("settings", "num_classes"))


def run(seed, images=IMAGES, labels=LABELS, **options):
    key = jax.random.key(seed)
    out = jitted(
        key,
        jnp.asarray(images),
        jnp.asarray(labels),
        settings=Augmentation(**options),
        num_classes=K,
        fill=FILL,
    )
    return np.asarray(out.images), np.asarray(out.labels)


CROPS = {"crop_padding": 2, "flip": True, "cutout": 3}
MIXUP, CUTMIX = {"mixup": 0.4}, {"cutmix": 1.0}
EVERYTHING = CROPS | MIXUP | CUTMIX
# Few settings, shared by the tests, so that each is compiled once.


@pytest.mark.usefixtures("strict_dtypes")
@pytest.mark.parametrize(("options", "dtype"), [(CROPS, jnp.float32), (EVERYTHING, jnp.bfloat16)])
def test_shape_and_dtype_stay(options, dtype):
    images, labels = run(0, jnp.asarray(IMAGES, dtype), **options)
    assert images.shape == IMAGES.shape
    assert images.dtype == dtype
    soft = Augmentation(**options).soft_labels
    assert (labels.shape, labels.dtype) == (((B, K), np.float32) if soft else ((B,), np.int32))


def test_nothing_is_on_by_default():
    images, labels = run(0)
    np.testing.assert_array_equal(images, IMAGES)
    np.testing.assert_array_equal(labels, LABELS)


@given(seeds)
@few
def test_every_flip_is_none_or_its_own_inverse(seed):
    once, _ = run(seed, flip=True)
    mirrored = (once == IMAGES[:, :, ::-1]).all((1, 2, 3))
    assert (mirrored | (once == IMAGES).all((1, 2, 3))).all()
    np.testing.assert_array_equal(run(seed, once, flip=True)[0], IMAGES)


@given(seeds, st.sampled_from([0, 1, 3]))
@few
def test_every_crop_is_a_window_of_its_padded_image(seed, padding):
    cropped, _ = run(seed, crop_padding=padding)
    canvas = np.broadcast_to(FILL, (B, H + 2 * padding, W + 2 * padding, C)).copy()
    canvas[:, padding : padding + H, padding : padding + W] = IMAGES
    windows = np.lib.stride_tricks.sliding_window_view(canvas, (H, W), axis=(1, 2))
    found = (windows == np.moveaxis(cropped, 3, 1)[:, None, None]).all((3, 4, 5))
    assert found.any((1, 2)).all()


def test_offsets_and_flips_are_uniform():
    n = 4000
    images = np.zeros((n, 5, 5, 3), np.float32)
    images[:, 2, 2] = 1  # the centre pixel shows the shift
    images, _ = run(3, images, np.zeros(n, np.int32), crop_padding=2)
    places = np.argwhere(images[..., 0] == 1)[:, 1:]
    counts = np.histogram2d(*places.T, bins=5)[0]
    assert counts.sum() == n
    assert abs(counts - n / 25).max() < 5 * np.sqrt(n / 25)
    images = np.broadcast_to(np.arange(2, dtype=np.float32)[None, None, :, None], (n, 1, 2, 3))
    flipped = run(4, images, np.zeros(n, np.int32), flip=True)[0][:, 0, 0, 0]
    assert abs(flipped.mean() - 0.5) < 5 * 0.5 / np.sqrt(n)


@given(seeds, st.sampled_from([1, 3, 12]))
@few
def test_cutout_blanks_one_box_of_at_most_its_area(seed, side):
    images, labels = run(seed, cutout=side)
    blank = (images == FILL).all(-1)
    np.testing.assert_array_equal(images[~blank], IMAGES[~blank])
    np.testing.assert_array_equal(labels, LABELS)
    quarter = min(side // 2 or 1, H) * min(side // 2 or 1, W)
    for mask in blank:
        rows, columns = mask.any(1), mask.any(0)
        assert mask.sum() == rows.sum() * columns.sum()  # a full rectangle
        assert quarter <= mask.sum() <= side**2
        assert np.diff(np.flatnonzero(rows)).max(initial=1) == 1


@given(seeds)
@few
def test_mixup_is_convex_and_its_labels_tell_the_weight(seed):
    images, labels = run(seed, **MIXUP)
    partners = np.roll(IMAGES, 1, 0)
    np.testing.assert_allclose(labels.sum(1), 1, atol=1e-6)
    weight = labels[np.arange(B), LABELS][:, None, None, None]
    np.testing.assert_allclose(images, weight * IMAGES + (1 - weight) * partners, rtol=1e-4, atol=1e-4)
    assert (images >= np.minimum(IMAGES, partners) - 1e-3).all()
    assert (images <= np.maximum(IMAGES, partners) + 1e-3).all()


@given(seeds)
@few
def test_cutmix_takes_every_pixel_from_one_of_two_and_counts_them(seed):
    images, labels = run(seed, **CUTMIX)
    own = (images == IMAGES).all(-1)
    assert (own | (images == np.roll(IMAGES, 1, 0)).all(-1)).all()
    np.testing.assert_allclose(labels[np.arange(B), LABELS], own.mean((1, 2)), atol=1e-6)
    np.testing.assert_allclose(labels.sum(1), 1, atol=1e-6)
    for mask in ~own:
        assert mask.sum() == mask.any(1).sum() * mask.any(0).sum()


def test_with_both_on_each_example_is_mixed_in_one_way_about_half_the_time():
    shares = []
    for seed in range(40):
        mixed, labels = run(seed, **MIXUP, **CUTMIX)
        only_mixup, mixup_labels = run(seed, **MIXUP)
        only_cutmix, cutmix_labels = run(seed, **CUTMIX)
        by_mixup = (mixed == only_mixup).all((1, 2, 3)) & (labels == mixup_labels).all(1)
        by_cutmix = (mixed == only_cutmix).all((1, 2, 3)) & (labels == cutmix_labels).all(1)
        assert (by_mixup | by_cutmix).all()
        shares.append(by_mixup.mean())
    assert np.mean(shares) == pytest.approx(0.5, abs=5 * 0.5 / np.sqrt(40 * B))


@pytest.mark.parametrize("alpha", [0.1, 1.0])
def test_mixing_weights_follow_the_beta_distribution(alpha):
    n = 4000
    labels = run(6, np.zeros((n, 1, 1, 3), np.float32), np.arange(n) % K, mixup=alpha)[1]
    weights = labels[np.arange(n), np.arange(n) % K]
    assert weights.mean() == pytest.approx(0.5, abs=0.03)
    assert weights.var() == pytest.approx(1 / (4 * (2 * alpha + 1)), rel=0.08)
    # Above 1/2 a small alpha piles up at 1 for want of float32 digits; below, the distribution is the same.
    lower = weights[weights < 0.5]
    assert stats.kstest(lower, lambda x: 2 * stats.beta(alpha, alpha).cdf(x)).pvalue > 0.01


def test_an_example_depends_on_its_index_alone():
    small, _ = run(7, IMAGES[:5], LABELS[:5], **CROPS)
    np.testing.assert_array_equal(small, run(7, **CROPS)[0][:5])


def test_sharded_over_8_devices_equals_one_device_bit_for_bit():
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    images = np.random.default_rng(1).random(IMAGES.shape, np.float32)
    placed = jax.device_put((images, LABELS), jax.NamedSharding(mesh, jax.P("data")))
    for seed in range(8):
        one, many = run(seed, images, **EVERYTHING), run(seed, *placed, **EVERYTHING)
        np.testing.assert_array_equal(one[0], many[0])
        np.testing.assert_array_equal(one[1], many[1])


def test_other_operations_do_not_change_the_crop():
    cropped, _ = run(8, crop_padding=2, flip=True)
    both, _ = run(8, **CROPS)
    kept = (both != FILL).all(-1)
    np.testing.assert_array_equal(both[kept], cropped[kept])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"crop_padding": -1}, "crop_padding is -1"),
        ({"cutout": 2.5}, "cutout is 2.5"),
        ({"flip": 1}, "flip is 1"),
        ({"mixup": -0.1}, "mixup is -0.1"),
        ({"cutmix": float("nan")}, "cutmix is nan"),
    ],
)
def test_bad_settings_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        Augmentation(**options)


def test_bad_batches_are_refused():
    with pytest.raises(InputError, match="floating point"):
        run(0, IMAGES.astype(np.uint8))
    with pytest.raises(InputError, match="one integer per image"):
        run(0, labels=np.eye(B, K, dtype=np.float32))
    with pytest.raises(InputError, match="3 channels"):
        augment(
            jax.random.key(0),
            jnp.asarray(IMAGES),
            jnp.asarray(LABELS),
            settings=Augmentation(flip=True),
            num_classes=K,
            fill=np.zeros(1),
        )
