"""Figures: experiments that show one claim by a few numbers and a picture, each by one command."""

from jaxcnn.figures.bench import Bench
from jaxcnn.figures.run import run_figure

__all__ = ["Bench", "run_figure"]
