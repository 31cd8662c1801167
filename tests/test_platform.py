"""Backend set-up: flags that the user gave win, and a compile cache that a kill cannot spoil."""

import os
import zlib
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxcnn import cli, platform

FLAG = platform._CPU_FLAG.split("=")[0]


@pytest.fixture
def flags(monkeypatch):
    """What `setup` leaves in XLA_FLAGS, given what was there; nothing of it stays."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}

    def after(given: str, **options: bool) -> list[str]:
        monkeypatch.setenv("XLA_FLAGS", given)
        platform.setup(**({"compile_cache": False} | options))
        return os.environ["XLA_FLAGS"].split()

    yield after
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache().reset_cache()


def test_an_experimental_flag_is_given_only_to_versions_that_know_it(flags, monkeypatch):
    import jaxlib

    for version, known in [("0.10.2", True), ("0.11.2", True), ("0.10.1", False), ("0.12.0", False)]:
        monkeypatch.setattr(jaxlib, "__version__", version)
        assert any(flag.startswith(FLAG) for flag in flags("")) == known


def test_flags_that_the_user_gave_win(flags):
    own = [f"{FLAG}=LIBRARY_FUSION_TYPE_DOT", "--xla_gpu_deterministic_ops=false"]
    assert flags(" ".join(own), deterministic=True)[:2] == own
    names = [flag.split("=")[0] for flag in flags(" ".join(own), deterministic=True)]
    assert len(names) == len(set(names))
    assert "--xla_gpu_autotune_level" in names


def test_deterministic_flags_are_given_when_asked_for(flags):
    assert "--xla_gpu_deterministic_ops=true" in flags("", deterministic=True)
    assert not any("deterministic" in flag for flag in flags(""))
    once = flags("", deterministic=True)
    assert flags(" ".join(once), deterministic=True) == once


def test_the_cache_lies_where_it_is_told(flags, monkeypatch, tmp_path):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "a"))
    flags("", compile_cache=True)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "a")
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "b"))
    flags("", compile_cache=True)
    assert jax.config.jax_compilation_cache_dir == str(tmp_path / "b" / "jaxcnn" / "xla")


def test_a_cache_that_cannot_be_written_stops_nothing(flags, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    before = jax.config.jax_compilation_cache_dir
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "file" / "cache"))
    flags("", compile_cache=True)
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))

    def denied(self: Path) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "touch", denied)
    flags("", compile_cache=True)
    assert jax.config.jax_compilation_cache_dir == before


@pytest.fixture
def cache(tmp_path) -> Path:
    """A compile cache with two entries that JAX wrote."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs")
    before = {name: getattr(jax.config, name) for name in names}
    jax.config.update(names[0], str(tmp_path / "cache"))
    jax.config.update(names[1], 0.0)
    compilation_cache().reset_cache()
    x = jnp.ones((4, 4))
    for scale in (2.0, 3.0):
        jax.jit(lambda x, scale=scale: jnp.tanh(x @ x) * scale)(x).block_until_ready()
    for name, value in before.items():
        jax.config.update(name, value)
    compilation_cache().reset_cache()
    return tmp_path / "cache"


def compilation_cache():
    from jax.experimental.compilation_cache import compilation_cache

    return compilation_cache


def test_only_truncated_entries_are_deleted(cache):
    entries = sorted(cache.glob("*-cache"))
    assert len(entries) >= 2
    assert platform.repair_compile_cache(cache) == []
    sound, broken = entries[0].read_bytes(), entries[-1]
    (cache / "notes").write_text("")
    for data in (b"", sound[:10], sound[:-1]):
        broken.write_bytes(data)
        assert platform.repair_compile_cache(cache) == [broken.name]
        assert sorted(cache.glob("*-cache")) == entries[:-1]
        assert entries[0].read_bytes() == sound
    assert (cache / "notes").exists()


def test_entries_are_checked_once(cache, monkeypatch):
    platform.repair_compile_cache(cache)
    for entry in cache.glob("*-cache"):  # as old as caches get
        os.utime(entry, (1e9, 1e9))
    monkeypatch.setattr(platform, "_complete", lambda data: pytest.fail("read again"))
    assert platform.repair_compile_cache(cache) == []


def test_both_compressions_of_jax_are_known():
    data = zlib.compress(b"program" * 100)
    assert platform._complete(data)
    assert not platform._complete(data[:-1])
    zstandard = pytest.importorskip("zstandard")
    data = zstandard.ZstdCompressor().compress(b"program" * 100)
    assert platform._complete(data)
    assert not platform._complete(data[:-1])


@pytest.mark.slow
def test_a_second_start_compiles_from_the_cache(flags, monkeypatch, tmp_path):
    """Two runs of the same network and data: the second adds nothing, not even the smallest program."""
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    flags("", compile_cache=True)
    monkeypatch.setattr(platform, "setup", lambda **_: None)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    compilation_cache().reset_cache()
    args = ["train", "--model.name", "linear", "--smoke", "--quiet", "--runs-dir", str(tmp_path / "runs"), "--run"]

    def entries(run: str) -> set[str]:
        jax.clear_caches()  # as at the start of a process
        assert cli.main([*args, run]) == 0
        return {path.name for path in (tmp_path / "cache").glob("*-cache")}

    first = entries("a")
    assert any(name.startswith("jit_whole") for name in first)
    assert entries("b") == first
