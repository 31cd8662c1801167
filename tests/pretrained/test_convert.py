"""Files that are what they say load to the bit, others are refused whole, with the difference."""

import json
import os
import pickle
from pathlib import Path

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from jaxcnn import pretrained
from jaxcnn.cli import main
from jaxcnn.errors import InputError
from jaxcnn.models import FAMILIES, create
from jaxcnn.pretrained.export import export
from jaxcnn.pretrained.index import INDEX
from jaxcnn.pretrained.layouts import LAYOUTS, of_family
from jaxcnn.pretrained.pixels import PREPROCESSINGS
from jaxcnn.tree import flatten

DATA = Path(os.environ.get("JAXCNN_DATA", "absent"))
real = pytest.mark.skipif(
    not (DATA / "weights").is_dir() or not (DATA / "cifar10").is_dir(),
    reason="JAXCNN_DATA has no weights and CIFAR-10",
)


def variables(name, size, **overrides):
    network = create(name, **overrides)
    found = network.init(jax.random.key(0), jnp.zeros((1, *size)), train=False)
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: rng.uniform(0.5, 1, leaf.shape).astype(np.float32), found)


@pytest.fixture(scope="module")
def torch_like(tmp_path_factory):
    """A CIFAR ResNet-20 of width 2 as a PyTorch state dictionary, with its variables."""
    expected = variables("cifar_resnet20", (32, 32, 3), width=2)
    leaves = {"kernel": "weight", "scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    state = {}
    for path, value in flatten(expected).items():
        *modules, leaf = path.split("/")[1:]
        source = ".".join(modules).replace("stage", "layer").replace("fc", "linear")
        for i in range(1, 4):
            source = source.replace(f"block{i}", str(i - 1))
        value = value.transpose(3, 2, 0, 1) if value.ndim == 4 else value.T
        state[f"{source}.{leaves[leaf]}"] = np.ascontiguousarray(value)
        if leaf == "var":
            state[f"{source}.num_batches_tracked"] = np.int64(7)[None]
    return expected, state


def written(folder, state):
    save_file(state, folder / "w.safetensors")
    return folder / "w.safetensors"


def test_pytorch_names_are_understood(tmp_path, torch_like):
    expected, state = torch_like
    loaded = pretrained.load("cifar_resnet20", written(tmp_path, state), width=2)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, expected)
    assert loaded.layout == "akamaster"
    assert loaded.overrides == {"width": 2, "num_classes": 10}
    assert loaded.classes[0] == "airplane"
    assert (loaded.preprocessing.size, loaded.preprocessing.order) == ((32, 32), "RGB")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda s: s.pop("layer2.1.bn1.running_var"),
            r"missing layer2\.1\.bn1\.running_var, which is batch_stats/stage2/",
        ),
        (lambda s: s.update({"extra.weight": np.ones(3, np.float32)}), r"unexpected extra\.weight \[3\]"),
        (
            lambda s: s.update({"conv1.weight": np.ascontiguousarray(s["conv1.weight"].transpose(2, 3, 1, 0))}),
            r"conv1\.weight \[3, 3, 3, 2\] does not fit params/conv1/kernel \[3, 3, 3, 2\]",
        ),
        (
            lambda s: s.update({"bn1.bias": np.full(2, np.nan, np.float32)}),
            r"bn1\.bias holds values that are not finite",
        ),
        (lambda s: s.update({"bn1.bias": np.ones(2, np.int32)}), "bn1.bias is int32, expected floating point"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path, torch_like, change, message):
    state = dict(torch_like[1])
    change(state)
    with pytest.raises(InputError, match=message):
        pretrained.load("cifar_resnet20", written(tmp_path, state), width=2)


def test_another_model_is_refused_with_a_short_difference(tmp_path, torch_like):
    path = written(tmp_path, torch_like[1])
    with pytest.raises(InputError, match=r"not hold the weights of cifar_resnet32.*(\n.*){12}\n  and \d+ more$"):
        pretrained.load("cifar_resnet32", path, width=2)
    with pytest.raises(InputError, match="unknown layout for cifar_resnet20 'keras'"):
        pretrained.load("cifar_resnet20", path, layout="keras")


def test_a_part_may_be_missing_or_another_where_that_is_said(tmp_path, torch_like):
    expected, state = torch_like
    without = {key: value for key, value in state.items() if not key.startswith("linear")}
    for change in (without, without | {"classifier.weight": np.ones((4, 8), np.float32)}):
        with pytest.raises(InputError, match=r"missing linear\.bias"):
            pretrained.load("cifar_resnet20", written(tmp_path, change), width=2)
        loaded = pretrained.load("cifar_resnet20", written(tmp_path, change), width=2, partial="params/fc|^classifier")
        assert "fc" not in loaded.variables["params"]
        np.testing.assert_array_equal(
            loaded.variables["params"]["conv1"]["kernel"], expected["params"]["conv1"]["kernel"]
        )


def test_damaged_and_disguised_files_are_refused_and_run_nothing(tmp_path, torch_like):
    whole = written(tmp_path, torch_like[1]).read_bytes()
    ran = tmp_path / "ran"

    class Evil:
        def __reduce__(self):
            return Path.touch, (ran,)

    files = {
        "truncated.safetensors": whole[:-10],
        "header.safetensors": (10**13).to_bytes(8, "little") + whole[8:],
        "empty.safetensors": b"",
        "pickle.safetensors": pickle.dumps(Evil()),
        "truncated.npz": b"PK\x03\x04" + whole[:100],
        "text.h5": b"no weights",
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(InputError, match=f"{name} cannot be read as"):
            pretrained.load("cifar_resnet20", tmp_path / name)
    np.savez(tmp_path / "objects.npz", weights=np.array([Evil()], dtype=object))
    (tmp_path / "w.pth").write_bytes(pickle.dumps(Evil()))
    for name, message in {
        "objects.npz": "cannot be read as npz",
        "w.pth": "pickles, which can run code",
        "absent.npz": "is not a file",
        "w.onnx": "suffix '.onnx': expected one of .safetensors, .npz, .h5",
    }.items():
        with pytest.raises(InputError, match=message):
            pretrained.load("cifar_resnet20", tmp_path / name)
    assert not ran.exists()
    claims = json.dumps({"a": {"dtype": "F32", "shape": [10**12], "data_offsets": [0, 4 * 10**12]}}).encode()
    (tmp_path / "claims.safetensors").write_bytes(len(claims).to_bytes(8, "little") + claims)
    assert main(["eval", "--model", "cifar_resnet20", "--weights", str(tmp_path / "claims.safetensors")]) == 2


def test_export_and_import_give_the_same_bits(tmp_path):
    held = variables("cifar_resnet20", (32, 32, 3), width=2, num_classes=3)
    pixels = PREPROCESSINGS["caffe"]
    options = {"model": "cifar_resnet20", "overrides": {"width": 2, "num_classes": 3}}
    card = export(tmp_path / "w.safetensors", held, classes=("a", "b", "c"), pixels=pixels, **options)
    loaded = pretrained.load("cifar_resnet20", tmp_path / "w.safetensors")
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, held)
    assert (loaded.overrides, loaded.classes, loaded.preprocessing) == (options["overrides"], ("a", "b", "c"), pixels)
    assert "params/conv1/kernel" in load_file(tmp_path / "w.safetensors")
    assert "3: a, b, c" in card.read_text()
    with pytest.raises(InputError, match=r"w\.safetensors exists"):
        export(tmp_path / "w.safetensors", held, **options)


def test_a_runs_weights_travel_by_the_command_line(tmp_path, capsys):
    args = ["--run", "one", "--runs-dir", str(tmp_path), "--train.steps", "2", "--model.name", "mlp", "--quiet"]
    assert main(["train", *args]) == 0
    run = tmp_path / "lenet5_digits" / "one"
    assert main(["weights", "export", str(run), str(tmp_path / "mlp.safetensors")]) == 0
    capsys.readouterr()
    assert main(["eval", str(run), "--json"]) == 0
    of_run = json.loads(capsys.readouterr().out)
    weights = ["--model", "mlp", "--weights", str(tmp_path / "mlp.safetensors"), "--data.name", "digits"]
    assert main(["eval", *weights, "--json"]) == 0
    of_weights = json.loads(capsys.readouterr().out)
    assert of_weights.keys() == of_run.keys()
    assert of_weights["correct"] == of_run["correct"]
    assert of_weights["loss"] == pytest.approx(of_run["loss"], rel=1e-5)
    assert main(["eval", str(run), *weights]) == 2
    assert "give a run directory, or a model and its weights" in capsys.readouterr().err


def test_keras_files_of_both_ages(tmp_path):
    expected = variables("vgg19", (32, 32, 3), width=2, hidden=8, num_classes=5)
    for age in ("old", "new"):
        with h5py.File(tmp_path / f"{age}.h5", "w") as file:
            for module, leaves in expected["params"].items():
                fc = {"fc6": "fc1", "fc7": "fc2", "fc8": "predictions"}
                layer = fc.get(module) or f"block{module[4]}_conv{module[6]}"
                for leaf, short in (("kernel", "W"), ("bias", "b")):
                    old, new = f"{layer}/{layer}_{short}_1:0", f"model_weights/{layer}/{layer}/{leaf}:0"
                    file[old if age == "old" else new] = leaves[leaf]
            if age == "new":
                file["optimizer_weights/Adam/iter:0"] = np.int64(3)
        loaded = pretrained.load("vgg19", tmp_path / f"{age}.h5", width=2, hidden=8)
        jax.tree.map(np.testing.assert_array_equal, loaded.variables, expected)
        assert (loaded.layout, loaded.preprocessing.order) == ("keras", "BGR")


def test_keras_resnet_is_the_first_version_with_biases(tmp_path):
    options = {"v1": True, "use_bias": True, "epsilon": 1.001e-5, "width": 2}
    expected = variables("resnet50", (32, 32, 3), num_classes=1000, **options)
    leaves = {"kernel": "kernel", "bias": "bias", "scale": "gamma", "mean": "moving_mean", "var": "moving_variance"}
    stem = {"conv1": "conv1_conv", "bn1": "conv1_bn", "fc": "predictions"}
    inner = {f"{kind}{i}": f"{i}_{kind}" for kind in ("conv", "bn") for i in (1, 2, 3)}
    inner |= {"projection": "0_conv", "projection_bn": "0_bn"}
    with h5py.File(tmp_path / "w.h5", "w") as file:
        for path, value in flatten(expected).items():
            *modules, leaf = path.split("/")[1:]
            if len(modules) == 1:
                layer = stem[modules[0]]
            else:
                layer = f"conv{int(modules[0][5:]) + 1}_block{modules[1][5:]}_{inner[modules[2]]}"
            name = "beta" if leaf == "bias" and "bn" in layer else leaves[leaf]
            file[f"{layer}/{layer}/{name}:0"] = value
    loaded = pretrained.load("resnet50", tmp_path / "w.h5", width=2)
    jax.tree.map(np.testing.assert_array_equal, loaded.variables, expected)
    assert loaded.overrides == {**options, "num_classes": 1000}
    assert loaded.classes[207] == "golden retriever"


def test_the_tables_speak_of_families_layouts_and_preprocessings_that_exist():
    assert set(LAYOUTS) <= set(FAMILIES)
    family = {name: family for family, variants in FAMILIES.items() for name in variants}
    for layouts in map(of_family, FAMILIES):
        assert all(layout.preprocessing in PREPROCESSINGS for layout in layouts)
        assert len({layout.name for layout in layouts}) == len(layouts)
    for name, entry in INDEX.items():
        assert entry.layout in {layout.name for layout in of_family(family[entry.model])}, name


@real
@pytest.mark.slow
def test_the_public_cifar_resnet_scores_what_is_published(capsys):
    weights = DATA / "weights" / "cifar10_resnet20-12fca82f.npz"
    command = ["eval", "--model", "cifar_resnet20", "--weights", str(weights), "--data.name", "cifar10", "--json"]
    assert main([*command, "--data-dir", str(DATA)]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["correct"], result["count"]) == (9173, 10_000)


@real
@pytest.mark.slow
def test_squeezenet_names_the_castle_above_the_town(capsys):
    weights, photograph = DATA / "weights" / "squeezenet1_0_deepcompressed.npz", DATA / "style/content/tubingen.jpg"
    assert main(["predict", "--model", "squeezenet1_0", "--weights", str(weights), str(photograph)]) == 0
    assert "castle" in capsys.readouterr().out
