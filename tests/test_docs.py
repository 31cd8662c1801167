"""The README and the run sheets are true: their commands parse, their code runs, every experiment runs with --smoke."""

import re
import shlex
from pathlib import Path

import pytest

from jaxcnn import cli, config
from jaxcnn.models import FAMILIES, MODELS

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```python\n(.*?)```", README, re.S)
SHEETS = sorted((ROOT / "experiments").glob("*.py"))
# The others have programs of their own.
EXPERIMENTS = [path for path in SHEETS if "run_experiment(" in path.read_text()]


def test_the_readme_fits_a_users_own_module_in_about_fifteen_lines(capsys):
    code = next(block for block in BLOCKS if "fit(" in block)
    assert len([line for line in code.splitlines() if line.strip()]) <= 16
    exec(compile(code, "README.md", "exec"), {})
    assert float(capsys.readouterr().out.strip().splitlines()[-1]) > 0.9


def test_the_readme_names_features(capsys):
    exec(compile(next(block for block in BLOCKS if "features(" in block), "README.md", "exec"), {})
    assert capsys.readouterr().out == "(1, 5, 6, 64)\n"


def test_the_readme_fits_a_segmentation(capsys):
    exec(compile(next(block for block in BLOCKS if "segmentation()" in block), "README.md", "exec"), {})
    error, iou = map(float, capsys.readouterr().out.split()[-2:])
    assert error < 0.2
    assert iou > 0.7


def test_the_readme_counts_its_networks():
    assert f"{len(MODELS)} networks in {len(FAMILIES)} families" in README


def test_the_two_commands_do_all_the_setup():
    commands = [line for line in README.splitlines() if line.startswith("python3 -m venv")]
    assert len(commands) == 2
    assert commands[0].endswith(".venv/bin/jaxcnn train")
    assert "pytest" in commands[1]


def test_every_train_command_of_the_readme_parses():
    blocks = re.findall(r"```sh\n(.*?)```", README, re.S)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    commands = [shlex.split(line)[2:] for line in lines if line.startswith("jaxcnn train ") and "--help" not in line]
    assert len(commands) >= 3
    for args in commands:
        experiment = config.LENET5_DIGITS
        if args[0].endswith(".py"):
            experiment = cli.experiment_of(ROOT / args.pop(0))[0]
        cli.parse(experiment, args)


@pytest.mark.slow
@pytest.mark.parametrize("path", EXPERIMENTS, ids=lambda path: path.stem)
def test_every_experiment_runs_with_smoke(path, capsys):
    assert cli.main(["train", str(path), "--smoke", "--data.batch-size", "16"]) == 0
    assert "test accuracy" in capsys.readouterr().out


@pytest.mark.parametrize("path", SHEETS, ids=lambda path: path.stem)
def test_every_run_sheet_names_its_command_and_what_it_expects(path):
    sheet = path.read_text().split('"""')[1]
    assert f"python experiments/{path.name}" in sheet
    assert "Expected" in sheet
    assert "Measured" in sheet
    if path not in EXPERIMENTS:
        return
    experiment, full = cli.experiment_of(path)
    assert experiment.name == path.stem
    assert ("--full" in sheet) == (full is not None)


def test_from_the_command_to_the_gradient_there_are_three_files():
    cli_text, loop, step = (
        (ROOT / "jaxcnn" / name).read_text() for name in ("cli.py", "train/loop.py", "train/step.py")
    )
    assert "fit(" in cli_text
    assert "make_train_step(" in loop
    assert "jax.value_and_grad(" in step
