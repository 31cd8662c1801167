"""`jaxcnn data prepare`: the same images in the same order out of a few large files, whole or not at all."""

import hashlib
import io
import json
from pathlib import Path

import jax
import numpy as np
import pytest
from jpegs import folder, jpeg
from PIL import Image

from jaxcnn import cli, parallel
from jaxcnn.data import records
from jaxcnn.data.loader import eval_batches, train_feed
from jaxcnn.data.records import INDEX, prepare
from jaxcnn.data.sources import hold_out, load, load_disk
from jaxcnn.errors import InputError

SIZE = (16, 12)


@pytest.fixture(scope="module", params=[0, 4], ids=["no split", "train and val"])
def pets(request, tmp_path_factory) -> Path:
    return folder(tmp_path_factory.mktemp("data") / "pets", held=request.param)


def content(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


@pytest.mark.parametrize("shards", [None, 4])
@pytest.mark.parametrize("workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_batches_are_those_of_the_folder(pets, tmp_path, shards, workers):
    found = prepare(pets, tmp_path / "pets", shards=shards)
    assert len(list((tmp_path / "pets").glob("*.array_record"))) == 2 * (shards or 1)
    mesh = parallel.make_mesh()
    options = {"image_size": SIZE, "area": (0.2, 1.0), "workers": workers}
    both = [load_disk("folder:pets", data_dir=parent, **options) for parent in (pets.parent, tmp_path)]
    assert both[0].classes == both[1].classes
    assert found.images == len(both[0].train) + len(both[0].test) == len(both[1].train) + len(both[1].test)
    streams = []
    for data in both:
        train, validation = hold_out(data, 0.2, seed=0)
        feed = train_feed(train.images, train.labels, batch_size=16, seed=3, mesh=mesh)
        streams.append([jax.device_get(feed(step)) for step in range(4)])
        feed.close()
        for split in (validation, data.test):
            streams[-1] += jax.device_get(list(eval_batches(split.images, split.labels, batch_size=8, mesh=mesh)()))
    assert len(streams[0]) == len(streams[1]) > 6
    for a, b in zip(*streams, strict=True):
        for name in a:
            np.testing.assert_array_equal(a[name], b[name])


def test_in_memory_too(pets, tmp_path):
    prepare(pets, tmp_path / "pets")
    a, b = (load("pets", data_dir=parent, image_size=SIZE) for parent in (pets.parent, tmp_path))
    for part in ("train", "test"):
        np.testing.assert_array_equal(getattr(a, part).images, getattr(b, part).images)
        np.testing.assert_array_equal(getattr(a, part).labels, getattr(b, part).labels)
    with pytest.raises(InputError, match=r"image \d+ has shape .*--data.image-size"):
        load("pets", data_dir=tmp_path)


def test_the_index_says_what_is_there(tmp_path):
    prepare(folder(tmp_path / "pets"), tmp_path / "out", shards=2)
    index = json.loads((tmp_path / "out" / INDEX).read_text())
    assert index["format"] == 1
    assert index["classes"] == ["class0", "class1", "class2"]
    assert (index["train"]["counts"], index["test"]["counts"]) == ([12] * 3, [3] * 3)
    for file in index["train"]["files"] + index["test"]["files"]:
        path = tmp_path / "out" / file["name"]
        assert hashlib.sha256(path.read_bytes()).hexdigest() == file["sha256"]
    data = load_disk("out", data_dir=tmp_path, image_size=SIZE)
    assert data.digests == {"out": hashlib.sha256((tmp_path / "out" / INDEX).read_bytes()).hexdigest()}
    again = load_disk("out", data_dir=tmp_path, image_size=SIZE)
    assert again.digests == data.digests


def test_large_images_are_scaled_and_small_ones_stay_as_they_are(tmp_path):
    (tmp_path / "pets" / "a").mkdir(parents=True)
    shapes = [(100, 150), (90, 61), (40, 40), (30, 400), (200, 50)]
    for i, shape in enumerate(shapes):
        (tmp_path / "pets" / "a" / f"{i}.jpg").write_bytes(jpeg(*shape, seed=i))
    prepare(tmp_path / "pets", tmp_path / "out", short_side=40, quality=80)
    data = load_disk("out", data_dir=tmp_path, image_size=SIZE)
    reader = data.train.images.reader  # type: ignore[attr-defined]
    sizes = {Image.open(io.BytesIO(reader[i].content)).size[::-1] for i in range(4)}
    held = Image.open(io.BytesIO(data.test.images.reader[0].content)).size[::-1]  # type: ignore[attr-defined]
    assert sizes | {held} == {(40, 60), (59, 40), (40, 40), (30, 400), (160, 40)}
    contents = {reader[i].content for i in range(4)} | {data.test.images.reader[0].content}  # type: ignore[attr-defined]
    assert {jpeg(40, 40, seed=2), jpeg(30, 400, seed=3)} <= contents


def test_a_corrupt_image_is_named_and_nothing_is_left(tmp_path, capsys):
    pets = folder(tmp_path / "pets")
    bad = pets / "class1" / "003.jpg"
    bad.write_bytes(bad.read_bytes()[:200])
    args = ["data", "prepare", str(pets), "--output", str(tmp_path / "out")]
    assert cli.main(args) == 2
    said = capsys.readouterr().err
    assert f"cannot read image {bad}: " in said
    assert "--skip-corrupt" in said
    assert content(tmp_path) == ["pets"]
    assert cli.main([*args, "--skip-corrupt", "--shards", "2"]) == 0
    said = capsys.readouterr()
    assert f"left out: cannot read image {bad}: " in said.out
    assert "44 images" in said.out
    assert "preparing: 45 of 45, ETA 0 s" in said.err
    data = load_disk("out", data_dir=tmp_path, image_size=SIZE)
    assert len(data.train) + len(data.test) == 44
    np.asarray(data.train.images)  # labels and records still agree
    np.asarray(data.test.images)
    assert content(tmp_path) == ["out", "pets"]


def test_what_was_there_stays(tmp_path, monkeypatch):
    pets = folder(tmp_path / "pets", each=4)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept").write_text("")
    with pytest.raises(InputError, match=r"out exists: move it away"):
        prepare(pets, tmp_path / "out")
    assert content(tmp_path / "out") == ["kept"]

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(records, "write_json", full)
        with pytest.raises(OSError, match="No space left"):
            prepare(pets, tmp_path / "new")
    assert content(tmp_path) == ["out", "pets"]
    (tmp_path / ".new.partial").mkdir()  # of a process that was killed
    (tmp_path / ".new.partial" / "train-00000-of-00009.array_record").write_text("half")
    prepare(pets, tmp_path / "new")
    assert content(tmp_path) == ["new", "out", "pets"]
    assert "train-00000-of-00009.array_record" not in content(tmp_path / "new")


@pytest.mark.parametrize(
    ("options", "said"),
    [({"short_side": 0}, "--short-side 0"), ({"quality": 101}, "--quality 101"), ({"shards": 0}, "--shards 0")],
)
def test_numbers_out_of_range_are_refused(tmp_path, options, said):
    with pytest.raises(InputError, match=f"{said} must be from 1 to"):
        prepare(folder(tmp_path / "pets", each=4), tmp_path / "out", **options)
    assert content(tmp_path) == ["pets"]


def test_a_damaged_set_is_refused(tmp_path):
    prepare(folder(tmp_path / "pets"), tmp_path / "out", shards=2)
    index, shard = tmp_path / "out" / INDEX, tmp_path / "out" / "train-00001-of-00002.array_record"
    whole, held = index.read_text(), shard.read_bytes()

    def refused(said: str) -> None:
        with pytest.raises(InputError, match=said):
            np.asarray(load_disk("out", data_dir=tmp_path, image_size=SIZE).train.images)

    for text, said in [
        (whole[:-5], "damaged"),
        ("[]", "damaged"),
        (whole.replace('"format": 1', '"format": 2'), "format 2, expected 1"),
        (whole.replace('"counts": [\n   12', '"counts": [\n   11'), "damaged"),
        (whole.replace("   12,\n   12,\n   12", "   12,\n   11,\n   13"), r"record \d+ has label 1, but .* says 2"),
    ]:
        index.write_text(text)
        refused(said)
    index.write_text(whole)
    shard.write_bytes(held[:-1])
    refused(f"{shard.name} has .* bytes, expected")
    shard.write_bytes(held[:1000] + bytes(4000) + held[5000:])
    refused(rf"cannot read .*{shard.name}, record \d+")
    shard.unlink()
    refused(f"{shard.name} is missing")
