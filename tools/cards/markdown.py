"""Markdown tables, and text between markers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

_BLOCK = r"(<!-- generated: {name}[^>]*-->\n)(.*?)(<!-- end of {name} -->)"


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; None is an empty cell."""
    lines = [list(header), ["---"] * len(header)]
    lines += [["" if cell is None else str(cell) for cell in row] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def replace_block(text: str, name: str, content: str) -> str:
    """``text`` with what stands between the markers of the block ``name`` replaced.

    Raises:
        ValueError: there are no such markers, or several.
    """
    pattern = re.compile(_BLOCK.format(name=re.escape(name)), re.DOTALL)
    if len(pattern.findall(text)) != 1:
        raise ValueError(f"expected one block '<!-- generated: {name} -->' ... '<!-- end of {name} -->'")
    return pattern.sub(lambda match: f"{match[1]}\n{content}\n\n{match[3]}", text)


def enumerated(words: Sequence[str]) -> str:
    """Words as "a, b and c"."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last
