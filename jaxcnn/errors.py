"""The one error for bad input: the command line prints it and exits with status 2."""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """What the user gave cannot be used. The message names the value, what was expected and the remedy."""


def unknown(kind: str, name: str, known: Iterable[str]) -> InputError:
    """An error for a `name` outside a table, with the nearest entries first."""
    known = list(known)
    nearest = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
    hint = f"did you mean {' or '.join(map(repr, nearest))}? " if nearest else ""
    return InputError(f"unknown {kind} {name!r}: {hint}known: {', '.join(known)}")
