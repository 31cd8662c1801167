"""Weights files to named arrays: safetensors, npz and Keras h5. Nothing is ever unpickled."""

import zipfile
from pathlib import Path

import numpy as np

from jaxcnn.errors import InputError

Arrays = dict[str, np.ndarray]

OLD_LAYERS = {"conv1/conv": "conv1_conv", "conv1/bn": "conv1_bn", "fc1000": "predictions", "probs": "predictions"}
"""What Keras called layers when it published its files, and what it calls them now."""

PICKLES = (".pth", ".pt", ".th", ".ckpt", ".bin", ".pkl", ".pickle", ".tar")


def read(path: Path | str) -> Arrays:
    """The arrays of a `.safetensors`, `.npz`, `.h5` or `.keras.h5` file by their names there, on the host.

    Keras names are LAYER/WEIGHT, today's, without its optimiser and its `:0`.

    Raises:
      InputError: no such file, another suffix, a file that is damaged or not what its suffix says, a pickle (the
        message names the converter), no array in it, or an array that is not of floating point but for
        PyTorch's counters of batches.
    """
    path = Path(path)
    if path.suffix in PICKLES:
        raise InputError(
            f"{path}: files of PyTorch are pickles, which can run code, and are not read: if you trust it, convert it"
            f" where PyTorch is installed: {conversion(path)}"
        )
    if path.suffix not in READERS:
        raise InputError(f"{path} has suffix {path.suffix!r}: expected one of {', '.join(READERS)}")
    if not path.is_file():
        raise InputError(f"{path} is not a file")
    arrays = READERS[path.suffix](path)
    arrays = {key: array for key, array in arrays.items() if not key.endswith("num_batches_tracked")}
    if not arrays:
        raise InputError(f"{path} holds no array")
    for key, array in arrays.items():
        if array.dtype.kind != "f" and array.dtype.name != "bfloat16":
            raise InputError(f"{path}: {key} is {array.dtype}, expected floating point: are these weights?")
    return arrays


def conversion(path: Path) -> str:
    """The command by which a user turns a pickle into safetensors beside it."""
    return f"python -m jaxcnn.pretrained.from_torch {path} {path.with_suffix('.safetensors')}"


def metadata(path: Path | str) -> dict[str, str]:
    """The text that a safetensors file carries beside its arrays; empty for other files."""
    from safetensors import SafetensorError, safe_open

    if Path(path).suffix != ".safetensors":
        return {}
    try:
        with safe_open(path, "numpy") as file:
            return file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise _unreadable(Path(path), error) from error


def _safetensors(path: Path) -> Arrays:
    from safetensors import SafetensorError
    from safetensors.numpy import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, KeyError, ValueError) as error:
        raise _unreadable(path, error) from error


def _npz(path: Path) -> Arrays:
    try:
        with open(path, "rb") as stream, np.load(stream, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise InputError(f"{path} is one array, not an npz archive")
            return dict(file)
    except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile) as error:
        raise _unreadable(path, error) from error


def _h5(path: Path) -> Arrays:
    import h5py

    arrays: Arrays = {}

    def visit(name: str, item: object) -> None:
        if isinstance(item, h5py.Dataset) and "optimizer_weights" not in name:
            *scope, weight = name.removeprefix("model_weights/").removesuffix(":0").split("/")
            half = len(scope) // 2  # LAYER/LAYER/WEIGHT, and names of layers can have a slash
            layer = "/".join(scope[half:] if scope[:half] == scope[half:] else scope[-1:])
            arrays[f"{OLD_LAYERS.get(layer, layer)}/{weight}"] = np.asarray(item)

    try:
        with h5py.File(path, "r") as file:
            file.visititems(visit)
    except (OSError, KeyError, ValueError, RuntimeError, TypeError) as error:
        raise _unreadable(path, error) from error
    return arrays


def _unreadable(path: Path, error: Exception) -> InputError:
    return InputError(f"{path} cannot be read as {path.suffix[1:]}: {error}")


READERS = {".safetensors": _safetensors, ".npz": _npz, ".h5": _h5}
