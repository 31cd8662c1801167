"""Parameter names, shapes and counts of every model, frozen: checkpoints and converted weights depend on them.

`python tests/models/test_golden.py` writes the files anew; look at the difference before you commit it.
"""

import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxcnn.analysis.counts import FILE, measure
from jaxcnn.models import FAMILIES, MODELS, create

GOLDEN = Path(__file__).with_name("golden")
REMEDY = "if the change is meant, run `python tests/models/test_golden.py` and look at the difference"
SLOW = ("cifar_resnetv2_1001", "cifar_resnet1202", "cifar_densenet_bc_190_k40", "cifar_densenet_bc_250_k24")


def outline(tree, indent=""):
    """One line per array or module, siblings that differ in their number alone on one: "block2..block18"."""
    groups = []
    for name, child in tree.items():
        body = outline(child, indent + "  ") if isinstance(child, dict) else shape_of(child)
        stem, number = re.fullmatch(r"(.*?)(\d*)", name).groups()
        last = groups[-1] if groups else None
        if last and number and last["stem"] == stem and last["body"] == body and int(number) == last["end"] + 1:
            last["end"] = int(number)
        else:
            groups.append({"stem": stem, "first": name, "end": int(number) if number else None, "body": body})
    lines = []
    for group in groups:
        last = f"{group['stem']}{group['end']}" if group["end"] is not None else group["first"]
        title = indent + (group["first"] if group["first"] == last else f"{group['first']}..{last}")
        lines += [f"{title} {group['body']}"] if isinstance(group["body"], str) else [title, *group["body"]]
    return lines


def shape_of(leaf):
    return f"{leaf.dtype} {'x'.join(map(str, leaf.shape))}"


def golden(name):
    module = create(name)
    sample = jax.ShapeDtypeStruct((1, *MODELS[name].input), jnp.float32)
    variables = jax.eval_shape(lambda x: module.init(jax.random.key(0), x, train=False), sample)
    return "\n".join(line for kind, tree in variables.items() for line in [f"[{kind}]", *outline(tree)]) + "\n"


def models(slow):
    return [name for name in MODELS if (name in SLOW) == slow]


@pytest.mark.parametrize("name", [*models(False), *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)])
def test_parameter_names_and_shapes_stay(name):
    path = GOLDEN / f"{name}.txt"
    assert path.exists(), f"{path} is missing: {REMEDY}"
    assert golden(name) == path.read_text(), f"{name} is not what {path} says: {REMEDY}"


def test_there_is_no_golden_file_without_a_model():
    assert {path.stem for path in GOLDEN.glob("*.txt")} == set(MODELS), REMEDY


@pytest.mark.slow
@pytest.mark.parametrize("name", MODELS)
def test_the_counts_that_list_shows(name):
    assert json.loads(FILE.read_text())[name] == measure(name), REMEDY


def main():
    GOLDEN.mkdir(exist_ok=True)
    for path in GOLDEN.glob("*.txt"):
        if path.stem not in MODELS:
            path.unlink()
    for name in MODELS:
        print(name, file=sys.stderr)
        (GOLDEN / f"{name}.txt").write_text(golden(name))
    kept = {name: measure(name) for variants in FAMILIES.values() for name in variants}
    FILE.write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
