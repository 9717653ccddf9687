"""Suggestions for mistyped names."""

from collections.abc import Iterable
from difflib import get_close_matches

_SHORT = 40  # lists up to this length are shown in full


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """The end of an error message about an unknown ``name``, beginning with "; ".

    It offers up to three of the ``known`` names that are alike, or, where none is, all of a short list. It is empty if
    there is nothing to offer.
    """
    names = list(known)
    if near := get_close_matches(name, names, n=3, cutoff=0.5):
        return f"; did you mean {' or '.join(near)}?"
    return f"; known: {', '.join(names)}" if 0 < len(names) <= _SHORT else ""
