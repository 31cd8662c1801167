"""Counts of every model of the table at its usual input, kept in a file: to trace them all takes a minute."""

import json
from functools import cache
from pathlib import Path

from jaxcnn.analysis.network import summary
from jaxcnn.models import MODELS, create

FILE = Path(__file__).with_name("counts.json")
"""Written by `python tests/models/test_golden.py`, and tested against the models."""


def counts(name: str) -> dict[str, int]:
    """{"parameters": trained, "statistics": BatchNorm's, "macs": multiply-accumulates for one example}."""
    return _kept().get(name) or measure(name)


def measure(name: str) -> dict[str, int]:
    """The counts by tracing the model."""
    found = summary(create(name), input=MODELS[name].input)
    return {"parameters": found.parameters, "statistics": found.statistics, "macs": found.macs}


@cache
def _kept() -> dict[str, dict[str, int]]:
    return json.loads(FILE.read_text()) if FILE.exists() else {}
