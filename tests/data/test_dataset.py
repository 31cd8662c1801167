"""Checks of arrays, a user's among them, and the held-out split."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from jaxcnn.data.dataset import Dataset, Split, check, hold_out, stratified
from jaxcnn.errors import InputError


def make_dataset(**changes) -> Dataset:
    split = Split(np.zeros((6, 4, 4, 1), np.float32), np.arange(6) % 3)
    fields = {"train": split, "test": split, "classes": ("a", "b", "c")} | changes
    return Dataset("made", digests={}, **fields)


def replaced(split: Split, index: int, value: float) -> Split:
    images = split.images.copy()
    images[index, 1, 2, 0] = value
    return Split(images, split.labels)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (lambda s: {"train": replaced(s, 4, np.nan)}, "train split: image 4 holds nan"),
        (lambda s: {"test": replaced(s, 2, -np.inf)}, "test split: image 2 holds -inf"),
        (lambda s: {"train": Split(s.images, s.labels + 1)}, r"label 3 of example 2 is outside 0\.\.2"),
        (lambda s: {"train": Split(s.images, s.labels - 1)}, r"label -1 of example 0"),
        (lambda s: {"train": Split(s.images, s.labels[:-1])}, "6 images but 5 labels"),
        (lambda s: {"train": Split(s.images[..., 0], s.labels)}, r"shape \(6, 4, 4\), expected \(n, h, w, c\)"),
        (lambda s: {"test": Split(s.images[:0], s.labels[:0])}, r"test split: images have shape \(0, 4, 4, 1\)"),
        (lambda s: {"test": Split(s.images[:, :2], s.labels)}, "both splits need one shape"),
        (lambda s: {"train": Split(s.images.astype(np.int32), s.labels)}, "images are int32"),
        (lambda s: {"train": Split(s.images, s.labels.astype(float))}, "type float64, expected"),
    ],
)
def test_check_names_what_is_wrong(changes, message):
    dataset = make_dataset()
    check(dataset)
    with pytest.raises(InputError, match=message):
        check(make_dataset(**changes(dataset.train)))


# Holding out.


@settings(max_examples=50, deadline=None)
@given(
    labels=hnp.arrays(np.int32, st.integers(1, 200), elements=st.integers(0, 5)),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 2**32),
)
def test_stratified_takes_the_same_share_of_every_class(labels, fraction, seed):
    mask = stratified(labels, fraction, seed=seed)
    np.testing.assert_array_equal(mask, stratified(labels, fraction, seed=seed))
    for label in np.unique(labels):
        count, held = (labels == label).sum(), mask[labels == label].sum()
        assert held <= count - 1
        assert held == count - 1 or abs(held - fraction * count) <= 0.5 + 1e-9


def test_hold_out_divides_the_training_split_and_keeps_its_order():
    labels = np.arange(100) % 3
    images = np.arange(100, dtype=np.float32).reshape(-1, 1, 1, 1)
    dataset = make_dataset(train=Split(images, labels))
    train, validation = hold_out(dataset, 0.1, seed=3)
    ids = [split.images.ravel() for split in (train, validation)]
    assert sorted(np.concatenate(ids)) == list(range(100))
    assert all(np.all(np.diff(part) > 0) for part in ids)
    np.testing.assert_array_equal(validation.labels, labels[ids[1].astype(int)])
    assert np.bincount(validation.labels).tolist() == [3, 3, 3]
    assert not np.array_equal(ids[1], hold_out(dataset, 0.1, seed=4).validation.images.ravel())


def test_the_choice_of_a_seed_never_changes():
    assert np.flatnonzero(stratified(np.zeros(20, int), 0.25, seed=7)).tolist() == [3, 4, 6, 11, 12]


@pytest.mark.parametrize("fraction", [0, 1, -0.1, float("nan"), 1e-6])
def test_hold_out_refuses_a_useless_fraction(fraction):
    with pytest.raises(InputError, match=r"fraction|leaves no validation example"):
        hold_out(make_dataset(), fraction, seed=0)
