"""From an experiment file to its committed result: flags, JSON, picture, the line that says what was measured."""

import contextlib
import json
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NoReturn

import numpy as np
import tyro

from jaxcnn.cli import guarded
from jaxcnn.errors import InputError
from jaxcnn.figures.bench import Bench
from jaxcnn.files import replacing

Result = dict[str, Any]
"""What JSON can hold: the picture and the sentence are made of nothing else."""


@dataclass(frozen=True)
class Launch:
    smoke: bool = False
    """A small case in a temporary directory, to see that everything runs."""
    full: bool = False
    """The scale of the paper, for accelerators, where the file gives one."""
    draw: bool = False
    """Only draw the picture anew, from the JSON file."""
    output: Path | None = None
    """Directory of NAME.json and NAME.png; by default `results` beside the experiment, and `results/full`. Needed
    beside flags that change the settings."""
    data_dir: Path | None = None
    """Directory of local data sets; by default $JAXCNN_DATA or ~/.cache/jaxcnn/data."""


def run_figure(
    settings: Any,
    *,
    measure: Callable[[Any, Bench], Result],
    say: Callable[[Result], str],
    draw: Callable[[Result, Any], None],
    smoke: Mapping[str, Any],
    full: Mapping[str, Any] | None = None,
) -> NoReturn:
    """The main of an experiment that is a figure: measures, writes NAME.json and NAME.png, says the sentence.

    `settings` is a frozen dataclass, whose fields are flags; `smoke` and `full` change some of them.
    `measure(settings, bench)` gives the result; what it has under "timings" may differ from run to run, all else may
    not. `say(result)` is one sentence with figures, n and spread; `draw(result, figure)` fills a Matplotlib figure.
    """
    file = Path(sys.argv[0]).resolve()
    sys.exit(guarded(_run, file, settings, measure, say, draw, {"smoke": smoke, "full": full}))


def _run(
    file: Path,
    settings: Any,
    measure: Callable[[Any, Bench], Result],
    say: Callable[[Result], str],
    draw: Callable[[Result, Any], None],
    scales: Mapping[str, Mapping[str, Any] | None],
) -> int:
    launch, settings = _flags(file, settings, scales)
    with contextlib.ExitStack() as stack:
        if launch.smoke:
            output = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="jaxcnn-smoke-")))
        else:
            output = launch.output or file.parent / "results" / ("full" if launch.full else "")
        written = output / f"{file.stem}.json"
        if launch.draw:
            if not written.is_file():
                raise InputError(f"{written} does not exist: run the experiment without --draw first")
            _picture(json.loads(written.read_text())["result"], draw, output / f"{file.stem}.png")
            return 0
        from jaxcnn import platform

        platform.setup()
        from jaxcnn.train.run import environment

        bench, begun = Bench(data_dir=launch.data_dir, smoke=launch.smoke), time.monotonic()
        result = plain(measure(settings, bench))
        seconds = time.monotonic() - begun
        output.mkdir(parents=True, exist_ok=True)
        values = {
            "figure": file.stem,
            "settings": plain(vars(settings)),
            "measured": "",
            "seconds": round(seconds),
            "environment": environment(data=bench.digests, beside=file),
            "result": result,
        }
        _write(written, values)  # first: a sentence or a picture that fails loses nothing
        values["measured"] = sentence = say(result)
        _write(written, values)
        _picture(result, draw, output / f"{file.stem}.png")
        print(f"{sentence}\n{seconds:.0f} s; {output}")
    return 0


def _write(path: Path, values: Mapping[str, Any]) -> None:
    """JSON in which every object has a line for each entry, and a list is one line: results are compared by eye."""

    def text(value: Any, indent: str) -> str:
        if not isinstance(value, dict) or not value:
            return json.dumps(value, ensure_ascii=False)
        lines = [
            f"{indent} {json.dumps(key, ensure_ascii=False)}: {text(item, indent + ' ')}" for key, item in value.items()
        ]
        return "{\n" + ",\n".join(lines) + f"\n{indent}}}"

    with replacing(path) as file:
        file.write((text(values, "") + "\n").encode())


def _flags(file: Path, settings: Any, scales: Mapping[str, Mapping[str, Any] | None]) -> tuple[Launch, Any]:
    """Flags over the settings of the scale that was asked for."""
    kind = type(settings)

    @dataclass(frozen=True)
    class Flags:
        launch: Annotated[Launch, tyro.conf.arg(name="")]
        settings: Annotated[kind, tyro.conf.arg(name="")]  # type: ignore[valid-type]

    scale = next((name for name in scales if f"--{name}" in sys.argv[1:]), None)
    if scale is not None:
        if scales[scale] is None:
            raise InputError(f"{file.stem} has no --{scale} scale: its default is the whole of it")
        settings = kind(**(vars(settings) | dict(scales[scale] or {})))
    flags = tyro.cli(Flags, default=Flags(Launch(), settings), prog=file.name, description="")
    if flags.settings != settings and not (flags.launch.output or flags.launch.smoke):
        raise InputError(
            f"with settings of your own {file.stem} would overwrite the results of the file's own: add --output DIR"
        )
    return flags.launch, flags.settings


def _picture(result: Result, draw: Callable[[Result, Any], None], path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.8), layout="constrained")
    draw(result, figure)
    figure.savefig(path, dpi=100)


def plain(value: Any) -> Any:
    """What JSON holds: arrays as lists, floats with 6 significant digits, those that are not finite as None."""
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    if hasattr(value, "tolist") and not isinstance(value, (int, float)):
        return plain(np.asarray(value).tolist())
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    return value
