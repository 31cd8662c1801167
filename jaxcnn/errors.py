"""The error for bad input, which the command line prints and exits with status 2, and the one for failure: 1."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """What the user gave cannot be used. The message names the value, what was expected and the remedy."""


class TrainingFailed(Exception):
    """Training cannot go on; the message says since which step and where the last good state is."""


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """An error for a `name` outside a table, with the nearest entries first."""
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, nearest))}? " if nearest else ""
    return InputError(f"unknown {kind} {name!r}: {hint}known: {', '.join(known)}")
