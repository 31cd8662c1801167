"""A PyTorch checkpoint to safetensors, run by its user in an environment that has PyTorch and safetensors:

    python -m jaxcnn.pretrained.from_torch resnet20.th resnet20.safetensors

This file needs nothing of jaxcnn: where that is not installed, run it by its path. Only tensors are read
(`weights_only=True`); of a training checkpoint, those under `state_dict` or `model`.
"""

import sys
from typing import Any


def convert(source: str, target: str) -> int:
    """Writes the tensors of `source` to `target`; returns their number."""
    import torch  # type: ignore[import-not-found]
    from safetensors.torch import save_file  # type: ignore[import-not-found]

    state: Any = torch.load(source, map_location="cpu", weights_only=True)
    for key in ("state_dict", "model"):
        if isinstance(state.get(key), dict):
            state = state[key]
    tensors = {key: value.contiguous().clone() for key, value in state.items() if isinstance(value, torch.Tensor)}
    if not tensors:
        raise SystemExit(f"{source} holds no tensor: found {', '.join(map(str, list(state)[:5]))}")
    save_file(tensors, target)
    return len(tensors)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    print(f"{convert(*sys.argv[1:])} tensors in {sys.argv[2]}")
