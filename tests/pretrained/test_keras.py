"""Files as Keras writes them, of PyTorch networks with its epsilon and padding: loaded, they give the same logits."""

import h5py
import jax
import numpy as np
import pytest

torch = pytest.importorskip("torch")

import torch_nets as nets  # noqa: E402

from jaxcnn import pretrained  # noqa: E402
from jaxcnn.models import create  # noqa: E402
from jaxcnn.pretrained.pixels import PREPROCESSINGS  # noqa: E402

nn = torch.nn


def randomised(net, epsilon):
    for module in net.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eps = epsilon
    return nets.randomised(net)


def weights(module):
    """A PyTorch layer's arrays under Keras's names, and as Keras has their axes."""
    state = {key: value.detach().numpy() for key, value in module.state_dict().items()}
    if isinstance(module, nn.BatchNorm2d):
        names = {"gamma": "weight", "beta": "bias", "moving_mean": "running_mean", "moving_variance": "running_var"}
        return {name: state[key] for name, key in names.items()}
    kernel = state["weight"]
    if isinstance(module, nn.Linear):
        return {"kernel": kernel.T, "bias": state["bias"]}
    if module.groups > 1:
        return {"depthwise_kernel": kernel.transpose(2, 3, 0, 1)}
    return {"kernel": kernel.transpose(2, 3, 1, 0)}


def written(path, layers, *, inside=""):
    """`inside` "model_weights/" is a whole model's file, "" one of weights alone."""
    with h5py.File(path, "w") as file:
        for name, arrays in layers.items():
            for weight, array in arrays.items():
                file[f"{inside}{name}/{name}/{weight}:0"] = array
    return path


def densenet_layers(net, *, old):
    """In the files that Keras published the stem is conv1/conv and conv1/bn, and the head fc1000."""
    f = net.features
    layers = {"conv1/conv" if old else "conv1_conv": f.conv0, "conv1/bn" if old else "conv1_bn": f.norm0}
    for i in range(1, 5):
        for j, layer in enumerate(getattr(f, f"denseblock{i}"), 1):
            name = f"conv{i + 1}_block{j}"
            layers |= {f"{name}_0_bn": layer.norm1, f"{name}_1_conv": layer.conv1}
            layers |= {f"{name}_1_bn": layer.norm2, f"{name}_2_conv": layer.conv2}
        if i < 4:
            transition = getattr(f, f"transition{i}")
            layers |= {f"pool{i + 1}_bn": transition.norm, f"pool{i + 1}_conv": transition.conv}
    layers |= {"bn": f.norm5, "fc1000" if old else "predictions": net.classifier}
    return {name: weights(module) for name, module in layers.items()}


def mobilenet_layers(net):
    """The head is a 1x1 convolution."""
    layers = {"conv1": net.conv_stem, "conv1_bn": net.bn1}
    for i, block in enumerate((block for stage in net.blocks for block in stage), 1):
        layers |= {f"conv_dw_{i}": block.conv_dw, f"conv_dw_{i}_bn": block.bn1}
        layers |= {f"conv_pw_{i}": block.conv_pw, f"conv_pw_{i}_bn": block.bn2}
    head = weights(net.classifier)
    return {name: weights(module) for name, module in layers.items()} | {
        "conv_preds": head | {"kernel": head["kernel"][None, None]}
    }


def agree(loaded, theirs, sizes):
    network = create(loaded.model, **loaded.overrides)
    apply = jax.jit(lambda v, x: network.apply(v, x, train=False))
    for size in sizes:
        images = np.random.default_rng(size).normal(size=(2, size, size, 3)).astype(np.float32)
        with torch.no_grad():
            expected = theirs(torch.from_numpy(images.transpose(0, 3, 1, 2).copy())).numpy()
        assert expected.std() > 1e-3
        assert np.abs(apply(loaded.variables, images) - expected).max() <= 1e-4 * np.abs(expected).max()


def test_densenet_of_both_ages(tmp_path):
    theirs = randomised(nets.DenseNet((2, 3, 2, 2), 8, 16, 7), 1.001e-5)
    options = {"growth": 8, "blocks": (2, 3, 2, 2)}
    old = written(tmp_path / "old.h5", densenet_layers(theirs, old=True))
    new = written(tmp_path / "new.h5", densenet_layers(theirs, old=False), inside="model_weights/")
    loaded, same = (pretrained.load("densenet121", path, **options) for path in (old, new))
    agree(loaded, theirs, (197,))
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, same.variables)
    assert loaded.layout == same.layout == "keras"
    assert loaded.overrides == {**options, "epsilon": 1.001e-5, "num_classes": 7}
    assert loaded.preprocessing == PREPROCESSINGS["imagenet"]


def test_mobilenet_with_zeros_on_the_far_side_alone(tmp_path):
    theirs = randomised(nets.MobileNet(0.25, 7, keras=True), 1e-3)
    loaded = pretrained.load("mobilenet_v1", written(tmp_path / "w.h5", mobilenet_layers(theirs)), width=0.25)
    agree(loaded, theirs, (128, 75))
    assert loaded.overrides == {"width": 0.25, "epsilon": 1e-3, "pad_after": True, "num_classes": 7}
    assert loaded.preprocessing == PREPROCESSINGS["inception"]
