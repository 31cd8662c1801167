"""A checkpoint is whole and verified, or it does not count; whatever happens to one, the one before is used."""

import errno
import json
import os
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from jaxcnn import checkpoint, parallel
from jaxcnn.checkpoint import MANIFEST, CheckpointError, Checkpoints
from jaxcnn.errors import InputError
from jaxcnn.files import json_sha256
from jaxcnn.tree import flatten, state_sha256, unflatten

FIXTURE = Path(__file__).parent / "fixtures" / "checkpoint_format1"
LOOP = {"lines": 3, "sums": {"loss": 0.1, "accuracy": 7.0}, "best_step": -1}


def small_state() -> dict:
    """A little of everything that a run's state holds."""
    params = {"conv1": {"kernel": jnp.arange(12, dtype=jnp.float32).reshape(3, 4) / 7, "bias": -jnp.zeros(4)}}
    return {
        "step": jnp.int32(100),
        "params": params,
        "half": jnp.arange(5, dtype=jnp.bfloat16) / 3,
        "collections": {"batch_stats": {"bn": {"var": jnp.full(4, jnp.float32(1e-40))}}, "empty": {}},
        "opt_state": optax.adam(1e-3).init(params),
        "best": jnp.float32(-jnp.inf),
    }


def write_fixture(directory: str) -> None:
    """Made the fixture, once, with format 1; a later format gets a fixture of its own beside it.

    PYTHONPATH=. python -c "from tests.test_checkpoint import write_fixture; write_fixture('/checkpoint_format1')"

    (Orbax notes the directory in its files: written elsewhere and moved here, they tell nothing about a machine.)
    """
    Checkpoints(directory).save(100, small_state(), loop=LOOP, metric=0.75)


def same(restored: dict, state: object) -> None:
    expected = flatten(state)
    assert restored.keys() == expected.keys()
    for name, array in expected.items():
        array = np.asarray(array)
        assert (restored[name].dtype, restored[name].shape) == (array.dtype, array.shape), name
        assert np.asarray(restored[name]).tobytes() == array.tobytes(), name


@pytest.fixture
def messages() -> list[str]:
    return []


@pytest.fixture
def two(tmp_path, messages) -> Checkpoints:
    """Steps 10 and 20 of different content."""
    checkpoints = Checkpoints(tmp_path / "checkpoints", report=messages.append)
    for step in (10, 20):
        checkpoints.save(step, {"w": jnp.full(6, step, jnp.float32)}, loop={"lines": step})
    return checkpoints


def test_whatever_a_state_holds_comes_back_bit_for_bit(tmp_path):
    state = small_state()
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(100, state, loop=LOOP, metric=0.75)
    restored = checkpoints.restore_latest()
    assert restored is not None
    assert (restored.step, restored.loop, restored.metric) == (100, LOOP, 0.75)
    assert restored.state_sha256 == state_sha256(state)
    same(restored.arrays, state)
    again = unflatten(jax.eval_shape(small_state), restored.arrays, what="arrays")
    assert jax.tree.structure(again) == jax.tree.structure(state)


def test_it_comes_back_on_every_device(tmp_path):
    layout = parallel.Layout(parallel.make_mesh())
    state = layout.place(small_state())
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, state, loop={})
    arrays = checkpoints.restore_latest(layout=layout).arrays
    assert all(array.sharding == parallel.replicated(layout.mesh) for array in arrays.values())
    same(arrays, state)


leaves = st.sampled_from(["float32", "bfloat16", "float16", "int32", "uint8", "bool", "int64", "float64"])
trees = st.recursive(
    st.tuples(leaves, st.lists(st.integers(1, 4), max_size=3), st.integers(0, 2**32 - 1)),
    lambda inner: st.dictionaries(st.text("abc_1", min_size=1, max_size=3), inner, max_size=3),
    max_leaves=5,
)


def filled(tree: object) -> object:
    """Arrays of random bytes (any bit pattern, NaN among them) in the place of (dtype, shape, seed)."""
    if isinstance(tree, dict):
        return {name: filled(value) for name, value in tree.items()}
    dtype, shape, seed = tree
    data = np.random.default_rng(seed).bytes(int(np.prod(shape, dtype=int)) * np.dtype(dtype).itemsize)
    array = np.frombuffer(data, np.uint8)
    return (array & 1).astype(bool).reshape(shape) if dtype == "bool" else array.view(dtype).reshape(shape)


@given(trees)
@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_tree_comes_back(tmp_path, tree):
    state = {"tree": filled(tree), "step": np.int32(1)}
    checkpoints = Checkpoints(tmp_path / "any")
    checkpoints.save(1, state, loop={})
    same(checkpoints.restore(1).arrays, state)


def test_a_relative_path_is_bound_when_it_is_given(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    checkpoints = Checkpoints("runs/checkpoints")
    checkpoints.save(1, {"w": jnp.ones(2)}, loop={})
    monkeypatch.chdir("/")
    assert checkpoints.restore_latest().step == 1
    assert (tmp_path / "runs" / "checkpoints" / "1" / MANIFEST).is_file()


def test_nothing_there_is_no_checkpoint(tmp_path):
    checkpoints = Checkpoints(tmp_path / "none")
    assert checkpoints.restore_latest() is None
    assert (checkpoints.steps(), checkpoints.best_step()) == ([], None)
    assert not (tmp_path / "none").exists()


# --- damage ------------------------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, truncate, empty, Path.unlink], ids=lambda f: f.__name__)
def test_damage_to_any_file_is_found_named_and_stepped_over(two, messages, damage):
    newest, backup = two.directory / "20", two.directory.parent / "backup"
    shutil.copytree(newest, backup)
    files = sorted(str(p.relative_to(newest)) for p in newest.rglob("*") if p.is_file() and p.stat().st_size)
    assert MANIFEST in files
    assert len(files) > 5
    for number, name in enumerate(files, 1):
        damage(newest / name)
        restored = two.restore_latest()
        assert restored.step == 10, name
        assert restored.arrays["w"][0] == 10
        assert str(newest) in messages[-1]
        assert name in messages[-1]
        aside = sorted(two.damaged.iterdir())
        assert len(aside) == number  # kept for whoever wants to look, and named in the message
        assert any(str(path) in messages[-1] for path in aside)
        assert two.steps() == [10]
        shutil.copytree(backup, newest)
    assert two.restore_latest().step == 20  # the copy itself is sound


def test_every_single_bit_of_the_manifest_counts(two):
    path = two.directory / "20" / MANIFEST
    sound = path.read_bytes()
    rng = np.random.default_rng(0)
    for position in rng.choice(len(sound), 200, replace=False):
        data = bytearray(sound)
        data[position] ^= 1 << rng.integers(8)
        path.write_bytes(data)
        if json_equal(data, sound):
            continue
        with pytest.raises(CheckpointError, match=MANIFEST):
            two.restore(20)


def json_equal(a: bytes, b: bytes) -> bool:
    try:
        return json.loads(a) == json.loads(b)
    except ValueError:
        return False


def test_an_empty_directory_or_a_file_named_like_a_later_step_is_not_one(two, messages):
    (two.directory / "30").mkdir()
    (two.directory / "40").write_text("not a directory")
    (two.directory / "007").mkdir()
    (two.directory / "notes").mkdir()
    assert two.steps() == [10, 20]
    assert two.restore_latest().step == 20
    assert [next(n for n in ("30", "40") if f"/{n} " in m) for m in messages] == ["40", "30"]
    assert (two.directory / "notes").is_dir()


def test_where_every_step_is_damaged_none_is_used(two, messages):
    for step in (10, 20):
        flip(two.directory / str(step) / "state" / "manifest.ocdbt")
    assert two.restore_latest() is None
    assert len(messages) == len(list(two.damaged.iterdir())) == 2


def test_a_reader_steps_over_damage_but_moves_nothing(two, messages):
    flip(two.directory / "20" / "state" / "manifest.ocdbt")
    (two.directory / "30.orbax-checkpoint-tmp").mkdir()  # what a training process is writing
    before = sorted(two.directory.rglob("*"))
    assert two.restore_first([20, 10]).step == 10
    assert "manifest.ocdbt" in messages[0]
    assert sorted(two.directory.rglob("*")) == before


def test_a_file_that_cannot_be_read_is_damage(two, monkeypatch):
    real = checkpoint._file_entry

    def failing(path: Path) -> dict:
        if path.parts[-2:] == ("20", "_CHECKPOINT_METADATA"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(path)

    monkeypatch.setattr(checkpoint, "_file_entry", failing)
    assert two.restore_latest().step == 10


def test_wrong_arrays_behind_right_files_are_found(two):
    """The second check: were Orbax to read other numbers than it wrote, files alone would not show it."""
    path = two.directory / "20" / MANIFEST
    manifest = json.loads(path.read_text())
    del manifest["manifest_sha256"]
    manifest["arrays"]["w"]["sha256"] = "0" * 64
    path.write_text(json.dumps(manifest | {"manifest_sha256": json_sha256(manifest)}))
    with pytest.raises(CheckpointError, match="array w is not what was saved"):
        two.restore(20)


def test_a_newer_format_is_refused_and_left_alone(two):
    path = two.directory / "20" / MANIFEST
    manifest = {"format": checkpoint.FORMAT + 1, "what": "only that version knows"}
    path.write_text(json.dumps(manifest | {"manifest_sha256": json_sha256(manifest)}))
    with pytest.raises(InputError, match=r"format 2.*upgrade jaxcnn"):
        two.restore_latest()
    assert two.steps() == [10, 20]


def test_64_bit_arrays_are_not_cut_silently(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c")
    checkpoints.save(1, {"w": np.ones(3)}, loop={})
    layout = parallel.Layout(parallel.make_mesh())
    with pytest.raises(InputError, match="float64"):
        checkpoints.restore_latest(layout=layout)
    assert checkpoints.restore_latest().arrays["w"].dtype == np.float64
    with jax.enable_x64(True):
        assert checkpoints.restore_latest(layout=layout).arrays["w"].dtype == np.float64


# --- which steps stay ----------------------------------------------------------------------------------------


def test_the_latest_and_the_best_steps_stay(tmp_path):
    checkpoints = Checkpoints(tmp_path / "c", keep_latest=2, keep_best=2)
    metrics = {1: 0.5, 2: 0.9, 3: None, 4: 0.9, 5: float("nan"), 6: 0.2, 7: None}
    kept = {}
    for step, metric in metrics.items():
        checkpoints.save(step, {"w": jnp.ones(2)}, loop={}, metric=metric)
        kept[step] = checkpoints.steps()
    assert kept[2] == [1, 2]
    assert kept[3] == [1, 2, 3]
    assert kept[4] == [2, 3, 4]
    assert kept[7] == [2, 4, 6, 7]
    assert checkpoints.best_step() == 2  # the first of equals
    assert sorted(p.name for p in checkpoints.directory.iterdir()) == ["2", "4", "6", "7"]


def test_saving_a_step_again_replaces_it(two):
    two.save(20, {"w": jnp.zeros(6)}, loop={"lines": 21})
    restored = two.restore_latest()
    assert (restored.step, restored.loop["lines"], restored.arrays["w"].sum()) == (20, 21, 0)


# --- failing saves -------------------------------------------------------------------------------------------


def no_space(*_: object, **__: object) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def at_manager(monkeypatch) -> None:
    import orbax.checkpoint as ocp

    monkeypatch.setattr(ocp.CheckpointManager, "save", no_space)


def after_the_arrays(monkeypatch) -> None:
    import orbax.checkpoint as ocp

    real = ocp.CheckpointManager.save

    def save(*args, **kwargs):
        real(*args, **kwargs)
        raise ValueError("RESOURCE_EXHAUSTED: No space left on device\nmore lines")

    monkeypatch.setattr(ocp.CheckpointManager, "save", save)


def at_fsync(monkeypatch) -> None:
    monkeypatch.setattr(checkpoint, "_fsync", no_space)


def at_the_manifest(monkeypatch) -> None:
    real = os.replace

    def replace(source, target):
        if str(target).endswith(MANIFEST):
            no_space()
        real(source, target)

    monkeypatch.setattr(checkpoint.os, "replace", replace)


@pytest.mark.parametrize("moment", [at_manager, after_the_arrays, at_fsync, at_the_manifest], ids=lambda f: f.__name__)
def test_a_save_that_fails_leaves_nothing_and_harms_no_other(two, monkeypatch, moment):
    before = {path: path.read_bytes() for path in two.directory.rglob("*") if path.is_file()}
    with monkeypatch.context() as patch:
        moment(patch)
        with pytest.raises(CheckpointError, match=r"checkpoints/30 could not be written: .*[Nn]o space left") as error:
            two.save(30, {"w": jnp.ones(6)}, loop={})
    assert "\n" not in str(error.value)
    assert {path: path.read_bytes() for path in two.directory.rglob("*") if path.is_file()} == before
    assert sorted(p.name for p in two.directory.iterdir()) == ["10", "20"]
    assert two.restore_latest().step == 20
    two.save(30, {"w": jnp.ones(6)}, loop={})  # room again
    assert two.steps() == [20, 30]


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=f"{tmp_path}/file/checkpoints/1 could not be written"):
        Checkpoints(tmp_path / "file" / "checkpoints").save(1, {"w": jnp.ones(2)}, loop={})


def test_what_a_killed_save_left_is_cleared_by_the_next(two):
    (two.directory / "30.orbax-checkpoint-tmp").mkdir()
    (two.directory / "30.orbax-checkpoint-tmp" / "state").write_text("half")
    shutil.copytree(two.directory / "20", two.directory / "30", ignore=shutil.ignore_patterns(MANIFEST))
    assert two.steps() == [10, 20]
    two.save(30, {"w": jnp.full(6, 30.0)}, loop={})
    assert sorted(p.name for p in two.directory.iterdir()) == ["20", "30"]
    assert two.restore_latest().arrays["w"][0] == 30


# --- the format ----------------------------------------------------------------------------------------------


def test_checkpoints_of_format_1_can_be_read(tmp_path):
    shutil.copytree(FIXTURE, tmp_path / "checkpoints")
    restored = Checkpoints(tmp_path / "checkpoints").restore_latest()
    assert (restored.step, restored.loop, restored.metric) == (100, LOOP, 0.75)
    same(restored.arrays, small_state())
    assert restored.state_sha256 == "3cde2e82389041be8f7c97f20dccde31982a2907003fd1b170c5ae81d9eb7559"
