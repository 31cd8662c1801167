"""The frozen network: from files of every layout, normalised, and of random weights."""

import os
from dataclasses import replace
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from safetensors.numpy import save_file
from tiny_vgg import SHALLOW, VGG19, parameters, tiny

from jaxcnn.errors import InputError
from jaxcnn.models import create
from jaxcnn.style import network as networks
from jaxcnn.style.network import Network, load, mean_activations, normalise

VGG16 = (2, 2, 3, 3, 3)
MEAN, STD = np.float32([0.485, 0.456, 0.406]), np.float32([0.229, 0.224, 0.225])
IMAGENET = (np.diag(1 / STD), -MEAN / STD)
CAFFE = (255 * np.eye(3)[::-1], -np.float32([103.939, 116.779, 123.68]))
UNIT = (np.eye(3), np.zeros(3))


def pictures(seed=0, size=(37, 42)):
    return np.random.default_rng(seed).uniform(size=(2, *size, 3)).astype(np.float32)


def reference(layers, x, affine, *, mode="constant", norms=None):
    """Relus by name, from the paper's table; `layers` in order, `norms` (mean, deviation, scale, shift) of some."""
    matrix, bias = affine
    x, found, stage = np.float32(x @ matrix + bias), {}, "1"
    for name, leaves in layers.items():
        if "_" in name and name[4] != stage:
            x, stage = lax.reduce_window(x, -np.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID"), name[4]
        reach = leaves["kernel"].shape[0] // 2
        x = np.pad(x, ((0, 0), (reach, reach), (reach, reach), (0, 0)), mode)
        x = lax.conv_general_dilated(x, leaves["kernel"], (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = np.asarray(x) + leaves["bias"]
        if norms:
            mean, deviation, scale, shift = norms[name]
            x = (x - mean) / deviation * scale + shift
        if "_" in name:
            x = found[name.replace("conv", "relu")] = np.maximum(x, 0)
    return found


def same(network: Network, expected, affine):
    """Every relu that the weights reach, and the arithmetic before them."""
    assert [name for name in network.layers if name.startswith("relu")] == list(expected)
    np.testing.assert_allclose(network.matrix, affine[0], rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(network.bias, affine[1], rtol=1e-5, atol=1e-4)
    found = jax.jit(lambda x: network.features(x, list(expected)))(pictures())
    for name, one in expected.items():
        assert np.abs(found[name] - one).max() <= 1e-5 * np.abs(one).max(), name


def until(last, convs=VGG19, *, width=2):
    layers = parameters(convs, width=width)
    names = list(layers)
    return {name: layers[name] for name in names[: names.index(last) + 1]}


def ours(path, layers, **extra):
    flat = {f"{layer}/{leaf}": array for layer, leaves in layers.items() for leaf, array in leaves.items()}
    np.savez(path, **flat, **extra)
    return path


def torch_names(layers, convs, *, norm=False):
    """torchvision's `features.N` by layer."""
    index, found = 0, {}
    for stage, count in enumerate(convs, 1):
        for j in range(1, count + 1):
            found[f"conv{stage}_{j}"] = index
            index += 3 if norm else 2
        index += 1
    return {name: found[name] for name in layers}


def torch_arrays(layers, convs, *, norm=False):
    found = {}
    for name, index in torch_names(layers, convs, norm=norm).items():
        found[f"features.{index}.weight"] = np.ascontiguousarray(layers[name]["kernel"].transpose(3, 2, 0, 1))
        found[f"features.{index}.bias"] = layers[name]["bias"]
    return found


def dense(*shape):
    return np.random.default_rng(7).normal(0, 0.1, shape).astype(np.float32)


@pytest.mark.parametrize(
    ("last", "convs", "pools"),
    [
        ("conv3_3", VGG16, 2),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (("conv3_4", VGG19, 3), ("conv1_1", VGG19, 0), ("conv5_4", VGG19, 5))
        ),
    ],
)
def test_our_own_names_may_end_at_any_layer(last, convs, pools, tmp_path):
    """Papers' names come from Caffe: BGR in 0..255 less the mean."""
    layers = until(last, convs)
    network = load(ours(tmp_path / "vgg.npz", layers))
    assert network.layers[-1] == (f"pool{pools}" if last in ("conv3_4", "conv5_4") else last.replace("conv", "relu"))
    assert network.source == str(tmp_path / "vgg.npz")
    assert sum(name.startswith("pool") for name in network.layers) == pools
    same(network, reference(layers, pictures(), CAFFE), CAFFE)


@pytest.mark.parametrize(
    ("heads", "convs"),
    [
        ("torchvision", VGG19),
        *(pytest.param(heads, VGG16, marks=pytest.mark.slow) for heads in ("timm", "none")),
    ],
)
def test_pytorch_s_state_dictionaries(heads, convs, tmp_path):
    layers = until("conv5_3" if convs == VGG16 else "conv5_4", convs)
    arrays = torch_arrays(layers, convs)
    if heads == "torchvision":
        for i, shape in ((0, (24, 49 * 16)), (3, (24, 24)), (6, (7, 24))):
            arrays |= {f"classifier.{i}.weight": dense(*shape), f"classifier.{i}.bias": dense(shape[0])}
    elif heads == "timm":
        for name, shape in (
            ("pre_logits.fc1", (24, 16, 7, 7)),
            ("pre_logits.fc2", (24, 24, 1, 1)),
            ("head.fc", (7, 24)),
        ):
            arrays |= {f"{name}.weight": dense(*shape), f"{name}.bias": dense(shape[0])}
    save_file(arrays, tmp_path / "vgg.safetensors")
    same(load(tmp_path / "vgg.safetensors"), reference(layers, pictures(), IMAGENET), IMAGENET)


def test_pytorch_s_vgg_with_batch_norm(tmp_path):
    """Its running statistics are used, and it may end early too."""
    layers, rng = until("conv3_2", VGG16), np.random.default_rng(3)
    arrays, norms = torch_arrays(layers, VGG16, norm=True), {}
    for name, index in torch_names(layers, VGG16, norm=True).items():
        mean, variance, scale, shift = (np.float32(rng.uniform(0.5, 2, len(layers[name]["bias"]))) for _ in range(4))
        norms[name] = mean, np.sqrt(variance + np.float32(1e-5)), scale, shift
        leaves = {"weight": scale, "bias": shift, "running_mean": mean, "running_var": variance}
        arrays |= {f"features.{index + 1}.{leaf}": array for leaf, array in leaves.items()}
        arrays[f"features.{index + 1}.num_batches_tracked"] = np.array(3)
    save_file(arrays, tmp_path / "vgg.safetensors")
    network = load(tmp_path / "vgg.safetensors")
    same(network, reference(layers, pictures(), IMAGENET, norms=norms), IMAGENET)
    assert network.layers[-3:] == ("conv3_2", "bn3_2", "relu3_2")
    with pytest.raises(InputError, match="norm batch and act relu: only plain ReLU networks scale"):
        normalise(network, [pictures()])


@pytest.mark.parametrize("top", [True, False])
def test_keras_s_files_with_and_without_their_top(top, tmp_path):
    """Oxford's weights: BGR in 0..255 less the mean."""
    layers = until("conv5_4")
    with h5py.File(tmp_path / "vgg.h5", "w") as file:
        for name, leaves in layers.items():
            keras = f"block{name[4]}_conv{name[6]}"
            for leaf, array in leaves.items():
                file[f"{keras}/{keras}/{leaf}:0"] = array
        for name, shape in (("fc1", (49 * 16, 24)), ("fc2", (24, 24)), ("predictions", (24, 7))) if top else ():
            file[f"{name}/{name}/kernel:0"], file[f"{name}/{name}/bias:0"] = dense(*shape), dense(shape[1])
    same(load(tmp_path / "vgg.h5"), reference(layers, pictures(), CAFFE), CAFFE)


def stem():
    rng = np.random.default_rng(5)
    return {"kernel": rng.normal(size=(1, 1, 3, 3)).astype(np.float32), "bias": rng.normal(size=3).astype(np.float32)}


def test_the_normalised_encoder(tmp_path):
    """A 1x1 convolution "preproc" in front, and mirrors for padding."""
    layers = {"preproc": stem(), **until("conv3_1")}
    network = load(ours(tmp_path / "encoder.npz", layers))
    same(network, reference(layers, pictures(), UNIT, mode="reflect"), UNIT)


def test_the_distilled_encoder(tmp_path):
    """conv0, conv11, conv12, ... of 16 channels; `_aux` layers helped to train it."""
    layers = {"conv0": stem(), **until("conv5_1", width=16)}
    renamed = {name.replace("_", ""): leaves for name, leaves in layers.items()}
    aux = {
        f"conv{i}1_aux/{leaf}": dense(*shape)
        for i in (1, 2)
        for leaf, shape in (("kernel", (1, 1, 16 * i, 8)), ("bias", (8,)))
    }
    network = load(ours(tmp_path / "encoder.npz", renamed, **aux))
    same(network, reference(layers, pictures(), UNIT, mode="reflect"), UNIT)


def test_average_pooling_has_the_same_weights(tmp_path):
    layers = until("conv2_1")
    path = ours(tmp_path / "vgg.npz", layers)
    network, most = load(path, pooling="avg"), load(path)
    jax.tree.map(np.testing.assert_array_equal, network.variables, most.variables)
    found = network.features(pictures(), ["relu1_2", "pool1"])
    blocks = np.asarray(found["relu1_2"])[:, :36].reshape(2, 18, 2, 21, 2, 2)
    np.testing.assert_allclose(found["pool1"], blocks.mean((2, 4)), rtol=1e-5)
    with pytest.raises(InputError, match=r"unknown pooling 'mean'.*max, avg"):
        load(path, pooling="mean").features(pictures(), ["pool1"])


def test_a_model_may_be_named(tmp_path):
    path = ours(tmp_path / "vgg.npz", until("conv3_3", VGG16))
    assert load(path, model="vgg16").layers[-1] == "pool3"
    with pytest.raises(InputError, match="unknown VGG 'vgg_16': did you mean 'vgg16'"):
        load(path, model="vgg_16")
    with pytest.raises(InputError, match="does not hold the weights of vgg13"):
        load(path, model="vgg13")


@pytest.mark.parametrize("key", ["conv1_1/kernel", "conv3_1/bias", "conv11_aux/kernel", "fc6/kernel"])
@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused(key, value, tmp_path):
    """In arrays that are left out too: the file is damaged."""
    extra = {name: dense(3, 4) for name in ("conv11_aux/kernel", "fc6/kernel")}
    layers = until("conv3_1")
    array = extra[key] if key in extra else layers[key.split("/")[0]][key.split("/")[1]]
    array.reshape(-1)[-1] = value
    with pytest.raises(InputError, match=rf"vgg\.npz: {key} holds values that are not finite"):
        load(ours(tmp_path / "vgg.npz", layers, **extra))


@pytest.mark.parametrize("missing", [pytest.param("conv1_1", marks=pytest.mark.slow), "conv3_1"])
def test_a_hole_in_the_middle_is_refused(missing, tmp_path):
    layers = until("conv3_4")
    del layers[missing]
    with pytest.raises(InputError, match=rf"does not hold the weights of vgg19[^$]*missing {missing}/kernel"):
        load(ours(tmp_path / "vgg.npz", layers))


def test_weights_of_another_network_are_refused(tmp_path):
    model = create("cifar_resnet20", width=2)
    shapes = jax.eval_shape(lambda x: model.init(jax.random.key(0), x, train=False), jnp.zeros((1, 32, 32, 3)))
    leaves, _ = jax.tree_util.tree_flatten_with_path(shapes["params"])
    arrays = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.ones(leaf.shape, np.float32) for path, leaf in leaves
    }
    np.savez(tmp_path / "resnet.npz", **arrays)
    with pytest.raises(InputError, match=r"resnet\.npz does not hold the weights of vgg19"):
        load(tmp_path / "resnet.npz")
    save_file({"layer1.0.conv1.weight": dense(8, 8, 3, 3)}, tmp_path / "resnet.safetensors")
    with pytest.raises(InputError, match=r"resnet\.safetensors does not hold the weights of vgg19"):
        load(tmp_path / "resnet.safetensors")


def test_dense_layers_alone_are_refused(tmp_path):
    np.savez(tmp_path / "vgg.npz", **{"fc6/kernel": dense(5, 5), "fc6/bias": dense(5)})
    with pytest.raises(InputError, match="does not hold the weights of vgg19"):
        load(tmp_path / "vgg.npz")


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".h5", ".pth"])
def test_pickles_by_any_name_are_refused(suffix, tmp_path):
    """And nothing in them is run."""
    path = tmp_path / f"vgg{suffix}"
    marker = tmp_path / "was-run"
    path.write_bytes(b"cposix\nsystem\n(S'touch " + str(marker).encode() + b"'\ntR.")
    with pytest.raises(InputError, match=r"pickles|cannot be read as"):
        load(path)
    assert not marker.exists()


def test_files_that_are_not_there_are_refused(tmp_path):
    with pytest.raises(InputError, match=r"none\.npz is not a file"):
        load(tmp_path / "none.npz")


def test_layers_that_a_network_does_not_have_are_refused_with_the_nearest():
    network = tiny((2, 2))
    with pytest.raises(InputError, match=r"unknown layer of a tiny VGG 'relu2_3': did you mean 'relu2_"):
        network.check(["relu1_1", "relu2_3"], size=(64, 64), what="the picture")


@pytest.mark.parametrize(
    ("layers", "deepest", "stride"), [(("relu5_1", "relu1_1"), "relu5_1", 16), (("relu2_1", "relu1_1"), "relu2_1", 2)]
)
def test_pictures_smaller_than_the_stride_of_a_layer_are_refused(layers, deepest, stride):
    network = tiny(SHALLOW)
    message = rf"the picture has {stride - 1} x 99 pixels, fewer than the stride of {deepest}, {stride}"
    with pytest.raises(InputError, match=message):
        network.check(layers, size=(99, stride - 1), what="the picture")
    network.check(layers, size=(stride, stride), what="the picture")
    for mode in ("zeros", "reflect"):
        found = tiny(SHALLOW, padding_mode=mode).features(jnp.ones((1, stride, stride, 3)), layers)
        assert found[deepest].shape[1:3] == (1, 1)


def test_reach_of_the_paper_s_layers():
    """Receptive fields by hand: relu5_1 sees 156 pixels, 70 beyond each side of its 16."""
    reach = tiny(VGG19).reach(networks.PAPER_STYLE)
    assert (reach.stride, reach.halo) == (16, 80)
    assert [reach.of(name) for name in networks.PAPER_STYLE] == [1, 2, 4, 8, 16]
    assert tiny(VGG19).reach(["relu1_1"])[:2] == (1, 1)
    assert tiny(VGG19, padding_mode="reflect").reach(["relu5_1"])[:2] == (16, 80)


@pytest.mark.parametrize(
    ("pooling", "padding_mode"), [("max", "zeros"), pytest.param("avg", "reflect", marks=pytest.mark.slow)]
)
def test_every_filter_of_a_normalised_network_answers_1_in_the_mean(pooling, padding_mode):
    """Images of several sizes count by their locations; features are what they were over their means."""
    network = tiny((2, 1, 3), pooling=pooling, padding_mode=padding_mode)
    images = [pictures(0), pictures(1), pictures(2, size=(48, 33))]
    scaled = normalise(network, images)
    relus = [name for name in network.layers if name.startswith("relu")]
    features = jax.jit(lambda network, x: network.features(x, relus))
    before, after = ([features(each, image) for image in images] for each in (network, scaled))
    for name in relus:
        plain, one = (
            np.concatenate([each[name].reshape(-1, each[name].shape[-1]) for each in some]) for some in (before, after)
        )
        mean = plain.mean(0, dtype=np.float64)
        alive = mean > 0
        assert alive.any()
        np.testing.assert_allclose(one.mean(0, dtype=np.float64)[alive], 1, rtol=1e-4)
        assert (one[:, ~alive] == 0).all()
        expected = plain / np.where(alive, mean, 1)
        assert np.abs(one - expected).max() <= 1e-4 * expected.max()
    assert scaled.source == "a tiny VGG, normalised"
    assert scaled.layers == network.layers


@pytest.mark.parametrize("pooling", ["max", "avg"])
def test_logits_are_unchanged_where_the_first_dense_layer_takes_the_last_scale_back(pooling):
    """Networks of ReLU and pooling are positively homogeneous."""
    network, rng = tiny(pooling=pooling), np.random.default_rng(0)
    images = [pictures()]
    scaled = normalise(network, images)
    mean = mean_activations(network, images, ["relu5_1"])["relu5_1"]
    assert (mean != 1).any()
    module = create("vgg19", convs=SHALLOW, width=2, hidden=24, num_classes=7, pooling=pooling)
    heads = {
        name: {
            "kernel": rng.normal(0, 0.3, shape).astype(np.float32),
            "bias": rng.normal(size=shape[1]).astype(np.float32),
        }
        for name, shape in (("fc6", (49 * 16, 24)), ("fc7", (24, 24)), ("fc8", (24, 7)))
    }
    logits = jax.jit(lambda params, x: module.apply({"params": params}, x, train=False))
    x = 4 * pictures(9) - 2
    expected = logits({**network.variables["params"], **heads}, x)
    fc6 = {**heads["fc6"], "kernel": heads["fc6"]["kernel"] * np.tile(mean, 49).reshape(-1, 1)}
    found = logits({**scaled.variables["params"], **heads, "fc6": fc6}, x)
    assert np.abs(found - expected).max() <= 1e-4 * np.abs(expected).max()
    assert np.abs(logits({**scaled.variables["params"], **heads}, x) - expected).max() > 1e-2


def test_filters_that_are_never_active_stay():
    network = tiny((2,))
    params = jax.tree.map(np.array, network.variables["params"])
    params["conv1_1"]["bias"][1] = -1e3
    network = replace(network, variables={"params": params})
    scaled = normalise(network, [pictures()])
    np.testing.assert_array_equal(
        scaled.variables["params"]["conv1_1"]["kernel"][..., 1], params["conv1_1"]["kernel"][..., 1]
    )
    assert mean_activations(network, [pictures()], ["relu1_1"])["relu1_1"][1] == 1


def test_networks_of_another_activation_do_not_scale():
    network = tiny((1,))
    with pytest.raises(InputError, match="norm none and act elu"):
        normalise(replace(network, module=network.module.clone(act="elu")), [pictures()])


def test_random_weights_are_the_same_twice_and_those_of_he():
    """Variance 2 / fan_in, biases 0; for BGR in 0..255 less the mean."""
    one, two, other = networks.random(width=4), networks.random(width=4), networks.random(width=4, seed=1)
    jax.tree.map(np.testing.assert_array_equal, one, two)
    assert list(one.variables["params"]) == list(parameters(VGG19))
    for layer, leaves in one.variables["params"].items():
        kernel = np.asarray(leaves["kernel"])
        assert kernel.dtype == np.float32
        assert kernel.shape == parameters(VGG19, width=4)[layer]["kernel"].shape
        assert (kernel != other.variables["params"][layer]["kernel"]).all()
        assert abs(kernel.std() / np.sqrt(2 / np.prod(kernel.shape[:3])) - 1) < 4 / np.sqrt(kernel.size)
        assert not np.asarray(leaves["bias"]).any()
    np.testing.assert_allclose(one.matrix, CAFFE[0], rtol=1e-5)
    np.testing.assert_allclose(one.bias, CAFFE[1], rtol=1e-5)
    assert set(networks.PAPER_STYLE) | {networks.PAPER_CONTENT} < set(one.layers)
    assert one.layers[-1] == "pool5"
    assert "random weights (seed 1)" in other.source


def data(name):
    """A real file, where there is one."""
    path = Path(os.environ.get("JAXCNN_DATA", ""), "weights", name)
    if "JAXCNN_DATA" not in os.environ or not path.is_file():
        pytest.skip(f"needs weights/{name} under JAXCNN_DATA")
    return path


@pytest.mark.parametrize(
    ("name", "last", "channels", "affine"),
    [
        ("vgg16_to_conv3_3.npz", "relu3_3", 256, CAFFE),
        ("vgg19_normalised_to_conv3_1.npz", "relu3_1", 256, UNIT),
        ("vgg19_16x_encoder_relu5_1.npz", "relu5_1", 128, UNIT),
    ],
)
def test_real_files_reach_what_they_say(name, last, channels, affine):
    network = load(data(name))
    assert network.layers[-1] == last
    np.testing.assert_allclose(network.matrix, affine[0], rtol=1e-5)
    np.testing.assert_allclose(network.bias, affine[1], rtol=1e-5)
    found = network.features(pictures(), [last])[last]
    assert found.shape[-1] == channels
    assert 0.01 < (np.asarray(found) > 0).mean() < 0.99
