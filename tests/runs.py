"""The command, called here, or run in processes of its own, which may be killed at any moment.

Those are forked from a server that has imported what a run needs and started no device: a start costs no import.
"""

import contextlib
import json
import multiprocessing
import os
from collections.abc import Mapping, Sequence
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from jaxcnn import cli
from jaxcnn.train.log import TIMINGS

CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["jaxcnn.train.loop", "jaxcnn.report", "jaxcnn.commands.eval", "orbax.checkpoint"])


def jaxcnn(*args: str | Path | int) -> int:
    """The exit status of `jaxcnn ARGS`, in this process."""
    try:
        return cli.main([str(arg) for arg in args])
    except SystemExit as stop:  # what the parser of flags ends with
        return stop.code


def _main(argv: Sequence[str], environment: Mapping[str, str], output: Path) -> None:
    os.environ.update(environment)
    with open(output, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os._exit(cli.main(argv))


def start(argv: Sequence[str], output: Path, **environment: str) -> BaseProcess:
    """`jaxcnn ARGV`, under way; what it says is appended to `output`."""
    process = CONTEXT.Process(target=_main, args=(list(argv), environment, output))
    process.start()
    return process


def finish(argv: Sequence[str], output: Path, *, limit: float = 300, **environment: str) -> int:
    """Its exit status, negative for a signal. It must end within `limit` seconds."""
    process = start(argv, output, **environment)
    process.join(limit)
    if process.is_alive():
        process.kill()
        raise AssertionError(f"not over after {limit} s: {output.read_text()[-2000:]}")
    assert process.exitcode is not None
    return process.exitcode


def outcome(run: Path) -> dict[str, Any]:
    """What must not depend on how often a run was stopped: its lines, its result, its checkpoints."""
    summary = json.loads((run / "summary.json").read_text())
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    with contextlib.suppress(KeyError):
        del summary["seconds"]
    return {
        "summary": summary,
        "lines": [{k: v for k, v in line.items() if k not in TIMINGS} for line in lines],
        "steps": sorted(path.name for path in (run / "checkpoints").iterdir()),
    }
