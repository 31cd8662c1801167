"""Where a trained network comes from: the flags that eval and predict share."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jaxcnn.errors import InputError


@dataclass(frozen=True)
class Source:
    model: str | None = None
    """With --weights: one of `jaxcnn list`."""
    weights: str | None = None
    """In place of a run: a .safetensors, .npz or Keras .h5 file, or NAME.TAG of `jaxcnn weights list`, once fetched."""
    layout: str | None = None
    """How the file names its layers; by default the layout that fits best."""
    preprocessing: str | None = None
    """What images go through: imagenet, imagenet_bicubic, inception, caffe or squeezenet; by default the layout's."""

    def trained(self, run: Path | None) -> Any:
        """The network of the run, or of the weights where no run is given."""
        if (run is None) == (self.weights is None):
            raise InputError("give a run directory, or a model and its weights: --model NAME --weights FILE")
        from jaxcnn import trained

        if run is not None:
            for flag in ("model", "layout", "preprocessing"):
                if getattr(self, flag) is not None:
                    raise InputError(f"--{flag} belongs to --weights: run {run} has its own")
            return trained.of_run(run)
        assert self.weights is not None
        return trained.of_weights(self.weights, model=self.model, layout=self.layout, preprocessing=self.preprocessing)
