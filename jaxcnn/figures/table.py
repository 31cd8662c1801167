"""`python -m jaxcnn.figures.table`: writes what was measured into run sheets and experiments/README.md.

Both follow from the committed results, and a test compares them.
"""

import html
import json
import re
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

from jaxcnn.errors import InputError

FIELDS = ("Claim", "Source", "Data", "Recipe", "Cost", "Expected", "Measured")
REQUIRED = ("Claim", "Source", "Cost", "Expected", "Measured")
WIDTH = 120
INDENT = 10


class Sheet(NamedTuple):
    """The docstring of an experiment: its first line, its command and its fields, each in one line of text."""

    title: str
    command: str
    fields: dict[str, str]


def sheet(source: str, *, name: str) -> Sheet:
    """Of a Python file; `InputError` where a required field is missing."""
    text = source.split('"""')[1]
    title, _, rest = text.partition("\n")
    command = re.search(r"^    (python .+)$", rest, re.M)
    found = re.split(rf"^({'|'.join(FIELDS)})\s+", rest, flags=re.M)[1:]
    fields = {key: " ".join(value.split()) for key, value in zip(found[::2], found[1::2], strict=True)}
    missing = [field for field in REQUIRED if field not in fields]
    if command is None or missing:
        raise InputError(f"{name}: its docstring lacks {', '.join(missing) or 'the command'}")
    return Sheet(title, command[1], fields)


def with_measured(source: str, sentence: str) -> str:
    """The file with another field Measured, which is the last one of its docstring."""
    before, separator, after = source.partition("\nMeasured")
    rest = after[after.index('"""') :]
    lines = textwrap.wrap(sentence, WIDTH - INDENT, break_long_words=False, break_on_hyphens=False)
    return f"{before}{separator}  {(chr(10) + ' ' * INDENT).join(lines)}\n{rest}"


def readme(directory: Path) -> str:
    """experiments/README.md: every figure that has a result, with its picture; then the other experiments."""
    results = {path.stem: json.loads(path.read_text()) for path in sorted((directory / "results").glob("*.json"))}
    sheets = {path.stem: path.read_text() for path in sorted(directory.glob("*.py"))}
    rows = [_row(name, sheet(sheets[name], name=name), result) for name, result in results.items()]
    others = [f"- `{name}.py`: {_title(source)}" for name, source in sheets.items() if name not in results]
    return (
        "# Experiments\n\n"
        "Each figure is one command; its cost is that of 2 CPU cores with nothing beside it, and `--full` is the\n"
        "paper's scale, where a file has one. Numbers, seeds, settings and environment lie in `results/NAME.json`;\n"
        "the run sheet is the file's docstring. `python -m jaxcnn.figures.table` makes this page from the results.\n\n"
        "| figure | picture |\n|---|---|\n" + "\n".join(rows) + "\n\n## Others\n\n" + "\n".join(others) + "\n"
    )


def _row(name: str, sheet: Sheet, result: dict[str, Any]) -> str:
    text = [
        f"**{sheet.title}**",
        f"Claim: {sheet.fields['Claim']} ({sheet.fields['Source']})",
        f"Expected: {sheet.fields['Expected']}",
        f"Measured: {result['measured']}",
        f"Cost: {sheet.fields['Cost']}: `{sheet.command}`",
    ]
    cell = "<br>".join(html.escape(line, quote=False) for line in text).replace("|", "\\|")
    return f'| {cell} | <img src="results/{name}.png" width="560" alt="{name}"> |'


def _title(source: str) -> str:
    return source.split('"""')[1].partition("\n")[0]


def main() -> None:
    directory = Path("experiments")
    if not (directory / "results").is_dir():
        raise SystemExit("run this where experiments/results is")
    for path in sorted((directory / "results").glob("*.json")):
        file = directory / f"{path.stem}.py"
        file.write_text(with_measured(file.read_text(), json.loads(path.read_text())["measured"]))
    (directory / "README.md").write_text(readme(directory))


if __name__ == "__main__":
    main()
