"""Transfer: what is merged, what stays to the bit, what a rate does, and the same from the command line."""

import json
import re
from functools import partial
from pathlib import Path

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxcnn import cli, report
from jaxcnn.analysis import summary
from jaxcnn.config import Experiment
from jaxcnn.data.preprocess import fit as fit_preprocessing
from jaxcnn.errors import InputError
from jaxcnn.files import load_file
from jaxcnn.layers.blocks import BasicBlock, Stage
from jaxcnn.layers.norm import BatchNorm
from jaxcnn.models import create
from jaxcnn.optim import make_optimizer, make_schedule
from jaxcnn.parallel import make_mesh
from jaxcnn.pretrained.index import INDEX, Entry
from jaxcnn.pretrained.pixels import PREPROCESSINGS
from jaxcnn.train import create_state, fit, make_train_step
from jaxcnn.transfer import Frozen, merge
from jaxcnn.tree import flatten

CONSTANT = make_schedule("constant", learning_rate=0.1, steps=10)
BODY = "^(?!fc/)"


class Tiny(nn.Module):
    """Two convolutions with BatchNorm and a head."""

    num_classes: int = 3

    @nn.compact
    def __call__(self, x, *, train):
        x = nn.relu(BatchNorm(name="bn1")(nn.Conv(8, (3, 3), name="conv1")(x), train=train))
        x = nn.relu(BatchNorm(name="bn2")(nn.Conv(8, (3, 3), name="conv2")(x), train=train))
        return nn.Dense(self.num_classes, name="fc")(x.mean((1, 2)))


def images(n=16, *, side=8):
    rng = np.random.default_rng(0)
    return {
        "image": jnp.asarray(rng.normal(1, 2, (n, side, side, 3)), jnp.float32),
        "label": jnp.asarray(rng.integers(3, size=n)),
    }


def variables(net, *, side=8, seed=0):
    """Made-up ones, all positive, which takes no compilation."""
    shapes = jax.eval_shape(lambda: net.init(jax.random.key(0), jnp.zeros((1, side, side, 3)), train=False))
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: rng.uniform(0.1, 0.5, leaf.shape).astype(leaf.dtype), shapes)


def one_device():
    return make_mesh(jax.devices()[:1])


def trained(net, optimizer, *, steps=2, side=8, start=None):
    """(before, after) by path, params and collections."""
    batch = images(side=side)
    state = create_state(net, optimizer=optimizer, sample=batch["image"], mesh=one_device(), variables=start)
    before = jax.device_get(state.variables())
    step = make_train_step(net, optimizer=optimizer)
    for _ in range(steps):
        state, _ = step(state, batch, np.uint32(0))
    return flatten(before), flatten(jax.device_get(state.variables()))


# --- merge


def test_a_new_head_comes_from_the_fresh_network_and_all_else_from_the_loaded_one():
    fresh, loaded = variables(Tiny(3), seed=1), variables(Tiny(10), seed=2)
    merged, old, new = (flatten(tree) for tree in (merge(fresh, loaded, replace="params/fc"), loaded, fresh))
    assert merged.keys() == new.keys()
    for path, leaf in merged.items():
        np.testing.assert_array_equal(leaf, (new if "/fc/" in path else old)[path], err_msg=path)


def test_a_head_of_the_same_shape_is_replaced_too():
    fresh, loaded = variables(Tiny(), seed=1), variables(Tiny(), seed=2)
    merged = merge(fresh, loaded, replace="params/fc/kernel")
    np.testing.assert_array_equal(merged["params"]["fc"]["kernel"], fresh["params"]["fc"]["kernel"])


def test_shapes_of_a_network_suffice_where_nothing_is_replaced():
    loaded = variables(Tiny())
    merged = merge(jax.eval_shape(lambda tree: tree, variables(Tiny())), loaded)
    assert merged["params"]["fc"]["kernel"] is loaded["params"]["fc"]["kernel"]


def test_every_difference_is_in_one_message_with_its_remedy():
    loaded = variables(Tiny(10))
    loaded["params"]["extra"] = {"kernel": np.zeros(2, np.float32)}
    del loaded["batch_stats"]["bn1"]["var"]
    loaded["params"]["conv1"]["bias"] = np.zeros(8, np.float16)
    with pytest.raises(InputError) as error:
        merge(variables(Tiny(3)), loaded)
    for part in (
        "unexpected params/extra/kernel (2,)",
        "missing batch_stats/bn1/var (8,)",
        "params/fc/kernel: expected float32[8, 3], found float32[8, 10]",
        "params/conv1/bias: expected float32[8], found float16[8]",
        'replace="params/fc"',
    ):
        assert part in str(error.value)


@pytest.mark.parametrize(("replace", "said"), [("head", "'head' finds nothing"), ("(", "no regular expression")])
def test_a_pattern_that_cannot_be_meant_is_refused(replace, said):
    with pytest.raises(InputError, match=said):
        merge(variables(Tiny()), variables(Tiny()), replace=replace)


# --- freezing


def test_frozen_parameters_and_statistics_keep_their_bits_while_others_move():
    settings = {"momentum": 0.9, "weight_decay": 0.1, "decay_mask": ".", "clip_norm": 1.0}
    optimizer = make_optimizer("sgd", schedule=CONSTANT, freeze="^(conv1|bn1)/", **settings)
    start = variables(Tiny())
    start["params"]["conv1"]["kernel"][0, 0, 0, 0] = -0.0
    before, after = trained(Frozen(Tiny(), "^(conv1|bn1)/"), optimizer, start=start)
    assert before.keys() == flatten(variables(Tiny())).keys()
    for path in before:
        same = before[path].tobytes() == after[path].tobytes()
        assert same == ("conv1/" in path or "bn1/" in path), path


def test_a_frozen_batchnorm_normalises_by_its_running_statistics_in_training():
    start, batch = variables(Tiny()), images()["image"]
    whole = Frozen(Tiny(), ".")
    trained_mode, moved = whole.apply(start, batch, train=True, mutable=["batch_stats"])
    np.testing.assert_array_equal(trained_mode, Tiny().apply(start, batch, train=False))
    np.testing.assert_array_equal(whole.apply(start, batch, train=False), trained_mode)
    for path, leaf in flatten(moved).items():
        np.testing.assert_array_equal(leaf, flatten(start)[path])
    none, _ = Frozen(Tiny(), "nothing").apply(start, batch, train=True, mutable=["batch_stats"])
    unfrozen, _ = Tiny().apply(start, batch, train=True, mutable=["batch_stats"])
    np.testing.assert_array_equal(none, unfrozen)


class Stages(nn.Module):
    scan: bool = False
    remat: bool = False

    @nn.compact
    def __call__(self, x, *, train):
        for name in ("stage1", "stage2"):
            block = partial(BasicBlock, norm=BatchNorm)
            x = Stage(block, 3, 3, 1, scan=self.scan, remat=self.remat, name=name)(x, train=train)
        return x


@pytest.mark.parametrize("mode", [{"scan": True}, {"remat": True}])
def test_blocks_compiled_as_a_loop_are_frozen_together_or_refused(mode):
    start, batch = variables(Stages()), images(4, side=4)["image"]

    def moved(net, freeze):
        apply = jax.jit(lambda v: Frozen(net, freeze).apply(v, batch, train=True, mutable=["batch_stats"]))
        return flatten(apply(start)[1])

    looped, plain = (moved(net, "stage2/") for net in (Stages(**mode), Stages()))
    for path, leaf in looped.items():
        np.testing.assert_allclose(leaf, plain[path], atol=1e-5, err_msg=path)
        assert (leaf == flatten(start)[path]).all() == ("stage2" in path), path
    with pytest.raises(InputError, match=r"only some blocks of stage2.*scan=False"):
        moved(Stages(**mode), "stage2/block2/")


def test_gradients_of_what_is_frozen_are_not_computed():
    batch = images(8)

    def flops(freeze):
        module = Frozen(Tiny(), freeze) if freeze else Tiny()
        optimizer = make_optimizer("sgd", schedule=CONSTANT, freeze=freeze)
        start = variables(Tiny())
        state = create_state(module, optimizer=optimizer, sample=batch["image"], mesh=one_device(), variables=start)
        step = make_train_step(module, optimizer=optimizer)
        return step.lower(state, batch, np.uint32(0)).compile().cost_analysis()["flops"]  # type: ignore[attr-defined]

    assert flops(BODY) < 0.5 * flops("")


def test_the_norm_that_is_clipped_is_that_of_what_moves():
    optimizer = make_optimizer("sgd", schedule=lambda step: 1.0, clip_norm=1.0, freeze="b")
    parameters = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
    updates, _ = optimizer.update({"a": jnp.array([3.0, 4.0]), "b": jnp.full(2, 1e6)}, optimizer.init(parameters))
    np.testing.assert_allclose(updates["a"], [-0.6, -0.8], rtol=1e-6)  # type: ignore[index]


def test_what_is_frozen_has_no_state_in_the_optimiser():
    parameters = variables(Tiny())["params"]
    state = make_optimizer("adam", schedule=CONSTANT, freeze=BODY).init(parameters)
    moments = [leaf.shape for leaf in jax.tree.leaves(state) if leaf.ndim]
    assert sorted(moments) == [(3,), (3,), (8, 3), (8, 3)]


def test_without_the_options_the_optimiser_is_what_it_was():
    parameters = variables(Tiny())["params"]
    state = make_optimizer("sgd", schedule=CONSTANT, momentum=0.9, clip_norm=1.0, weight_decay=0.1).init(parameters)
    as_before = optax.chain(
        optax.clip_by_global_norm(1.0),
        optax.add_decayed_weights(0.1, jax.tree_util.tree_map_with_path(lambda p, _: "kernel" in str(p), parameters)),
        optax.sgd(CONSTANT, momentum=0.9),
    ).init(parameters)
    assert jax.tree.structure(state) == jax.tree.structure(as_before)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"freeze": "stem"}, "freeze 'stem' finds no parameter among bn1/bias"),
        ({"freeze": "."}, "nothing is left to train"),
        ({"freeze": "("}, "no regular expression"),
        ({"rates": {"stem": 0.1}}, "rates 'stem' finds no parameter"),
        ({"rates": {"conv": -1.0}}, "rate of 'conv' is -1.0"),
        ({"rates": {"(": 1.0}}, "no regular expression"),
    ],
)
def test_what_cannot_be_meant_is_refused(options, said):
    with pytest.raises(InputError, match=said.replace("(", r"\(")):
        make_optimizer("sgd", schedule=CONSTANT, **options).init(variables(Tiny())["params"])


# --- rates


def test_a_step_of_sgd_is_scaled_by_the_first_rate_that_is_found():
    rates = {"conv1/kernel": 0.1, "conv": 0.5, "bn1": 0}
    parameters = variables(Tiny())["params"]
    gradients = jax.tree.map(lambda p: jnp.full(p.shape, 2.0), parameters)
    optimizer = make_optimizer("sgd", schedule=CONSTANT, rates=rates)
    updates, _ = optimizer.update(gradients, optimizer.init(parameters), parameters)
    factors = {"conv1/kernel": 0.1, "conv1/bias": 0.5, "conv2/kernel": 0.5, "conv2/bias": 0.5}
    factors |= {"bn1/scale": 0, "bn1/bias": 0}
    for path, update in flatten(updates).items():
        np.testing.assert_allclose(update, np.full(update.shape, -0.2 * factors.get(path, 1)), rtol=1e-6, err_msg=path)


def test_rates_and_freezing_go_together():
    optimizer = make_optimizer("adam", schedule=CONSTANT, freeze="conv1|bn", rates={"conv": 0.01})
    before, after = trained(Tiny(), optimizer, steps=1, start=variables(Tiny()))
    moved = {path: np.abs(after[path] - before[path]).max() for path in before}
    assert moved["params/conv1/kernel"] == 0
    assert moved["params/conv2/kernel"] == pytest.approx(0.001, rel=1e-2)  # Adam's first step is its rate
    assert moved["params/fc/kernel"] == pytest.approx(0.1, rel=1e-2)


# --- together


def test_a_frozen_network_is_fitted_and_summed_up_like_its_module():
    net = Frozen(Tiny(), BODY)
    batch = images(32)
    result = fit(
        net,
        (np.asarray(batch["image"]), np.asarray(batch["label"])),
        optimizer=make_optimizer("sgd", schedule=CONSTANT, freeze=BODY),
        steps=2,
        batch_size=16,
        quiet=True,
    )
    assert result.variables["params"].keys() == {"conv1", "conv2", "bn1", "bn2", "fc"}
    assert net.num_classes == 3
    plain, found = summary(Tiny(), input=(8, 8, 3)), summary(net, input=(8, 8, 3))
    assert (found.parameters, found.macs) == (plain.parameters, plain.macs)
    assert [row.parameters for row in found.layers] == [row.parameters for row in plain.layers]


def test_the_fixed_preprocessings_are_those_of_the_weights():
    pictures = np.random.default_rng(0).integers(256, size=(4, 5, 6, 3)).astype(np.uint8)
    for kind in ("imagenet", "inception"):
        fixed = fit_preprocessing(kind, pictures)
        np.testing.assert_allclose(
            fixed(jnp.asarray(pictures, jnp.float32) / 255), PREPROCESSINGS[kind](pictures), atol=2e-6
        )
    with pytest.raises(InputError, match="three channels"):
        fit_preprocessing("imagenet", pictures[..., :1])


@pytest.mark.parametrize(
    ("kind", "expected", "said"),
    [
        ("imagenet", "imagenet_bicubic", ""),
        ("scale", "inception", ""),  # two names of one map
        ("none", "unit", ""),
        (
            "standardize",
            "imagenet",
            r"standardize gives RGB .*, w\.h5 expects RGB .*0\.485.*: give .*preprocessing imagenet$",
        ),
        (
            "imagenet",
            "inception",
            r"imagenet gives .*0\.485.*expects .*mean \(0\.5, .*: give --data.preprocessing inception$",
        ),
        ("mean_image", "imagenet", "mean_image gives other pixels, "),
        ("scale", "caffe", r"expects BGR in 0\.\.255, mean \(103\.939, 116\.779, 123\.68\), std \(1, 1, 1\)$"),
    ],
)
def test_pixels_that_the_weights_do_not_expect_are_named(kind, expected, said):
    pictures = np.random.default_rng(0).integers(256, size=(4, 5, 6, 3)).astype(np.uint8)
    line = report.other_pixels(
        Experiment(init_from="w.h5"), fit_preprocessing(kind, pictures), PREPROCESSINGS[expected]
    )
    assert (re.search(said, line) is not None) if said else line == ""


def test_grey_images_are_not_compared_with_what_is_known_of_a_family():
    grey = fit_preprocessing("standardize", np.random.default_rng(0).integers(256, size=(4, 5, 6, 1)).astype(np.uint8))
    assert report.other_pixels(Experiment(init_from="w.h5"), grey, PREPROCESSINGS["imagenet"]) == ""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A directory of its own for caches, data and runs, with 12 images of 2 classes and weights for 10."""
    from PIL import Image

    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    rng = np.random.default_rng(0)
    for part in ("train", "test"):
        for name in ("cat", "dog"):
            folder = tmp_path / "data" / "pets" / part / name
            folder.mkdir(parents=True)
            for i in range(6):
                Image.fromarray(rng.integers(256, size=(8, 8, 3)).astype(np.uint8)).save(folder / f"{i}.png")
    net = create("cifar_resnet20", depth=8, width=2)
    np.savez(tmp_path / "weights.npz", **flatten(variables(net)))
    return tmp_path


def command(home, *args):
    flags = [
        "--runs-dir",
        home / "runs",
        "--data-dir",
        home / "data",
        "--data.name",
        "pets",
        "--data.image-size",
        "8",
        "8",
    ]
    flags += ["--model.name", "cifar_resnet20", "--model.overrides", "depth", "8", "width", "2"]
    flags += ["--data.batch-size", "8", "--data.crop-padding", "0", "--train.steps", "2", "--run", "r", "--quiet"]
    flags += ["--data.preprocessing", "imagenet", "--init-from", home / "weights.npz"]
    return cli.main(["train", *map(str, flags), *args])


def test_a_run_starts_from_a_weights_file_under_a_new_head_with_the_rest_frozen(home, capsys):
    assert command(home, "--init-replace", "params/fc", "--optim.freeze", BODY, "--optim.rates", "fc", "0.5") == 0
    run = home / "runs" / "lenet5_digits" / "r"
    assert json.loads((run / "config.json").read_text())["optim"]["rates"] == {"fc": 0.5}
    after, file = flatten(report.load_variables(run)), np.load(home / "weights.npz")
    for path, leaf in after.items():
        assert path.startswith("params/fc") or (leaf == file[path]).all(), path
    assert after["params/fc/kernel"].shape == (8, 2)
    assert "warning" not in capsys.readouterr().err
    exported = str(home / "out.safetensors")
    assert cli.main(["weights", "export", str(run), exported]) == 0
    assert "preprocessing" not in capsys.readouterr().err
    flags = ["--data-dir", str(home / "data"), "--json"]
    results = []
    for source in ([run], ["--model", "cifar_resnet20", "--weights", exported, "--data.name", "pets"]):
        assert cli.main(["eval", *map(str, source), *flags]) == 0
        results.append(json.loads(capsys.readouterr().out))
    assert results[0]["correct"] == results[1]["correct"]
    assert results[0]["loss"] == pytest.approx(results[1]["loss"], rel=1e-5)


def test_a_run_starts_from_weights_of_the_index_once_they_are_fetched(home, monkeypatch, capsys):
    monkeypatch.setenv("JAXCNN_WEIGHTS", str(home / "index"))
    address, overrides = "https://example.org/w.npz", {"depth": 8, "width": 2}
    fields = ("cifar_resnet20", "test", address, None, None, "MIT", "nobody", "jaxcnn", PREPROCESSINGS["inception"])
    monkeypatch.setitem(INDEX, "cifar_resnet20.test", Entry(*fields, 0.0, 0.0, overrides=overrides))
    args = ["--init-from", "cifar_resnet20.test", "--init-replace", "params/fc", "--train.steps", "0"]
    assert command(home, *args) == 2
    assert re.search(r"not at \S+cifar_resnet20\.test\.npz: run jaxcnn weights fetch", capsys.readouterr().err)
    assert command(home, "--init-from", "resnet50.tv_in1k") == 2
    assert "the weights resnet50.tv_in1k are those of resnet50, not of cifar_resnet20" in capsys.readouterr().err
    assert not (home / "runs").exists()

    (home / "index").mkdir()
    (home / "weights.npz").rename(home / "index" / "cifar_resnet20.test.npz")
    assert command(home, *args) == 0
    (warning,) = (line for line in capsys.readouterr().err.splitlines() if line.startswith("warning"))
    assert "--data.preprocessing imagenet gives" in warning
    assert "cifar_resnet20.test expects" in warning
    assert "give --data.preprocessing inception" in warning
    after = flatten(report.load_variables(home / "runs" / "lenet5_digits" / "r"))
    file = np.load(home / "index" / "cifar_resnet20.test.npz")
    for path, leaf in after.items():
        assert path.startswith("params/fc") or (leaf == file[path]).all(), path


def test_a_head_of_other_classes_is_refused_with_the_remedy(home, capsys):
    assert command(home) == 2
    said = capsys.readouterr().err
    assert "params/fc/kernel: expected float32[8, 2], found float32[8, 10]" in said
    assert "--init-replace params/fc" in said
    assert not (home / "runs").exists()


def test_what_no_shape_shows_is_refused(home, capsys):
    from safetensors.numpy import save_file

    arrays = dict(np.load(home / "weights.npz"))
    save_file(arrays, home / "weights.safetensors", {"overrides": json.dumps({"epsilon": 0.1})})
    assert command(home, "--init-replace", "params/fc", "--init-from", str(home / "weights.safetensors")) == 2
    assert "give --model.overrides epsilon 0.1" in capsys.readouterr().err


def test_a_head_to_replace_needs_weights_to_start_from(capsys):
    assert cli.main(["train", "--init-replace", "params/fc"]) == 2
    assert "belongs to --init-from" in capsys.readouterr().err


FEW_SHOT = Path(__file__).parent.parent / "experiments" / "transfer_few_shot.py"


def few_shot(monkeypatch, tmp_path, *args):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "xla"))
    monkeypatch.setattr("sys.argv", [str(FEW_SHOT), "--output", str(tmp_path / "out"), *args])
    with pytest.raises(SystemExit) as exit:
        load_file(FEW_SHOT)["main"]()
    return exit.value.code


def test_the_experiment_says_which_file_is_missing(tmp_path, monkeypatch, capsys):
    assert few_shot(monkeypatch, tmp_path, "--data-dir", str(tmp_path), "--parts", "fashion") == 2
    assert "cifar10_resnet20-12fca82f.npz is missing: give the file" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_the_experiment_runs_with_smoke(tmp_path, monkeypatch):
    assert few_shot(monkeypatch, tmp_path, "--smoke") == 0
    rows = json.loads((tmp_path / "out" / "summary.json").read_text())["rows"]
    assert [row["way"] for row in rows] == ["scratch", "fine-tuning", "linear probe", "gain"] * 2
    assert (tmp_path / "out" / "transfer.png").exists()
