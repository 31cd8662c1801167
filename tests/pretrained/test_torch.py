"""State dictionaries of independent PyTorch networks, with random weights: loaded, they give the same logits."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch_nets as nets  # noqa: E402
from safetensors.torch import save_file  # noqa: E402

from jaxcnn import pretrained  # noqa: E402
from jaxcnn.errors import InputError  # noqa: E402
from jaxcnn.models import create  # noqa: E402
from jaxcnn.pretrained.pixels import PREPROCESSINGS  # noqa: E402
from jaxcnn.transfer import Frozen  # noqa: E402
from jaxcnn.tree import flatten  # noqa: E402

SMALL = {"width": 4}
# our name, overrides that the file cannot tell, theirs, image sizes
CASES = {
    "vgg11": ({**SMALL, "hidden": 24}, lambda: nets.Vgg((1, 1, 2, 2, 2), 4, 24, 7), (224, 197)),
    "vgg16 timm": ({**SMALL, "hidden": 24}, lambda: nets.Vgg((2, 2, 3, 3, 3), 4, 24, 7, timm=True), (224,)),
    "vgg13_bn": ({**SMALL, "hidden": 24}, lambda: nets.Vgg((2, 2, 2, 2, 2), 4, 24, 7, norm=True), (197,)),
    "vgg19_bn timm": (
        {**SMALL, "hidden": 24},
        lambda: nets.Vgg((2, 2, 4, 4, 4), 4, 24, 7, norm=True, timm=True),
        (224,),
    ),
    "alexnet": ({"width": 8, "hidden": 24}, lambda: nets.AlexNet(8, 24, 7), (224, 197)),
    "resnet18": (SMALL, lambda: nets.ResNet((2, 2, 2, 2), 4, 7), (197,)),
    "resnet50": (SMALL, lambda: nets.ResNet((3, 4, 6, 3), 4, 7, bottleneck=True), (224, 197)),
    "cifar_resnet32": (SMALL, lambda: nets.ResNet((5, 5, 5), 4, 7, cifar=True), (32,)),
    "resnetv2_18": (SMALL, lambda: nets.ResNetV2((2, 2, 2, 2), 4, 7, bottleneck=False), (197,)),
    "resnetv2_50": (SMALL, lambda: nets.ResNetV2((3, 4, 6, 3), 4, 7), (224, 197)),
    "densenet121": ({"growth": 8}, lambda: nets.DenseNet((6, 12, 24, 16), 8, 16, 7), (224, 197)),
    "mobilenet_v1": ({"width": 0.25}, lambda: nets.MobileNet(0.25, 7), (224, 197)),
    "squeezenet1_0": ({}, lambda: nets.SqueezeNet("1_0", 7), (224, 197)),
    "squeezenet1_1": ({}, lambda: nets.SqueezeNet("1_1", 7), (224, 197)),
    "inception_v1": ({"width": 16}, lambda: nets.GoogLeNet(16, 7), (224, 197)),
}
FULL = {
    "vgg19_bn": lambda: nets.Vgg((2, 2, 4, 4, 4), 64, 4096, 1000, norm=True),
    "alexnet": lambda: nets.AlexNet(64, 4096, 1000),
    "resnet50": lambda: nets.ResNet((3, 4, 6, 3), 64, 1000, bottleneck=True),
    "resnet34": lambda: nets.ResNet((3, 4, 6, 3), 64, 1000),
    "resnetv2_50": lambda: nets.ResNetV2((3, 4, 6, 3), 64, 1000),
    "densenet121": lambda: nets.DenseNet((6, 12, 24, 16), 32, 64, 1000),
    "densenet161": lambda: nets.DenseNet((6, 12, 36, 24), 48, 96, 1000),
    "mobilenet_v1": lambda: nets.MobileNet(1.0, 1000),
    "inception_v1": lambda: nets.GoogLeNet(64, 1000),
}


def same_logits(name, path, theirs, sizes, overrides):
    loaded = pretrained.load(name, path, **overrides)
    network = create(name, **loaded.overrides)
    for size in sizes:
        images = np.random.default_rng(size).normal(size=(2, size, size, 3)).astype(np.float32)
        with torch.no_grad():
            expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
        ours = jax.jit(lambda v, x: network.apply(v, x, train=False))(loaded.variables, images)
        assert expected.std() > 1e-3
        assert np.abs(ours - expected).max() <= 1e-4 * np.abs(expected).max()
    return loaded


def saved(net, path):
    save_file(net.state_dict(), path)
    return path


@pytest.mark.parametrize("case", CASES)
def test_logits_are_those_of_pytorch(case, tmp_path):
    overrides, build, sizes = CASES[case]
    theirs = nets.randomised(build())
    loaded = same_logits(case.split()[0], saved(theirs, tmp_path / "w.safetensors"), theirs, sizes, overrides)
    assert loaded.overrides["num_classes"] == 7


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL)
def test_logits_at_full_size_are_those_of_pytorch(name, tmp_path):
    theirs = nets.randomised(FULL[name]())
    loaded = same_logits(name, saved(theirs, tmp_path / "w.safetensors"), theirs, (224,), {})
    assert loaded.classes is not None
    assert len(loaded.classes) == 1000


def test_the_auxiliary_heads_of_googlenet_are_read_where_the_network_has_them(tmp_path):
    theirs, size = nets.randomised(nets.GoogLeNet(16, 7)), 96
    path = saved(theirs, tmp_path / "w.safetensors")
    loaded = pretrained.load("inception_v1", path, width=16, aux=True)
    images = np.random.default_rng(0).normal(size=(2, size, size, 3)).astype(np.float32)
    with torch.no_grad():
        expected = theirs.heads(torch.from_numpy(images.transpose(0, 3, 1, 2).copy()))
    network = create("inception_v1", **loaded.overrides, dropout=0.0, aux_dropout=0.0)
    frozen = Frozen(network, ".")  # in training the heads run, and by their running statistics they are comparable
    found, _ = jax.jit(lambda v, x: frozen.apply(v, x, train=True, mutable=["batch_stats"]))(loaded.variables, images)
    for ours, logits in zip(found, expected, strict=True):
        assert np.abs(ours - logits.numpy()).max() <= 1e-4 * logits.abs().max()

    plain = pretrained.load("inception_v1", path, width=16)
    assert not any("aux" in key for key in flatten(plain.variables))
    bare = {key: value for key, value in theirs.state_dict().items() if not key.startswith("aux")}
    save_file(bare, tmp_path / "bare.safetensors")
    of_bare = pretrained.load("inception_v1", tmp_path / "bare.safetensors", width=16)
    jax.tree.map(np.testing.assert_array_equal, of_bare.variables, plain.variables)
    with pytest.raises(InputError, match=r"missing aux1\.conv\.conv\.weight, which is params/aux1/conv/kernel"):
        pretrained.load("inception_v1", tmp_path / "bare.safetensors", width=16, aux=True)


def test_googlenet_has_the_published_counts_and_takes_what_torchvision_makes_of_imagenets_pixels():
    counts = {key: value.numel() for key, value in nets.GoogLeNet(64, 1000).named_parameters()}
    assert sum(counts.values()) == 13_004_888
    assert sum(n for key, n in counts.items() if not key.startswith("aux")) == 6_624_904
    pictures = np.random.default_rng(0).integers(256, size=(2, 3, 4, 3), dtype=np.uint8)
    mean, std = np.array([0.485, 0.456, 0.406], np.float32), np.array([0.229, 0.224, 0.225], np.float32)
    transformed = np.asarray(PREPROCESSINGS["imagenet"](pictures)) * (std / 0.5) + (mean - 0.5) / 0.5
    np.testing.assert_allclose(PREPROCESSINGS["inception"](pictures), transformed, atol=1e-6)


def test_files_of_numpy_may_have_either_order_of_axes(tmp_path):
    theirs = nets.randomised(nets.ResNet((3, 3, 3), 4, 10, cifar=True))
    state = {key: value.numpy() for key, value in theirs.state_dict().items()}
    np.savez(tmp_path / "torch.npz", **{f"module.{key}": value for key, value in state.items()})
    flax = {key: np.transpose(v, (*range(2, v.ndim), 1, 0)) if v.ndim > 1 else v for key, v in state.items()}
    np.savez(tmp_path / "flax.npz", **flax)
    for file in ("torch.npz", "flax.npz"):
        loaded = same_logits("cifar_resnet20", tmp_path / file, theirs, (32,), SMALL)
        assert loaded.classes is not None
        assert loaded.classes[3] == "cat"
        assert loaded.preprocessing.size == (32, 32)


def test_half_precision_is_widened_exactly(tmp_path):
    theirs = nets.randomised(nets.ResNet((3, 3, 3), 4, 10, cifar=True)).bfloat16()
    path = saved(theirs, tmp_path / "w.safetensors")
    loaded = pretrained.load("cifar_resnet20", path, **SMALL)
    kernel = theirs.conv1.weight.detach().float().numpy().transpose(2, 3, 1, 0)
    np.testing.assert_array_equal(loaded.variables["params"]["conv1"]["kernel"], kernel)


def test_the_converter_reads_tensors_alone(tmp_path):
    from jaxcnn.pretrained.from_torch import convert

    theirs = nets.randomised(nets.ResNet((3, 3, 3), 4, 10, cifar=True))
    torch.save({"state_dict": theirs.state_dict(), "epoch": 3}, tmp_path / "w.th")
    with pytest.raises(InputError, match=r"pickles.*from_torch"):
        pretrained.load("cifar_resnet20", tmp_path / "w.th")
    assert convert(str(tmp_path / "w.th"), str(tmp_path / "w.safetensors")) == len(theirs.state_dict())
    same_logits("cifar_resnet20", tmp_path / "w.safetensors", theirs, (32,), SMALL)
