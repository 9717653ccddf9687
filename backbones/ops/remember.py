"""Dictionaries of what is made once for each kind of call."""

from typing import Any, TypeVar

MOST = 8192
Value = TypeVar("Value")


def remember(kept: dict[Any, Any], key: Any, value: Value, most: int = MOST) -> Value:
    """Puts ``value`` into a dictionary that images of ever new sizes would fill, and which begins anew with ``most``
    values; returns it.
    """
    if len(kept) >= most:
        kept.clear()
    kept[key] = value
    return value
