"""Data sets by name: formats against bytes written by hand, and every way a file can be wrong."""

import dataclasses
import gzip
import hashlib
import io
import os
import struct
import tarfile
from pathlib import Path

import numpy as np
import pytest

from jaxcnn.data import sources
from jaxcnn.data.sources import load
from jaxcnn.errors import InputError

REAL = os.environ.get("JAXCNN_DATA")


def idx_bytes(array: np.ndarray) -> bytes:
    header = struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


def write_idx_set(folder: Path, *, train: int = 20, test: int = 10) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True)
    arrays = {}
    for part, count in (("train", train), ("t10k", test)):
        arrays[f"{part}-images-idx3-ubyte"] = rng.integers(0, 256, (count, 28, 28), np.uint8)
        arrays[f"{part}-labels-idx1-ubyte"] = (np.arange(count) % 10).astype(np.uint8)
    for name, array in arrays.items():
        (folder / f"{name}.gz").write_bytes(gzip.compress(idx_bytes(array)))
    return arrays


def cifar_records(images: np.ndarray, *labels: np.ndarray) -> bytes:
    planes = images.transpose(0, 3, 1, 2).reshape(len(images), -1)
    return np.concatenate([*(column[:, None] for column in labels), planes], axis=1).astype(np.uint8).tobytes()


@pytest.fixture
def tiny_cifar(monkeypatch):
    """The published layouts with four records a file."""
    for name in ("cifar10", "cifar100"):
        layout = getattr(sources, name.upper())
        tiny = dataclasses.replace(layout, records=dict.fromkeys(layout.records, 4))
        monkeypatch.setitem(sources.SOURCES, name, lambda root, size, tiny=tiny: sources._cifar(tiny, root, size))


def write_cifar10(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    images = rng.integers(0, 256, (24, 32, 32, 3), np.uint8)
    labels = rng.integers(0, 10, 24)
    folder.mkdir(parents=True)
    names = [*sources.CIFAR10.train, *sources.CIFAR10.test]
    for i, name in enumerate(names):
        rows = slice(4 * i, 4 * i + 4)
        (folder / name).write_bytes(cifar_records(images[rows], labels[rows]))
    return images, labels


# The embedded digits.


def test_digits_are_whole_and_have_the_stated_split():
    data = load("digits")
    assert data.train.images.shape == (1438, 28, 28, 1)
    assert data.test.images.shape == (359, 28, 28, 1)
    assert data.train.images.dtype == np.uint8
    assert data.train.labels.dtype == np.int32
    assert data.train.images.max() == 255
    assert data.classes == tuple("0123456789")
    # counts per class of the whole set, from its published description
    both = np.concatenate([data.train.labels, data.test.labels])
    assert np.bincount(both).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    assert np.bincount(data.test.labels).tolist() == [36, 36, 35, 37, 36, 36, 36, 36, 35, 36]


def test_the_split_of_the_digits_never_changes():
    pin = "7ffa26e0f3fa4d0421b17fbf78b2500dcfa5713aba20da36eab49d64a851c89b"
    assert load("digits", image_size=(8, 8)).digests["test"] == pin


def test_digits_at_their_own_size_are_the_original_values_scaled_to_255():
    from sklearn.datasets import load_digits

    data = load("digits", image_size=(8, 8))
    whole = np.concatenate([data.train.images, data.test.images])[..., 0]
    original = np.asarray(load_digits(return_X_y=True)[0]).reshape(-1, 8, 8)
    assert sorted(map(bytes, whole)) == sorted(map(bytes, np.floor(original * 255 / 16 + 0.5).astype(np.uint8)))


def test_upscaled_digits_are_bilinear():
    small, large = load("digits", image_size=(8, 8)), load("digits", image_size=(16, 16))
    image = small.train.images[0, ..., 0].astype(float)
    # at twice the size, samples lie a quarter pixel either side of each centre
    weights = np.zeros((16, 8))
    for i in range(16):
        at = np.clip((i + 0.5) / 2 - 0.5, 0, 7)
        low = min(int(at), 6)
        weights[i, low], weights[i, low + 1] = 1 - (at - low), at - low
    np.testing.assert_allclose(large.train.images[0, ..., 0], weights @ image @ weights.T, atol=1.01)


# MNIST and its kin.


@pytest.mark.parametrize("zipped", [True, False])
def test_idx_files_are_read_as_written(tmp_path, zipped):
    arrays = write_idx_set(tmp_path / "fashion_mnist")
    if not zipped:
        for path in list((tmp_path / "fashion_mnist").iterdir()):
            path.with_suffix("").write_bytes(gzip.decompress(path.read_bytes()))
            path.unlink()
    data = load("fashion_mnist", data_dir=tmp_path)
    np.testing.assert_array_equal(data.train.images[..., 0], arrays["train-images-idx3-ubyte"])
    np.testing.assert_array_equal(data.test.images[..., 0], arrays["t10k-images-idx3-ubyte"])
    np.testing.assert_array_equal(data.test.labels, arrays["t10k-labels-idx1-ubyte"])
    assert data.classes[9] == "Ankle boot"
    for name, digest in data.digests.items():
        content = (tmp_path / "fashion_mnist" / name).read_bytes()
        assert digest == hashlib.sha256(content).hexdigest()
    assert len(data.digests) == 4


def test_image_size_scales_any_source(tmp_path):
    write_idx_set(tmp_path / "mnist")
    assert load("mnist", data_dir=tmp_path, image_size=(32, 32)).test.images.shape == (10, 32, 32, 1)
    with pytest.raises(InputError, match=r"image size is \(0, 4\)"):
        load("mnist", data_dir=tmp_path, image_size=(0, 4))


def test_a_missing_file_is_named_with_the_remedy(tmp_path):
    with pytest.raises(InputError, match=r"train-images-idx3-ubyte.gz.*jaxcnn data fetch mnist.*--data-dir"):
        load("mnist", data_dir=tmp_path)


def test_the_environment_names_the_default_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCNN_DATA", str(tmp_path))
    assert sources.default_data_dir() == tmp_path
    with pytest.raises(InputError, match=str(tmp_path)):
        load("mnist")
    monkeypatch.delenv("JAXCNN_DATA")
    assert sources.default_data_dir() == Path.home() / ".cache" / "jaxcnn" / "data"


LABELS = "train-labels-idx1-ubyte"
IMAGES = "train-images-idx3-ubyte"
GOOD_IMAGES = idx_bytes(np.zeros((20, 28, 28)))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (IMAGES, GOOD_IMAGES[:-1], r"\(20, 28, 28\), so 15680 bytes.*found 15679"),
        (IMAGES, GOOD_IMAGES + b"x", r"15680 bytes.*found more"),
        (IMAGES, b"", "starts with , expected 00000803"),
        (IMAGES, GOOD_IMAGES[:9], "truncated, 9 bytes, expected 16"),
        (IMAGES, idx_bytes(np.zeros(20)), "starts with 00000801, expected 00000803"),
        (IMAGES, b"\0\0\x08\3" + b"\xff" * 12, r"\(4294967295, .*more than \d+ bytes can hold"),
        (LABELS, idx_bytes(np.zeros(19)), "19 labels, expected 20 as in train-images"),
        (LABELS, idx_bytes(np.array([3, 10] * 10)), r"label 10 of example 1 is outside 0\.\.9"),
    ],
)
def test_a_damaged_idx_file_is_refused(tmp_path, name, content, message):
    write_idx_set(tmp_path / "mnist")
    (tmp_path / "mnist" / f"{name}.gz").write_bytes(gzip.compress(content))
    with pytest.raises(InputError, match=rf"{name}.gz.*{message}"):
        load("mnist", data_dir=tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 12, 200, -1])
def test_a_cut_gzip_file_is_refused(tmp_path, keep):
    write_idx_set(tmp_path / "mnist")
    path = tmp_path / "mnist" / f"{IMAGES}.gz"
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(InputError, match=rf"{IMAGES}.gz: (truncated|starts)"):
        load("mnist", data_dir=tmp_path)


def test_a_flipped_byte_in_a_gzip_file_is_refused(tmp_path):
    write_idx_set(tmp_path / "mnist")
    path = tmp_path / "mnist" / f"{IMAGES}.gz"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0xFF
    path.write_bytes(content)
    with pytest.raises(InputError, match=f"{IMAGES}.gz"):
        load("mnist", data_dir=tmp_path)


# CIFAR.


def test_cifar10_files_are_read_as_written(tmp_path, tiny_cifar):
    images, labels = write_cifar10(tmp_path / "cifar10" / "cifar-10-batches-bin")
    data = load("cifar10", data_dir=tmp_path)
    np.testing.assert_array_equal(data.train.images, images[:20])
    np.testing.assert_array_equal(data.train.labels, labels[:20])
    np.testing.assert_array_equal(data.test.images, images[20:])
    np.testing.assert_array_equal(data.test.labels, labels[20:])
    assert data.classes[3] == "cat"
    assert set(data.digests) == {*sources.CIFAR10.train, *sources.CIFAR10.test}


def test_cifar10_is_read_from_its_archive_without_unpacking(tmp_path, tiny_cifar):
    images, _ = write_cifar10(tmp_path / "elsewhere" / "cifar-10-batches-bin")
    home = tmp_path / "data" / "cifar10"
    home.mkdir(parents=True)
    with tarfile.open(home / "cifar-10-binary.tar.gz", "w:gz") as tar:
        tar.add(tmp_path / "elsewhere" / "cifar-10-batches-bin", "cifar-10-batches-bin")
        outside = tarfile.TarInfo("../escaped")
        tar.addfile(outside, io.BytesIO())
    data = load("cifar10", data_dir=tmp_path / "data")
    np.testing.assert_array_equal(data.train.images, images[:20])
    content = (home / "cifar-10-binary.tar.gz").read_bytes()
    assert data.digests == {"cifar-10-binary.tar.gz": hashlib.sha256(content).hexdigest()}
    assert [path.name for path in tmp_path.rglob("escaped")] == []


def test_cifar100_counts_the_fine_label(tmp_path, tiny_cifar):
    folder = tmp_path / "cifar100" / "cifar-100-binary"
    folder.mkdir(parents=True)
    images, fine = np.zeros((4, 32, 32, 3)), np.array([0, 1, 99, 51])
    for name in ("train.bin", "test.bin"):
        (folder / name).write_bytes(cifar_records(images, np.full(4, 19), fine))
    data = load("cifar100", data_dir=tmp_path)
    np.testing.assert_array_equal(data.train.labels, fine)
    assert [data.classes[i] for i in fine] == ["apple", "aquarium_fish", "worm", "mushroom"]
    assert len(set(data.classes)) == 100


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: content[:3073], r"data_batch_3.bin: 3073 bytes, expected 12292 \(4 records of 3073\)"),
        (lambda content: content + b"x", "12293 bytes, expected 12292"),
        (lambda content: b"\x0a" + content[1:], r"label 10 of example 0 is outside 0\.\.9"),
        (None, "data_batch_3.bin is missing.*jaxcnn data fetch cifar10"),
    ],
)
def test_a_damaged_cifar_file_is_refused(tmp_path, tiny_cifar, change, message):
    folder = tmp_path / "cifar10" / "cifar-10-batches-bin"
    write_cifar10(folder)
    path = folder / "data_batch_3.bin"
    content = path.read_bytes()
    path.unlink()
    if change is not None:
        path.write_bytes(change(content))
    with pytest.raises(InputError, match=message):
        load("cifar10", data_dir=tmp_path)


def write_archive(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True)
    with tarfile.open(path, "w:gz") as tar:
        for name, content in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def test_a_damaged_archive_is_refused(tmp_path, tiny_cifar):
    path = tmp_path / "cifar100" / "cifar-100-binary.tar.gz"
    with pytest.raises(InputError, match=r"cifar-100-binary.tar.gz is missing.*jaxcnn data fetch cifar100"):
        load("cifar100", data_dir=tmp_path)
    noise = np.random.default_rng(0).bytes(20_000)
    write_archive(path, {"cifar-100-binary/train.bin": noise})
    with pytest.raises(InputError, match=r"train.bin has 20000 bytes"):
        load("cifar100", data_dir=tmp_path)
    path.write_bytes(path.read_bytes()[:9000])
    with pytest.raises(InputError, match=r"truncated or damaged archive|train.bin has 20000"):
        load("cifar100", data_dir=tmp_path)
    path.write_bytes(noise)
    with pytest.raises(InputError, match="truncated or damaged archive"):
        load("cifar100", data_dir=tmp_path)


def test_an_archive_without_the_files_is_refused(tmp_path, tiny_cifar):
    write_archive(tmp_path / "cifar100" / "cifar-100-binary.tar.gz", {"readme": b"x"})
    with pytest.raises(InputError, match=r"train.bin, .*test.bin not found inside"):
        load("cifar100", data_dir=tmp_path)


# Names.


def test_an_unknown_name_gets_its_nearest(tmp_path):
    with pytest.raises(InputError, match="did you mean 'mnist'"):
        load("mnits", data_dir=tmp_path)
    with pytest.raises(InputError, match="unknown data set ''"):
        load("", data_dir=tmp_path)


# The real files.


@pytest.mark.skipif(not REAL, reason="JAXCNN_DATA does not point at the original files")
@pytest.mark.parametrize(
    ("name", "shape", "mean", "std"),
    [
        ("mnist", (28, 28, 1), [0.1307], [0.3081]),
        ("fashion_mnist", (28, 28, 1), [0.2860], [0.3530]),
        ("cifar10", (32, 32, 3), [0.4914, 0.4822, 0.4465], [0.2470, 0.2435, 0.2616]),
    ],
)
def test_real_sets_have_their_published_counts_and_statistics(name, shape, mean, std):
    assert REAL is not None
    if not (Path(REAL) / name).is_dir():
        pytest.skip(f"no {name} in JAXCNN_DATA")
    from jaxcnn.data import preprocess

    data = load(name)
    total = 50_000 if name == "cifar10" else 60_000
    assert data.train.images.shape == (total, *shape)
    assert data.test.images.shape == (10_000, *shape)
    assert np.bincount(data.test.labels, minlength=10).min() >= 892
    fitted = preprocess.fit("standardize", data.train.images)
    np.testing.assert_allclose(fitted.arrays["mean"], mean, atol=5.1e-5)
    np.testing.assert_allclose(fitted.arrays["std"], std, atol=5.1e-5)
