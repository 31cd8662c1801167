"""Every session runs on 8 fake devices, refuses implicit rank promotion, and uses its own compile cache."""

import os
import threading

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("MPLBACKEND", "agg")
# Tests compile far more than they compute. CI runs the slow tests, and those of exactness, as users compile.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import jax
import pytest
from server import Server

from jaxcnn import download

jax.config.update("jax_num_cpu_devices", 8)
jax.config.update("jax_numpy_rank_promotion", "raise")


@pytest.fixture
def strict_dtypes():
    """Implicit dtype promotion is an error inside (for our own functions: Flax and Optax promote)."""
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


@pytest.fixture(scope="module")
def own_caches(tmp_path_factory):
    """Compile cache, data directory and XLA flags of a module's tests alone, which run commands."""
    names = ("jax_compilation_cache_dir", "jax_persistent_cache_min_compile_time_secs", "jax_enable_x64")
    before = {name: getattr(jax.config, name) for name in names}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path_factory.mktemp("xla")))
        patch.setenv("JAXCNN_DATA", str(tmp_path_factory.mktemp("data")))
        patch.setenv("XLA_FLAGS", os.environ.get("XLA_FLAGS", ""))
        patch.setenv("COLUMNS", "200")
        patch.setenv("NPROC", "")
        patch.delenv("NPROC")  # what an elastic run sets is undone
        yield
    for name, value in before.items():
        jax.config.update(name, value)


@pytest.fixture
def server(monkeypatch):
    """A `server.Server` that downloads may be made from."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    monkeypatch.setattr(download, "SCHEMES", ("http",))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    yield server
    server.shutdown()
    thread.join()
    server.server_close()
