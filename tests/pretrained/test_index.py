import dataclasses
import hashlib
import re
from urllib.parse import urlsplit

import jax
import numpy as np
import pytest

from jaxcnn.cli import main
from jaxcnn.errors import InputError
from jaxcnn.models import FAMILIES, MODELS, create
from jaxcnn.pretrained import load, store
from jaxcnn.pretrained.index import IMAGENET_CAVEAT, INDEX, describe, find
from jaxcnn.pretrained.layouts import of_family
from jaxcnn.pretrained.pixels import PREPROCESSINGS, Pixels

ENTRIES = pytest.mark.parametrize("entry", INDEX.values(), ids=INDEX)


@ENTRIES
def test_an_entry_names_a_network_of_ours_and_a_layout_that_is_read(entry):
    assert entry.model in MODELS
    create(entry.model, **entry.overrides)
    family = next(family for family, variants in FAMILIES.items() if entry.model in variants)
    assert entry.layout in {layout.name for layout in of_family(family)}


@ENTRIES
def test_an_entry_is_complete(entry):
    url = urlsplit(entry.url)
    assert url.scheme == "https"
    assert not url.query
    assert url.path.endswith((".safetensors", ".h5", ".pth"))
    assert entry.licence in {"BSD-3-Clause", "Apache-2.0", "MIT", "CC BY 4.0"}
    assert entry.source
    assert entry.sha256 is None or re.fullmatch("[0-9a-f]{64}", entry.sha256)
    assert entry.md5 is None or re.fullmatch("[0-9a-f]{32}", entry.md5)
    assert entry.size is None or 1e6 < entry.size < 1e9


@ENTRIES
def test_an_entry_has_the_accuracy_and_the_pixels_of_an_imagenet_network(entry):
    assert 55 < entry.top1 < 85
    assert entry.top5 is None or 79 < entry.top5 < 97
    assert entry.preprocessing.size == (224, 224)
    assert 0.8 < entry.preprocessing.crop < 1
    assert isinstance(entry.preprocessing, Pixels)
    # Values of any picture then lie within a few units of 0, or of 0..255 about its mean.
    largest = max(entry.preprocessing.scale / std for std in entry.preprocessing.std)
    assert largest <= 255


@ENTRIES
def test_a_revision_is_pinned_together_with_its_digest(entry):
    if "huggingface.co" not in entry.url:
        return
    revision = entry.url.split("/")[-2]
    assert (revision == "main") == (entry.sha256 is None)
    assert revision == "main" or re.fullmatch("[0-9a-f]{40}", revision)


def test_torchvisions_own_files_have_the_first_digits_of_their_digest_in_their_names():
    pickles = {name: entry for name, entry in INDEX.items() if entry.url.endswith(".pth")}
    assert {entry.model for entry in pickles.values()} == {"alexnet", "squeezenet1_0", "squeezenet1_1", "inception_v1"}
    for entry in pickles.values():
        digits = re.fullmatch(r".*-([0-9a-f]{8})\.pth", entry.url)
        assert digits
        assert entry.sha256 is None or entry.sha256.startswith(digits[1])


@ENTRIES
def test_what_is_shown_has_licence_digest_and_caveat(entry):
    shown = describe(entry)
    assert entry.licence in shown
    assert IMAGENET_CAVEAT in shown
    assert (entry.sha256 or "recorded at the first download") in shown
    assert None is entry.md5 or entry.md5 in shown
    assert not re.search(r"^\w+ +$|None", shown, re.M)


def test_names_addresses_and_digests_are_unique():
    assert all(entry.name == name for name, entry in INDEX.items())
    for values in ([e.url for e in INDEX.values()], [e.sha256 or e.md5 or e.url for e in INDEX.values()]):
        assert len(set(values)) == len(values)


def test_the_published_numbers():
    """timm's results-imagenet.csv at 224 pixels; keras.io/api/applications; torchvision's documentation."""
    published = {
        "vgg19_bn.tv_in1k": (74.230, 91.848),
        "resnet50.tv_in1k": (76.156, 92.866),
        "densenet121.tv_in1k": (74.750, 92.158),
        "mobilenet_v1.ra4_e3600_r224_in1k": (75.388, 92.310),
        "resnetv2_50.a1h_in1k": (80.410, None),
        "vgg19.keras": (71.3, 90.0),
        "resnet50.keras": (74.9, 92.1),
        "densenet121.keras": (75.0, 92.3),
        "densenet169.keras": (76.2, 93.2),
        "densenet201.keras": (77.3, 93.6),
        "mobilenet_v1.keras": (70.4, 89.5),
        "alexnet.tv_in1k": (56.522, 79.066),
        "squeezenet1_0.tv_in1k": (58.092, 80.420),
        "squeezenet1_1.tv_in1k": (58.178, 80.624),
        "inception_v1.tv_in1k": (69.778, 89.530),
    }
    assert {name: (INDEX[name].top1, INDEX[name].top5) for name in published} == published


def test_the_preprocessings_that_differ_from_torchvisions():
    assert INDEX["resnet50.tv_in1k"].preprocessing.interpolation == "bilinear"
    assert INDEX["densenet121.tv_in1k"].preprocessing.interpolation == "bicubic"
    assert INDEX["mobilenet_v1.ra4_e3600_r224_in1k"].preprocessing.mean == (0.5, 0.5, 0.5)
    assert INDEX["resnet50.tv2_in1k"].preprocessing.crop == 0.965
    assert INDEX["vgg16.keras"].preprocessing.order == "BGR"
    assert INDEX["densenet121.keras"].preprocessing == INDEX["resnet50.tv_in1k"].preprocessing
    for name in ("inception_v1.tv_in1k", "mobilenet_v1.keras"):
        assert INDEX[name].preprocessing == PREPROCESSINGS["inception"]


def test_an_unknown_name_is_met_with_the_nearest():
    with pytest.raises(InputError, match=r"unknown weights 'vgg19\.tv_in1': did you mean .*'vgg19\.tv_in1k'"):
        find("vgg19.tv_in1")


def test_the_weights_lie_in_one_folder_under_their_names(tmp_path, monkeypatch):
    monkeypatch.delenv("JAXCNN_WEIGHTS", raising=False)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert str(store.default_dir()) == "/home/somebody/.cache/jaxcnn/weights"
    monkeypatch.setenv("JAXCNN_WEIGHTS", str(tmp_path))
    assert store.path_of("resnet50.tv_in1k") == tmp_path / "resnet50.tv_in1k.safetensors"
    assert store.path_of("vgg16.keras", "there").as_posix() == "there/vgg16.keras.h5"
    assert len({store.path_of(name) for name in INDEX}) == len(INDEX)
    with pytest.raises(InputError, match="unknown weights"):
        store.path_of("resnet50.nobody")


def test_weights_that_are_there_are_checked_and_not_fetched(tmp_path, monkeypatch):
    def refuse(*args):
        raise AssertionError("the network was used")

    monkeypatch.setattr("jaxcnn.download._open", refuse)
    pinned = store.path_of("resnet50.a1_in1k", tmp_path)
    pinned.write_bytes(b"not these")
    with pytest.raises(InputError, match=r"is not the pinned original: 9 bytes.*773525d5"):
        store.fetch("resnet50.a1_in1k", tmp_path)
    own = store.path_of("vgg19.tv_in1k", tmp_path)
    own.write_bytes(b"some weights")
    assert store.fetch("vgg19.tv_in1k", tmp_path) == own
    assert hashlib.sha256(b"some weights").hexdigest() in own.with_name(own.name + ".sha256").read_text()
    own.write_bytes(b"other weights")
    with pytest.raises(InputError, match="is not the file downloaded first"):
        store.fetch("vgg19.tv_in1k", tmp_path)


def test_a_pickle_is_fetched_and_its_user_converts_it(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("JAXCNN_WEIGHTS", str(tmp_path))
    name, model = "inception_v1.tv_in1k", "inception_v1"
    command = rf"python -m jaxcnn\.pretrained\.from_torch \S+/{name}\.pth \S+/{name}\.safetensors"
    with pytest.raises(InputError, match=rf"{name} are not at \S+/{name}\.pth: run jaxcnn weights fetch {name}"):
        store.load(name)
    (tmp_path / f"{name}.pth").write_bytes(b"a pickle")
    with pytest.raises(InputError, match=rf"pickles.*{command}"):
        store.load(name)
    assert main(["weights", "show", name]) == 0
    assert re.search(rf"^conversion +{command}$", capsys.readouterr().out, re.M)
    assert main(["weights", "fetch", name]) == 0  # only checks it
    assert re.search(command, capsys.readouterr().err)
    converted = tmp_path / f"{name}.safetensors"
    converted.write_bytes(b"")
    assert store.held(name) == converted
    with pytest.raises(InputError, match=r"tv_in1k\.safetensors cannot be read"):
        store.load(name, model=model)


def test_weights_of_the_index_are_read_as_it_describes_them(tmp_path, monkeypatch):
    monkeypatch.setenv("JAXCNN_WEIGHTS", str(tmp_path))
    small = dataclasses.replace(
        INDEX["mobilenet_v1.keras"], model="mlp", tag="test", url="https://example.org/w.npz", layout="jaxcnn"
    )
    monkeypatch.setitem(INDEX, "mlp.test", dataclasses.replace(small, overrides={"depth": 1, "width": 3}))
    arrays = {"params/dense1/kernel": np.ones((784, 3)), "params/dense1/bias": np.ones(3)}
    arrays |= {"params/dense2/kernel": np.ones((3, 10)), "params/dense2/bias": np.ones(10)}
    np.savez(tmp_path / "mlp.test.npz", **arrays)
    loaded = store.load("mlp.test")
    assert (loaded.model, loaded.overrides) == ("mlp", {"depth": 1, "width": 3})
    assert loaded.preprocessing == small.preprocessing
    assert store.load("mlp.test", preprocessing="caffe").preprocessing.order == "BGR"
    of_file = load("mlp", tmp_path / "mlp.test.npz", depth=1, width=3)
    jax.tree.map(np.testing.assert_array_equal, of_file.variables, loaded.variables)
    with pytest.raises(InputError, match=r"the weights mlp\.test are those of mlp, not of lenet5"):
        store.load("mlp.test", model="lenet5")
    with pytest.raises(InputError, match="also give --model"):
        store.load(str(tmp_path / "mlp.test.npz"))
