"""`jaxcnn diff`: where two runs part."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro

from jaxcnn import config
from jaxcnn.errors import InputError

_ENVIRONMENT = ("versions", "xla_flags", "device_kind", "devices", "processes", "cores", "python")


@dataclass(frozen=True)
class Diff:
    """Compares two runs: configuration, environment, data, code, the first line of the log that differs (timings
    aside), and the final state. Status 0 whether they differ or not."""

    run_a: tyro.conf.Positional[Path]
    """Run directory."""
    run_b: tyro.conf.Positional[Path]
    json: bool = False


def main(args: Sequence[str]) -> int:
    """`jaxcnn diff RUN_A RUN_B [--json]`."""
    flags = tyro.cli(Diff, args=list(args), prog="jaxcnn diff")
    found = compare(flags.run_a, flags.run_b)
    print(json.dumps(found) if flags.json else _text(found), flush=True)
    return 0


def compare(a: Path, b: Path) -> dict[str, Any]:
    """Lines `path: a -> b` by kind, the first line that differs and the results, JSON types. `InputError` for what is
    no run."""
    from jaxcnn.train.log import TIMINGS
    from jaxcnn.train.run import read_json

    config_a, config_b = _config(a), _config(b)
    environments = [read_json(path / "environment.json") or {} for path in (a, b)]
    summaries = [read_json(path / "summary.json") or {} for path in (a, b)]

    def differing(fields: Sequence[str]) -> list[str]:
        one, other = ({name: values.get(name) for name in fields} for values in environments)
        return config.differences(one, other)

    one, other = ({k: v for k, v in values.items() if k not in TIMINGS} for values in summaries)
    digests = [values.get("state_sha256") for values in summaries]
    return {
        "runs": [str(a), str(b)],
        "config": config.differences(config_a, config_b),
        "environment": differing(_ENVIRONMENT),
        "data": differing(["data"]),
        "code": differing(["git"]),
        "metrics": _logs(a, b),
        "finished": [bool(values) for values in summaries],
        "same_state": None if None in digests else digests[0] == digests[1],
        "summary": config.differences(one, other) if one and other else [],
    }


def _config(run: Path) -> dict[str, Any]:
    from jaxcnn.train.run import read_json

    values = read_json(run / "config.json") if run.is_dir() else None
    if values is None:
        raise InputError(f"{run} is not a run directory: it has no config.json")
    return config.to_json(config.from_json(values))  # what an older version did not have yet has its default


def _logs(a: Path, b: Path) -> dict[str, Any]:
    """How many lines agree from the start, how many there are, and the first difference."""
    from jaxcnn.train.log import complete_lines, line_difference, parsed

    def read(run: Path) -> list[dict[str, Any]]:
        path = run / "metrics.jsonl"
        try:
            return [parsed(line) for line in complete_lines(path)]
        except ValueError as error:
            raise InputError(f"{path} was altered ({error})") from None

    one, other = read(a), read(b)
    pairs = enumerate(zip(one, other, strict=False))
    found = next(((i, old, d) for i, (old, new) in pairs if (d := line_difference(old, new))), None)
    result = {"agree": min(len(one), len(other)), "lines": [len(one), len(other)], "difference": None}
    if found is not None:
        place, line, difference = found
        result["agree"] = place
        result["difference"] = {"line": place + 1, "step": line["step"], **difference._asdict()}
    return result


def _text(found: Mapping[str, Any]) -> str:
    lines = []
    for kind in ("config", "environment", "data", "code"):
        lines += [f"{kind}: {'differs' if found[kind] else 'the same'}", *(f"  {line}" for line in found[kind])]
    metrics, difference = found["metrics"], found["metrics"]["difference"]
    if difference is not None:
        values = f"{json.dumps(difference['old'])} -> {json.dumps(difference['new'])}"
        lines.append(f"metrics: {metrics['agree']} lines agree, then step {difference['step']} differs")
        lines.append(f"  {difference['field']}: {values} (line {difference['line']})")
    else:
        a, b = metrics["lines"]
        more = "" if a == b else f"; there are {a} and {b}"
        lines.append(f"metrics: the logs agree over {metrics['agree']} lines{more}")
    if found["same_state"] is None:
        which = [run for run, finished in zip(found["runs"], found["finished"], strict=True) if not finished]
        lines.append(f"result: not finished: {', '.join(which)}")
    else:
        lines.append(f"result: {'the same final state' if found['same_state'] else 'another final state'}")
        lines += [f"  {line}" for line in found["summary"]]
    return "\n".join(lines)
