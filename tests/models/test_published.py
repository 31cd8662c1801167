"""Every architecture against its published counts, and at full size."""

import jax
import jax.numpy as jnp
import pytest

from jaxcnn.analysis import summary
from jaxcnn.analysis.counts import counts
from jaxcnn.errors import InputError
from jaxcnn.models import MODELS, create

# torchvision and timm (VGG, ResNet, ResNet v2, DenseNet, SqueezeNet, GoogLeNet, AlexNet), Keras (MobileNet), He et al.
# 2016 and 2016b, Huang et al. 2017 (arithmetic of their tables), LeCun et al. 1998.
PARAMETERS = {
    "lenet5": 61_706, "lenet5_1998": 60_000, "alexnet": 61_100_840,
    "squeezenet1_0": 1_248_424, "squeezenet1_1": 1_235_496, "inception_v1": 6_624_904, "mobilenet_v1": 4_231_976,
    "vgg11": 132_863_336, "vgg13": 133_047_848, "vgg16": 138_357_544, "vgg19": 143_667_240,
    "vgg11_bn": 132_868_840, "vgg13_bn": 133_053_736, "vgg16_bn": 138_365_992, "vgg19_bn": 143_678_248,
    "plain18": 11_515_688, "plain34": 21_623_848,
    "resnet18": 11_689_512, "resnet34": 21_797_672, "resnet50": 25_557_032, "resnet101": 44_549_160,
    "resnet152": 60_192_808,
    "resnetv2_18": 11_687_720, "resnetv2_34": 21_795_880, "resnetv2_50": 25_549_352, "resnetv2_101": 44_541_480,
    "resnetv2_152": 60_185_128, "resnetv2_200": 64_666_152,
    **{f"cifar_{kind}{depth}": n for kind in ("resnet", "plain") for depth, n in
       ((20, 269_722), (32, 464_154), (44, 658_586), (56, 853_018), (110, 1_727_962))},
    "cifar_resnet1202": 19_421_274,
    "cifar_resnetv2_110": 1_727_962, "cifar_resnetv2_164": 1_703_258, "cifar_resnetv2_1001": 10_327_706,
    "densenet121": 7_978_856, "densenet161": 28_681_000, "densenet169": 14_149_480, "densenet201": 20_013_928,
    "cifar_densenet_40_k12": 1_019_722, "cifar_densenet_100_k12": 6_979_642, "cifar_densenet_100_k24": 27_249_082,
    "cifar_densenet_bc_100_k12": 769_162, "cifar_densenet_bc_250_k24": 15_324_406,
    "cifar_densenet_bc_190_k40": 25_624_430,
}  # fmt: skip

# Convolutions and dense layers, in G; torchvision's table, and for the last four the same arithmetic as ours.
MACS = {
    "vgg11": 7.61, "vgg13": 11.31, "vgg16": 15.47, "vgg19": 19.63, "resnet152": 11.51, "densenet161": 7.73,
    "densenet169": 3.36, "densenet201": 4.29, "resnet18": 1.81, "resnet50": 4.09, "densenet121": 2.83,
    "mobilenet_v1": 0.57,
}  # fmt: skip

DEEP = ("cifar_resnetv2_1001", "cifar_resnet1202")


def shapes(module, size):
    sample = jax.ShapeDtypeStruct((1, *size), jnp.float32)
    return jax.eval_shape(lambda x: module.init_with_output(jax.random.key(0), x, train=False), sample)


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.slow) if n in DEEP else n for n in PARAMETERS])
def test_published_parameter_count(name):
    outputs, variables = shapes(create(name), MODELS[name].input)
    assert count(variables["params"]) == PARAMETERS[name]
    assert outputs.shape == (1, 1000 if MODELS[name].input == (224, 224, 3) else 10)
    assert count(variables.get("batch_stats", {})) == counts(name)["statistics"]


QUICK = ("vgg16", "resnet50", "densenet121", "mobilenet_v1")


@pytest.mark.parametrize("name", [n if n in QUICK else pytest.param(n, marks=pytest.mark.slow) for n in MACS])
def test_published_macs(name):
    found = summary(create(name), input=MODELS[name].input)
    assert found.macs == counts(name)["macs"]
    assert abs(found.macs / 1e9 / MACS[name] - 1) < 0.005


@pytest.mark.parametrize("name", ["resnetv2_50", "cifar_resnetv2_164", "plain34", "resnet101"])
def test_counts_hold_for_other_classes(name):
    own = MODELS[name].fields.get("num_classes", 1000)
    features = {"resnetv2_50": 2048, "resnet101": 2048, "plain34": 512, "cifar_resnetv2_164": 256}[name]
    variables = shapes(create(name, num_classes=17), MODELS[name].input)[1]
    assert count(variables["params"]) == PARAMETERS[name] - (own - 17) * (features + 1)


def test_variants_that_are_overrides():
    def parameters(name, size=None, **overrides):
        return count(shapes(create(name, **overrides), size or MODELS[name].input)[1]["params"])

    assert parameters("resnet50", v1=True) == PARAMETERS["resnet50"]
    assert parameters("resnet50", use_bias=True) == 25_636_712 - 53_120  # Keras counts the statistics too
    assert parameters("cifar_resnetv2_110", shortcut="B") == 1_730_522
    assert parameters("inception_v1", aux=True) == 13_004_888
    assert parameters("cifar_resnet110", num_classes=100) == PARAMETERS["cifar_resnet110"] + 5_850
    volume = parameters("resnet18", (16, 32, 32, 1), dimensions=3, width=8)
    assert volume > parameters("resnet18", (32, 32, 1), width=8)


def test_projections_stand_where_the_shape_changes_block_by_block():
    def projections(name):
        params = shapes(create(name), MODELS[name].input)[1]["params"]
        stages = [key for key in params if key.startswith("stage")]
        return [(s[5:], b[5:]) for s in stages for b in params[s] if "projection" in params[s][b]]

    assert projections("resnet34") == [(s, "1") for s in "234"]
    for name in ("resnet50", "resnet152", "resnetv2_101"):
        assert projections(name) == [(s, "1") for s in "1234"]  # bottlenecks widen in the first stage too
    assert projections("cifar_resnetv2_164") == [(s, "1") for s in "123"]
    assert projections("plain34") == projections("cifar_resnet56") == projections("cifar_resnetv2_110") == []


@pytest.mark.parametrize("name", ["resnet50", "resnetv2_50", "cifar_resnet20", "vgg11", "densenet121", "mobilenet_v1"])
def test_the_input_size_changes_neither_parameters_nor_outputs(name):
    h, w, c = MODELS[name].input
    usual, other = shapes(create(name), (h, w, c)), shapes(create(name), (h + 32, w + 64, c))
    assert usual == other


def test_what_is_asked_for_must_be_possible():
    with pytest.raises(InputError, match="pool5: pooling window 2 is larger than the padded axis of 1"):
        shapes(create("vgg16"), (16, 16, 3))
    with pytest.raises(InputError, match=r"expected images \(b, h, w, c\), got shape \(1, 224, 224\)"):
        shapes(create("resnet50"), (224, 224))
    with pytest.raises(InputError, match="0 classes"):
        shapes(create("resnet18", num_classes=0), (32, 32, 3))


def test_weights_of_another_number_of_channels_are_refused():
    module = create("resnet18", width=8)
    variables = shapes(module, (32, 32, 3))[1]
    with pytest.raises(InputError, match="conv1: the parameters belong to an input of another shape"):
        jax.eval_shape(lambda v, x: module.apply(v, x, train=False), variables, jnp.zeros((1, 32, 32, 1)))


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in MODELS if name != "unet"])
def test_at_full_size_everything_compiles_and_is_finite(name):
    """With every parameter 0 the logits are; statistics are those of a fresh network."""
    module, x = create(name), jnp.ones((1, *MODELS[name].input))
    variables = shapes(module, MODELS[name].input)[1]
    zeros = {
        kind: jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), tree) for kind, tree in variables.items()
    }
    outputs = jax.jit(lambda v, x: module.apply(v, x, train=False))(zeros, x)
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(outputs))
