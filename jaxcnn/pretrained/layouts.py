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


@dataclass(frozen=True)
class Layout:
    """`transposed`: kernels lie (out, in, *window), as PyTorch has them. `flatten`: the size of the map that the
    dense layer of that path reads, which PyTorch flattens in the order c, h, w."""

    name: str
    names: Names
    leaves: Mapping[str, Sequence[str]]
    separator: str
    preprocessing: str
    transposed: bool = False
    flatten: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    overrides: Mapping[str, Any] = field(default_factory=dict)


def _torch(names: Names, *, name: str = "torchvision", preprocessing: str = "imagenet", **options: Any) -> Layout:
    return Layout(name, names, TORCH, ".", preprocessing, transposed=True, **options)


def _keras(names: Names, **options: Any) -> Layout:
    return Layout("keras", names, KERAS, "/", "caffe", **options)


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


def _mobilenet(paths: Sequence[str], network: Any) -> dict[str, str]:
    """timm's: five stages, a new one wherever the channels double."""
    blocks = [(stage, i) for stage, count in enumerate((1, 2, 2, 6, 2)) for i in range(count)]
    found = {"conv1": "conv_stem", "conv1_bn": "bn1", "fc": "classifier"}
    for number, (stage, i) in enumerate(blocks, 1):
        for inner, name in (("dw", "conv_dw"), ("dw_bn", "bn1"), ("pw", "conv_pw"), ("pw_bn", "bn2")):
            part, _, norm = inner.partition("_")
            found[f"conv_{part}_{number}{'_' + norm if norm else ''}"] = f"blocks.{stage}.{i}.{name}"
    return found


_VGG_KERAS = _renamed((r"conv(\d)_(\d)", r"block\1_conv\2"), ("fc6", "fc1"), ("fc7", "fc2"), ("fc8", "predictions"))

LAYOUTS: dict[str, tuple[Layout, ...]] = {
    "alexnet": (_torch(_alexnet, flatten={"fc6": (6, 6)}),),
    "vgg": (
        _torch(_vgg("classifier.0", "classifier.3", "classifier.6"), flatten={"fc6": (7, 7)}),
        _torch(_vgg("pre_logits.fc1", "pre_logits.fc2", "head.fc"), name="timm"),
        _keras(_VGG_KERAS),
    ),
    "resnet": (
        _torch(_residual("fc")),
        _keras(_residual_keras, overrides={"v1": True, "use_bias": True, "epsilon": 1.001e-5}),
    ),
    "cifar_resnet": (_torch(_residual("linear"), name="akamaster"), _torch(_residual("fc"))),
    "resnetv2": (_torch(_residual_v2, name="timm", preprocessing="imagenet_bicubic"),),
    "densenet": (_torch(_DENSENET),),
    "mobilenet": (_torch(_mobilenet, name="timm", preprocessing="inception"),),
    "squeezenet": (_torch(_squeezenet),),
}
"""By family of models; `jaxcnn`, our own layout, stands beside them for every one."""

PAPERS = {"squeezenet": "squeezenet", "vgg": "caffe"}
"""What networks in the papers' own names were trained with: they come from Caffe."""


def of_family(family: str) -> tuple[Layout, ...]:
    """The layouts in which weights of a family are read."""
    same = Layout(
        "jaxcnn", _renamed(("(.+)", r"\1")), {leaf: (leaf,) for leaf in TORCH}, "/", PAPERS.get(family, "imagenet")
    )
    return (*LAYOUTS.get(family, ()), same)
