"""`jaxcnn summary` and `jaxcnn list`, and a module of the user's through summary, features and fit."""

import json
import textwrap

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxcnn import optim
from jaxcnn.analysis import summary
from jaxcnn.cli import main
from jaxcnn.features import feature_names, features
from jaxcnn.models import MODELS, create
from jaxcnn.train import fit

OWN = """
import flax.linen as nn

class Net(nn.Module):
    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(nn.Conv(8, (3, 3), padding="VALID", name="conv")(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.BatchNorm(use_running_average=not train)(x)
        x = nn.Dropout(0.5, deterministic=not train)(x)
        return nn.Dense(10, name="fc")(x.reshape(x.shape[0], -1))
"""


@pytest.fixture
def own_file(tmp_path):
    path = tmp_path / "ownnet.py"
    path.write_text(textwrap.dedent(OWN))
    return path


def output(capsys, *args):
    assert main(list(args)) == 0
    return capsys.readouterr().out


def test_summary_as_json(capsys):
    found = json.loads(output(capsys, "summary", "lenet5", "--json"))
    assert list(found) == [
        "parameters", "statistics", "macs", "flops", "activation_bytes", "receptive_field", "layers"
    ]  # fmt: skip
    assert found["parameters"] == 61_706
    assert found["macs"] == 28 * 28 * 6 * 25 + 10 * 10 * 16 * 150 + 400 * 120 + 120 * 84 + 84 * 10
    assert found["layers"][0]["name"] == "c1"
    assert found["layers"][0]["output"] == [28, 28, 6]
    for key in ("parameters", "statistics", "macs", "flops", "activation_bytes"):
        assert sum(row[key] for row in found["layers"]) == found[key]


def test_the_receptive_field_of_vgg16_at_pool5(capsys):
    rows = json.loads(output(capsys, "summary", "vgg16", "--json"))["layers"]
    fields = {row["name"]: (row["receptive_field"], row["stride"]) for row in rows}
    assert fields["pool5"] == (212, 32)
    assert fields["relu4_2"] == (76, 8)
    assert fields["conv1_2"] == (5, 1)


def test_summary_at_another_size_with_overrides(capsys):
    found = json.loads(
        output(capsys, "summary", "resnet18", "--input", "64", "64", "1", "--num-classes", "7", "--overrides",
               "width", "16", "--json")
    )  # fmt: skip
    assert found["layers"][0]["output"] == [32, 32, 16]
    assert found["layers"][-1]["output"] == [7]


def test_summary_for_people(capsys):
    text = output(capsys, "summary", "cifar_resnet20")
    assert "stage2/block1/conv1" in text
    assert "269,722" in text
    assert "40.6 M" in text


def test_summary_of_a_file(capsys, own_file):
    found = json.loads(output(capsys, "summary", f"{own_file}:Net", "--input", "12", "12", "1", "--json"))
    assert found["parameters"] == 80 + 16 + 200 * 10 + 10
    assert found["statistics"] == 16
    assert [row["name"] for row in found["layers"]][:2] == ["conv", "Net"]


def test_flops_are_those_that_xla_counts_for_one_image(capsys):
    found = json.loads(output(capsys, "summary", "lenet5", "--input", "32", "32", "1", "--json"))
    module, image = create("lenet5"), jax.ShapeDtypeStruct((1, 32, 32, 1), jnp.float32)
    variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), image)
    program = jax.jit(lambda v, x: module.apply(v, x, train=False)).lower(variables, image)
    assert abs(program.cost_analysis()["flops"] / found["flops"] - 1) < 0.02


def test_list_has_counts_family_and_paper(capsys):
    rows = {row["name"]: row for row in json.loads(output(capsys, "list", "--json"))}
    assert list(rows) == list(MODELS)
    row = rows["resnet50"]
    assert (row["parameters"], row["statistics"], row["family"]) == (25_557_032, 53_120, "resnet")
    assert row["input"] == [224, 224, 3]
    assert "He" in row["paper"]
    assert abs(row["macs"] / 4.09e9 - 1) < 0.005
    assert "densenet121" in output(capsys, "list")


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["resnet_50"], "did you mean 'resnet50'"),
        (["lenet5", "--input", "4", "4", "1", "--overrides", "padding", "0"], "at least 16x16"),
        (["vgg16", "--input", "16", "16", "3"], "pool5: pooling window 2 is larger"),
        (["resnet18", "--input", "224", "224"], "expected images (b, h, w, c)"),
        (["resnet18", "--input", "224", "0", "3"], "positive sizes"),
        (["resnet18", "--num-classes", "0"], "0 classes"),
        (["nothing.py:Net", "--input", "8", "8", "1"], "does not exist"),
    ],
)
def test_bad_input_of_summary(capsys, args, message):
    assert main(["summary", *args]) == 2
    assert message in capsys.readouterr().err


def test_bad_names_in_a_file(capsys, own_file):
    assert main(["summary", f"{own_file}:Nat", "--input", "8", "8", "1"]) == 2
    assert "defines no Nat" in capsys.readouterr().err
    assert main(["summary", f"{own_file}:nn", "--input", "8", "8", "1"]) == 2
    assert "expected a flax.linen.Module" in capsys.readouterr().err
    assert main(["summary", f"{own_file}:Net"]) == 2
    assert "--input" in capsys.readouterr().err


def test_a_module_of_the_users_goes_through_everything_without_registering():
    names: dict = {}
    exec(textwrap.dedent(OWN), names)
    net: nn.Module = names["Net"]()
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 64).astype(np.int32)
    images = rng.normal(size=(64, 8, 8, 1)).astype(np.float32) * 0.1 + labels[:, None, None, None] / 10
    assert summary(net, input=(8, 8, 1)).parameters == 80 + 16 + 72 * 10 + 10
    assert feature_names(net, input=(8, 8, 1)) == ["conv", "BatchNorm_0", "Dropout_0", "fc"]
    result = fit(
        net, (images, labels), optimizer=optim.make_optimizer("adam", schedule=lambda step: 1e-2), steps=30,
        batch_size=32, quiet=True,
    )  # fmt: skip
    variables = {"params": result.state.params, **result.state.collections}
    assert features(net, variables, images[:2], names=["conv"])["conv"].shape == (2, 6, 6, 8)


def test_probe_prints_a_table_and_writes_a_picture(capsys, tmp_path):
    picture = tmp_path / "p.png"
    flags = ["--overrides", "depth", "2", "width", "16", "--init", "normal:std=0.01", "--activation", "tanh"]
    said = output(capsys, "probe", "mlp", *flags, "--batch", "4", "--output", str(picture))
    assert "falls by a factor of" in said
    assert "tanh" in said
    assert picture.read_bytes()[:4] == b"\x89PNG"


def test_probe_of_an_own_module_as_json(capsys, own_file, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = ["probe", f"{own_file}:Net", "--input", "8", "8", "1", "--batch", "4", "--seeds", "2", "--json"]
    found = json.loads(output(capsys, *args))
    assert [row["name"] for row in found["layers"]] == ["conv", "Net", "BatchNorm_0", "Dropout_0", "fc"]
    assert len(found["layers"][0]["second_moments"]) == 2
    assert (tmp_path / found["picture"]).name == "Net.signal.png"
    assert (tmp_path / found["picture"]).exists()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["mlp", "--init", "xavier"], "xavier"),
        (["mlp", "--init", "normal:std=wide"], "normal:std=wide: could not convert"),
        (["mlp", "--init", "normal:sd=1"], "did you mean 'std'"),
        (["mlp", "--activation", "rellu"], "did you mean 'relu'"),
        (["mlp", "--batch", "0"], "--batch 0"),
        (["ml"], "did you mean 'mlp'"),
    ],
)
def test_probe_refuses(capsys, flags, message):
    assert main(["probe", *flags]) == 2
    assert message in capsys.readouterr().err
