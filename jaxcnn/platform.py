"""Backend set-up that must run before JAX starts a device: XLA flags, the compile cache, determinism.

Called by our own commands and benchmarks, never at import: a library does not set flags for its user.
"""

import ctypes
import os
import zlib
from pathlib import Path

# Sends CPU convolutions to the faster library (ResNet-20 step: 590 -> 360 ms, jaxlib 0.10.2). An XLA flag that
# a jaxlib does not know aborts the process, so it is given only to the versions it was tried with.
_CPU_FLAG = (
    "--xla_cpu_experimental_ynn_fusion_type="
    "LIBRARY_FUSION_TYPE_DOT,LIBRARY_FUSION_TYPE_ELTWISE,LIBRARY_FUSION_TYPE_REDUCE"
)
_CPU_FLAG_VERSIONS = ("0.10.2", "0.11.2")
_GPU_DETERMINISTIC = ("--xla_gpu_deterministic_ops=true", "--xla_gpu_autotune_level=0")


def setup(*, deterministic: bool = False, elastic: int = 0, compile_cache: bool = True) -> None:
    """Sets XLA flags and JAX options for this process.

    Flags that the user already gave in `XLA_FLAGS` win. The compile cache lies in `JAX_COMPILATION_CACHE_DIR`
    or `~/.cache/jaxcnn/xla`. With `elastic` virtual shards the number of threads, which CPU kernels divide their sums
    by, is that of the shards, whatever the number of cores and devices.
    """
    import jaxlib

    flags = os.environ.get("XLA_FLAGS", "").split()
    wanted: list[str] = list(_GPU_DETERMINISTIC) if deterministic or elastic else []
    if elastic:
        os.environ["NPROC"] = str(elastic)  # the threads of XLA's CPU client, unless its devices are more
    if jaxlib.__version__ in _CPU_FLAG_VERSIONS:
        wanted.append(_CPU_FLAG)
    _keep_freed_memory()
    given = {flag.split("=")[0] for flag in flags}
    flags += [flag for flag in wanted if flag.split("=")[0] not in given]
    os.environ["XLA_FLAGS"] = " ".join(flags)

    import jax

    # Steps run on the calling thread, whose arena may grow without mapping (see _keep_freed_memory).
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if compile_cache:
        cache = os.environ.get("JAX_COMPILATION_CACHE_DIR")
        directory = Path(cache) if cache else cache_home() / "xla"
        try:
            directory.mkdir(parents=True, exist_ok=True)
            repair_compile_cache(directory)
        except OSError:
            return  # a cache that cannot be written to costs compile time, nothing else
        jax.config.update("jax_compilation_cache_dir", str(directory))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.5)


def _keep_freed_memory() -> None:
    """Lets glibc keep what XLA frees. XLA's CPU client takes and returns the temporary memory of a step at every
    call; glibc maps and unmaps blocks that large, and each page faults again: 95,000 faults, a quarter of the
    processor time, in a ResNet-20 step at batch 128. The process then holds its peak of memory until it ends."""
    trim_threshold, mmap_threshold = -1, -3
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return  # not glibc
    mallopt(mmap_threshold, 1 << 30)
    mallopt(trim_threshold, 2**31 - 1)


def cache_home() -> Path:
    """`$XDG_CACHE_HOME/jaxcnn`, by default `~/.cache/jaxcnn`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jaxcnn"


def repair_compile_cache(directory: Path) -> list[str]:
    """Deletes truncated entries written since the last call and returns their names.

    JAX writes entries in place: a process killed meanwhile leaves one that fails at every later start.
    """
    stamp = directory / ".checked"
    since = stamp.stat().st_mtime if stamp.exists() else 0.0
    bad = []
    for entry in directory.glob("*-cache"):
        try:
            if entry.stat().st_mtime >= since and not _complete(entry.read_bytes()):
                entry.unlink()
                bad.append(entry.name)
        except OSError:
            continue  # another process deleted it first
    stamp.touch()
    return bad


def _complete(data: bytes) -> bool:
    if data[:4] == b"\x28\xb5\x2f\xfd":  # zstandard, where that package is installed
        try:
            import zstandard

            zstandard.ZstdDecompressor().decompress(data)
            return True
        except ImportError:
            return True
        except zstandard.ZstdError:
            return False
    try:
        zlib.decompress(data)
        return True
    except zlib.error:
        return False
