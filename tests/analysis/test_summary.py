"""Summaries of jaxcnn's networks and of anybody's: rows, totals, names, and what does not count twice."""

import io
import json
import time

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest
from rich.console import Console

from jaxcnn.analysis import summary, table
from jaxcnn.errors import InputError
from jaxcnn.layers.named import Lambda
from jaxcnn.layers.pool import max_pool
from jaxcnn.models import MODELS, create


class Plain(nn.Module):
    """A user's own network, in Flax alone, without `train`."""

    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(8, (3, 3))(x))
        x = nn.max_pool(x, (2, 2), (2, 2))
        x = nn.relu(nn.Conv(16, (3, 3), padding="VALID")(x)).mean((1, 2))
        return nn.Dense(10)(x)


class Trained(nn.Module):
    """With BatchNorm, dropout and a submodule made in `setup`."""

    def setup(self):
        self.first, self.norm, self.drop = nn.Conv(4, (3, 3)), nn.BatchNorm(), nn.Dropout(0.5)
        self.head = nn.Sequential([nn.Dense(5), nn.silu, nn.Dense(3)])

    def __call__(self, x, train: bool):
        x = nn.relu(self.norm(self.first(x), use_running_average=not train))
        return self.head(self.drop(x, deterministic=not train).reshape(1, -1))


class Resized(nn.Module):
    @nn.compact
    def __call__(self, x):
        return jax.image.resize(nn.Conv(3, (3, 3))(x), (1, 8, 8, 3), "bilinear")


def lines(module, input, **options):
    return [(row.name, row.kind, row.output) for row in summary(module, input=input, **options).layers]


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def consistent(result):
    for field in ("parameters", "statistics", "macs", "flops", "activation_bytes"):
        assert getattr(result, field) == sum(getattr(row, field) for row in result.layers)


def test_a_users_own_module():
    result = summary(Plain(), input=(16, 12, 3))
    assert [(row.name, row.kind, row.output, row.parameters) for row in result.layers] == [
        ("Conv_0", "Conv", (16, 12, 8), 224),
        ("Plain", "relu", (16, 12, 8), 0),
        ("Plain", "max_pool", (8, 6, 8), 0),
        ("Conv_1", "Conv", (6, 4, 16), 1168),
        ("Plain", "relu", (6, 4, 16), 0),
        ("Plain", "mean", (16,), 0),
        ("Dense_0", "Dense", (10,), 170),
    ]
    assert [row.receptive_field for row in result.layers] == [3, 3, 4, 8, 8, (18, 14), (18, 14)]
    assert result.activation_bytes == 4 * (2 * 16 * 12 * 8 + 8 * 6 * 8 + 2 * 6 * 4 * 16 + 16 + 10)
    consistent(result)


def test_setup_dropout_and_statistics():
    result = summary(Trained(), input=(4, 4, 1))
    assert [(row.name, row.kind, row.parameters, row.statistics, row.activation_bytes) for row in result.layers] == [
        ("first", "Conv", 40, 0, 256),
        ("norm", "BatchNorm", 8, 8, 256),
        ("Trained", "relu", 0, 0, 256),
        ("drop", "Dropout", 0, 0, 0),  # it computes nothing in evaluation
        ("head/layers_0", "Dense", 325, 0, 20),
        ("head", "silu", 0, 0, 20),
        ("head/layers_2", "Dense", 18, 0, 12),
    ]
    consistent(result)


@pytest.mark.parametrize("name", ["linear", "mlp", "lenet5_1998", "cifar_resnet20", "resnet18"])
def test_totals_are_the_variables_and_the_rows(name):
    module, input = create(name), MODELS[name].input
    sample = jax.ShapeDtypeStruct((1, *input), jnp.float32)
    variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), sample)
    result = summary(module, input=input)
    assert result.parameters == count(variables["params"])
    assert result.statistics == count(variables) - result.parameters
    consistent(result)


def test_residual_blocks_are_named_by_path():
    rows = lines(create("cifar_resnet20"), (32, 32, 3))
    assert ("stage2/block1/conv1", "Conv", (16, 16, 32)) in rows
    assert rows[rows.index(("stage2/block1/bn2", "BatchNorm", (16, 16, 32))) + 1] == (
        "stage2/block1",
        "pad, add, relu",
        (16, 16, 32),
    )


def test_named_functions_have_their_name_and_operation():
    class Named(nn.Module):
        @nn.compact
        def __call__(self, x):
            x = Lambda(nn.relu, name="relu1_1")(x)
            return Lambda(lambda x: max_pool(x, window=2), name="pool1")(x)

    assert lines(Named(), (4, 4, 2)) == [("relu1_1", "relu", (4, 4, 2)), ("pool1", "max_pool", (2, 2, 2))]


def test_functions_of_a_container_end_with_their_last_layout():
    assert lines(Resized(), (4, 4, 2)) == [("Conv_0", "Conv", (4, 4, 3)), ("Resized", "resize", (8, 8, 3))]


def test_shared_modules_have_a_row_per_call_and_count_once():
    class Shared(nn.Module):
        @nn.compact
        def __call__(self, x):
            dense = nn.Dense(3, name="dense")
            return dense(dense(x))

    result = summary(Shared(), input=(3,))
    assert [(row.name, row.parameters, row.macs) for row in result.layers] == [("dense", 12, 9), ("dense", 0, 9)]


def test_modules_that_run_in_training_alone():
    class Auxiliary(nn.Module):
        @nn.compact
        def __call__(self, x, *, train: bool):
            if train or self.is_initializing():
                nn.Dense(2, name="aux")(x)
            return nn.Dense(4, name="head")(x)

    result = summary(Auxiliary(), input=(3,))
    assert [(row.name, row.kind, row.parameters, row.macs) for row in result.layers] == [
        ("head", "Dense", 16, 12),
        ("aux", "Dense (not run)", 8, 0),
    ]


def test_parameters_of_a_container():
    class Scaled(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(x) * self.param("scale", nn.initializers.ones, (1, 2))

    class Passed(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Scaled(name="inner")(x) if self.param("unused", nn.initializers.ones, (7,)) is not None else x

    result = summary(Passed(), input=(3,))
    assert [(row.name, row.kind, row.parameters) for row in result.layers] == [
        ("Passed", "Passed", 7),
        ("inner/Dense_0", "Dense", 8),
        ("inner", "mul", 2),
    ]
    consistent(result)


class Leaf(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.relu(nn.Dense(3)(x))


@pytest.mark.parametrize("lift", [nn.jit, nn.remat])
def test_lifted_modules_are_read_anew_each_time(lift):
    class Lifted(nn.Module):
        @nn.compact
        def __call__(self, x):
            return lift(Leaf)(name="b")(lift(Leaf)(name="a")(x))

    expected = [("a/Dense_0", "Dense"), ("a", "relu"), ("b/Dense_0", "Dense"), ("b", "relu")]
    for _ in range(2):
        result = summary(Lifted(), input=(3,))
        assert [(row.name, row.kind) for row in result.layers] == expected
        assert [row.parameters for row in result.layers] == [12, 0, 12, 0]


def test_scanned_modules_count_every_step():
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return nn.Dense(3)(x), None

    class Scanned(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=6)(name="s")(x, None)[
                0
            ]

    (row,) = summary(Scanned(), input=(3,)).layers
    assert (row.name, row.output, row.parameters, row.macs, row.activation_bytes) == ("s/Dense_0", (3,), 72, 54, 72)


def test_recurrent_modules():
    class Recurrent(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.RNN(nn.SimpleCell(5))(x)

    result = summary(Recurrent(), input=(7, 3))
    assert [(row.name, row.parameters, row.macs) for row in result.layers] == [
        ("SimpleCell_0/i", 20, 105),
        ("SimpleCell_0/h", 25, 175),
        ("SimpleCell_0", 0, 0),
    ]


def test_mapped_modules():
    class Mapped(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.vmap(nn.Dense, in_axes=1, out_axes=1, variable_axes={"params": 0}, split_rngs={"params": True})(
                4, name="heads"
            )(x)

    (row,) = summary(Mapped(), input=(5, 3)).layers
    assert (row.name, row.kind, row.parameters, row.macs) == ("heads", "Dense", 5 * 16, 5 * 12)


def test_functions_jitted_and_traced_before():
    @jax.jit
    def pooled(x):
        return max_pool(x, window=2)

    class Jitted(nn.Module):
        @nn.compact
        def __call__(self, x):
            return pooled(nn.Conv(1, (1, 1))(x))

    pooled(jnp.ones((1, 4, 4, 1)))  # this trace holds the fast form of the pooling
    assert [summary(Jitted(), input=(4, 4, 1)).layers[1].flops for _ in range(2)] == [12, 12]


def test_several_outputs_and_other_dtypes():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            return Lambda(lambda x: (x * 2, x.sum(1)), name="both")(x)

    (row,) = summary(Twice(), input=(4, 2), dtype=jnp.bfloat16).layers
    assert (row.output, row.activation_bytes) == (((4, 2), (2,)), 20)


def test_random_streams_of_modules_without_train():
    class Noisy(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.Dropout(0.5, deterministic=False)(x))

    assert summary(Noisy(), input=(3,)).parameters == 8


def test_bad_input():
    with pytest.raises(InputError, match=r"input \(0, 3\): expected the positive sizes"):
        summary(Plain(), input=(0, 3))
    with pytest.raises(InputError, match="positive sizes"):
        summary(Plain(), input=())
    with pytest.raises(InputError, match="LeNet-5 needs at least 16x16"):
        summary(create("lenet5", padding=0), input=(4, 4, 1))
    with pytest.raises(InputError, match=r"Plain does not take an input \(3,\) of float32: "):
        summary(Plain(), input=(3,))


def test_json_has_the_contracts_keys():
    whole = summary(Plain(), input=(16, 12, 3)).to_json()
    assert json.loads(json.dumps(whole)) == whole
    assert list(whole) == [
        "parameters", "statistics", "macs", "flops", "activation_bytes", "receptive_field", "layers",
    ]  # fmt: skip
    assert whole["layers"][5]["receptive_field"] == [18, 14]
    assert whole["layers"][0]["output"] == [16, 12, 8]


def test_table_for_people():
    console = Console(width=160, file=io.StringIO())
    console.print(table(summary(create("lenet5"), input=(28, 28, 1))))
    shown = console.file.getvalue()
    for part in ("61,706", "417 k", "844 k", "57 KiB", "10x10x16", "max_pool", "statistics"):
        assert (part in shown) == (part != "statistics"), part


def test_deep_networks_are_quick():
    start = time.process_time()
    result = summary(create("cifar_resnet110"), input=(32, 32, 3))
    assert result.parameters == 1_727_962
    assert time.process_time() - start < 10  # 2 s on a quiet machine
