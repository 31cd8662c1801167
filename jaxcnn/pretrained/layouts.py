"""How other codebases name the same layers.

A layout maps the modules of one of our networks to the names they have in the source; what their leaves are called
there, and how the arrays lie, goes by the framework.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

Names = Callable[[Sequence[str], Any], Mapping[str, str]]
"""(paths of our modules, the network) -> the source's name of each; a path left out has no counterpart."""

TORCH = {
    "kernel": ("weight",),
    "bias": ("bias",),
    "scale": ("weight",),
    "mean": ("running_mean",),
    "var": ("running_var",),
}
KERAS = {
    "kernel": ("kernel", "depthwise_kernel", "{module}_W_1"),
    "bias": ("bias", "beta", "{module}_b_1"),
    "scale": ("gamma",),
    "mean": ("moving_mean",),
    "var": ("moving_variance",),
}
OURS = {leaf: (leaf,) for leaf in TORCH}


@dataclass(frozen=True)
class Layout:
    """`transposed`: kernels lie (out, in, *window), as PyTorch has them. `flatten`: the size of the map that the
    dense layer of that path reads, which PyTorch flattens in the order c, h, w. `extras`: a regular expression over the
    source's names for what is dropped where the network does not have it; by default nothing."""

    name: str
    names: Names
    leaves: Mapping[str, Sequence[str]]
    separator: str
    preprocessing: str
    transposed: bool = False
    flatten: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)
    extras: str = "(?!)"


def _torch(names: Names, *, name: str = "torchvision", preprocessing: str = "imagenet", **options: Any) -> Layout:
    return Layout(name, names, TORCH, ".", preprocessing, transposed=True, **options)


def _keras(names: Names, *, preprocessing: str = "caffe", **options: Any) -> Layout:
    return Layout("keras", names, KERAS, "/", preprocessing, **options)


def _renamed(*rules: tuple[str, str | Callable[[re.Match[str]], str]]) -> Names:
    """Names by the first pattern that matches a whole path."""

    def names(paths: Sequence[str], network: Any) -> dict[str, str]:
        found = {}
        for path in paths:
            for pattern, replacement in rules:
                if match := re.fullmatch(pattern, path):
                    found[path] = match.expand(replacement) if isinstance(replacement, str) else replacement(match)
                    break
        return found

    return names


def _residual(fc: str) -> Names:
    """torchvision's ResNets: layer1.0.conv1, layer2.0.downsample.0, ..."""

    def block(match: re.Match[str]) -> str:
        inner = {"projection": "downsample.0", "projection_bn": "downsample.1"}.get(match[3], match[3])
        return f"layer{match[1]}.{int(match[2]) - 1}.{inner}"

    return _renamed(("(conv1|bn1)", r"\1"), (r"stage(\d)/block(\d+)/(.+)", block), ("fc", fc))


def _residual_v2(paths: Sequence[str], network: Any) -> Mapping[str, str]:
    """timm's pre-activation ResNets: stages.0.blocks.0.norm1, stages.1.blocks.0.downsample.conv, ..."""

    def block(match: re.Match[str]) -> str:
        inner = "downsample.conv" if match[3] == "projection" else match[3].replace("bn", "norm")
        return f"stages.{int(match[1]) - 1}.blocks.{int(match[2]) - 1}.{inner}"

    rules = (("conv1", "stem.conv"), ("bn", "norm"), ("fc", "head.fc"), (r"stage(\d)/block(\d+)/(.+)", block))
    return _renamed(*rules)(paths, network)


def _residual_keras(paths: Sequence[str], network: Any) -> Mapping[str, str]:
    """conv2_block1_1_conv, conv2_block1_0_bn (the projection's), ..."""

    def block(match: re.Match[str]) -> str:
        kind = "bn" if "bn" in match[3] else "conv"
        number = "0" if match[3].startswith("projection") else match[3][-1]
        return f"conv{int(match[1]) + 1}_block{match[2]}_{number}_{kind}"

    rules = (("conv1", "conv1_conv"), ("bn1", "conv1_bn"), ("fc", "predictions"), (r"stage(\d)/block(\d+)/(.+)", block))
    return _renamed(*rules)(paths, network)


def _sequential(convolutions: Mapping[str, int], dense: Mapping[str, str]) -> dict[str, str]:
    """`features.N` by convolution, and the norm of each right after it."""
    found = {path: f"features.{i}" for path, i in convolutions.items()}
    norms = {path.replace("conv", "bn"): f"features.{i + 1}" for path, i in convolutions.items()}
    return found | norms | dict(dense)


def _vgg(fc6: str, fc7: str, fc8: str) -> Names:
    def names(paths: Sequence[str], network: Any) -> dict[str, str]:
        index, at = 0, {}
        for stage, convolutions in enumerate(network.convs, 1):
            for j in range(1, convolutions + 1):
                at[f"conv{stage}_{j}"] = index
                index += 2 if network.norm == "none" else 3
            index += 1  # the pool
        return _sequential(at, {"fc6": fc6, "fc7": fc7, "fc8": fc8})

    return names


def _alexnet(paths: Sequence[str], network: Any) -> dict[str, str]:
    at = {f"conv{i}": index for i, index in enumerate((0, 3, 6, 8, 10), 1)}
    return _sequential(at, {"fc6": "classifier.1", "fc7": "classifier.4", "fc8": "classifier.6"})


def _squeezenet(paths: Sequence[str], network: Any) -> dict[str, str]:
    found, index = {"conv1": "features.0", "conv10": "classifier.1"}, 2
    for i in range(1, 10):
        if i > 1:
            for inner in ("squeeze1x1", "expand1x1", "expand3x3"):
                found[f"fire{i}/{inner}"] = f"features.{index}.{inner.replace('squeeze1x1', 'squeeze')}"
            index += 1
        index += i in network.pools
    return found


_DENSENET = _renamed(
    ("(conv0|norm0|norm5)", r"features.\1"),
    (r"(denseblock\d)/layer(\d+)/(.+)", r"features.\1.denselayer\2.\3"),
    (r"(transition\d)/(.+)", r"features.\1.\2"),
    ("fc", "classifier"),
)


def _densenet_keras(paths: Sequence[str], network: Any) -> Mapping[str, str]:
    """conv2_block1_0_bn, conv2_block1_1_conv, ..., pool2_conv after the first dense block."""

    def layer(match: re.Match[str]) -> str:
        kind, n = ("bn", int(match[4]) - 1) if match[3] == "norm" else ("conv", int(match[4]))
        return f"conv{int(match[1]) + 1}_block{match[2]}_{n}_{kind}"

    def transition(match: re.Match[str]) -> str:
        return f"pool{int(match[1]) + 1}_{match[2].replace('norm', 'bn')}"

    stem = (("conv0", "conv1_conv"), ("norm0", "conv1_bn"), ("norm5", "bn"), ("fc", "predictions"))
    rules = (*stem, (r"denseblock(\d)/layer(\d+)/(norm|conv)(\d)", layer), (r"transition(\d)/(.+)", transition))
    return _renamed(*rules)(paths, network)


def _mobilenet(paths: Sequence[str], network: Any) -> dict[str, str]:
    """timm's: five stages, a new one wherever the channels double."""
    blocks = [(stage, i) for stage, count in enumerate((1, 2, 2, 6, 2)) for i in range(count)]
    found = {"conv1": "conv_stem", "conv1_bn": "bn1", "fc": "classifier"}
    for number, (stage, i) in enumerate(blocks, 1):
        for inner, name in (("dw", "conv_dw"), ("dw_bn", "bn1"), ("pw", "conv_pw"), ("pw_bn", "bn2")):
            part, _, norm = inner.partition("_")
            found[f"conv_{part}_{number}{'_' + norm if norm else ''}"] = f"blocks.{stage}.{i}.{name}"
    return found


_MOBILENET_KERAS = _renamed(("fc", "conv_preds"), ("(.+)", r"\1"))

_GOOGLENET_UNITS = {
    "conv1": "conv1",
    "conv2_reduce": "conv2",
    "conv2": "conv3",
    "conv1x1": "branch1",
    "reduce3x3": "branch2.0",
    "conv3x3": "branch2.1",
    "reduce5x5": "branch3.0",
    "conv5x5": "branch3.1",
    "pool_proj": "branch4.1",
    "conv": "conv",
}


def _googlenet(paths: Sequence[str], network: Any) -> dict[str, str]:
    """conv1.conv, conv1.bn, inception3a.branch2.0.conv, ..., aux1.conv.conv, aux1.fc1, fc."""
    found = {}
    for path in paths:
        module, _, name = path.removesuffix("_bn").rpartition("/")
        if name in _GOOGLENET_UNITS:
            parts = (module.replace("_", ""), _GOOGLENET_UNITS[name], "bn" if path.endswith("_bn") else "conv")
            found[path] = ".".join(filter(None, parts))
        else:
            found[path] = path.replace("/", ".")
    return found


_VGG_KERAS = _renamed((r"conv(\d)_(\d)", r"block\1_conv\2"), ("fc6", "fc1"), ("fc7", "fc2"), ("fc8", "predictions"))


def _encoder(name: str, *rules: tuple[str, str]) -> Layout:
    """Encoders for style transfer: they take RGB in 0..1 and end at conv5_1 or before; `_aux` trained small ones."""
    overrides = {"stem": True, "padding_mode": "reflect"}
    return Layout(name, _renamed(*rules), OURS, "/", "unit", overrides=overrides, extras="_aux/")


LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "alexnet": (_torch(_alexnet, flatten={"fc6": (6, 6)}),),
    "vgg": (
        _torch(_vgg("classifier.0", "classifier.3", "classifier.6"), flatten={"fc6": (7, 7)}),
        _torch(_vgg("pre_logits.fc1", "pre_logits.fc2", "head.fc"), name="timm"),
        _keras(_VGG_KERAS),
        _encoder("normalised", ("conv0", "preproc"), (r"(conv\d_\d)", r"\1")),
        _encoder("distilled", ("conv0", "conv0"), (r"conv(\d)_(\d)", r"conv\1\2")),
    ),
    "resnet": (
        _torch(_residual("fc")),
        _keras(_residual_keras, overrides={"v1": True, "use_bias": True, "epsilon": 1.001e-5}),
    ),
    "cifar_resnet": (_torch(_residual("linear"), name="akamaster"), _torch(_residual("fc"))),
    "resnetv2": (_torch(_residual_v2, name="timm", preprocessing="imagenet_bicubic"),),
    "densenet": (
        _torch(_DENSENET),
        _keras(_densenet_keras, preprocessing="imagenet", overrides={"epsilon": 1.001e-5}),
    ),
    "mobilenet": (
        _torch(_mobilenet, name="timm", preprocessing="inception"),
        _keras(_MOBILENET_KERAS, preprocessing="inception", overrides={"epsilon": 1e-3, "pad_after": True}),
    ),
    "squeezenet": (_torch(_squeezenet),),
    "inception": (
        # trained by TensorFlow's preprocessing, which torchvision applies inside the network (transform_input)
        _torch(
            _googlenet,
            preprocessing="inception",
            flatten={"aux1/fc1": (4, 4), "aux2/fc1": (4, 4)},
            extras=r"^aux[12]\.",
        ),
    ),
}
"""By family of models; `jaxcnn`, our own layout, stands beside them for every one."""

PAPERS = {"squeezenet": "squeezenet", "vgg": "caffe"}
"""What networks in the papers' own names were trained with: they come from Caffe."""


def of_family(family: str) -> tuple[Layout, ...]:
    """The layouts in which weights of a family are read."""
    same = Layout("jaxcnn", _renamed(("(.+)", r"\1")), OURS, "/", PAPERS.get(family, "imagenet"))
    return (*LAYOUTS.get(family, ()), same)
