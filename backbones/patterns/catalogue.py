"""The patterns that models ask for by name."""

from __future__ import annotations

import re
from functools import cache, partial
from math import lcm

from torch import Tensor

from backbones.patterns.pattern import COMPOSED, PATTERNS, OrderFn, ScanPattern, checked_int
from backbones.patterns.traversals import (
    _every_second,
    both_ways,
    column_major,
    concatenated,
    diagonal,
    filled_up,
    hilbert,
    mirrored,
    raster,
    reversed_order,
    snake,
    spiral,
    stacked,
    transposed,
    turned,
    windows,
)
from backbones.suggest import did_you_mean


def local_windows(size: int) -> ScanPattern:
    """Windows row by row and column by column, both ways (K = 4), on the grid padded to whole windows."""
    order = partial(windows, size=checked_int("size", size))
    return ScanPattern(f"local_windows_{size}", 4, both_ways(order, transposed(order)), pad_to=size)


_DIRECTION = re.compile(r"(?:(h)|(v)|w([1-9]\d*))(_flip)?")


@cache
def directions(*names: str) -> ScanPattern:
    """One order for each name (LocalMamba, arXiv 2403.09338); called alike it returns the same pattern.

    Args:
        names: "h" is row by row, "v" column by column, "w2" or "w7" windows of that side in raster order, on the grid
            padded to whole windows; "_flip" behind any of them reverses it, padded slots included. Shorter orders end
            in padded slots.

    Raises:
        ValueError: a name is none of these, or there is none.
    """
    if not names:
        raise ValueError("names: got no direction, expected at least one")
    orders: list[OrderFn] = []
    sides = [1]
    for name in names:
        match = _DIRECTION.fullmatch(name)
        if match is None:
            raise ValueError(
                f"names: got direction {name!r}, expected 'h', 'v', 'w2', 'w7' or another window, or any with '_flip'"
            )
        horizontal, vertical, side, flip = match.groups()
        order = raster if horizontal else column_major if vertical else partial(windows, size=int(side))
        orders.append(reversed_order(order) if flip else order)
        sides.append(int(side or 1))
    # On sides that all windows divide, every order is as long as the grid has cells; on others one at least is longer.
    pattern = ScanPattern(" ".join(names), len(names), filled_up(*orders), pad_to=lcm(*sides))
    return COMPOSED.setdefault(pattern.name, pattern)


FORWARD = ScanPattern("forward", 1, stacked(raster), sequence=(1,))
REVERSE = ScanPattern("reverse", 1, stacked(reversed_order(raster)), sequence=(-1,))
BIDIRECTIONAL = ScanPattern("bidirectional", 2, both_ways(raster), sequence=(1, -1))  # Vim
CROSS = ScanPattern("cross", 4, both_ways(raster, column_major))  # VMamba, GroupMamba
# EfficientVMamba: disjoint orders, one for each parity of (i, j): (0, 0), (1, 0), (0, 1), (1, 1). Those of
# the odd rows go column by column: transposed, which exchanges the parities too.
ATROUS = ScanPattern(
    "atrous",
    4,
    stacked(
        partial(_every_second, first_row=0, first_column=0),
        transposed(partial(_every_second, first_row=0, first_column=1)),
        partial(_every_second, first_row=0, first_column=1),
        transposed(partial(_every_second, first_row=1, first_column=1)),
    ),
    pad_to=2,
)
# MSVMamba: its half-resolution grid three times over, as one sequence of 3HW steps.
MULTI_SCALE = ScanPattern(
    "multi_scale",
    1,
    stacked(concatenated(reversed_order(raster), column_major, reversed_order(column_major))),
)
SNAKE = ScanPattern(
    "snake", 4, stacked(snake, reversed_order(snake), transposed(snake), reversed_order(transposed(snake)))
)
DIAGONAL = ScanPattern("diagonal", 4, both_ways(diagonal, mirrored(diagonal)))
SPIRAL = ScanPattern("spiral", 4, both_ways(spiral, transposed(spiral)))
# MHS-VM: from the top left corner, and upside down from the bottom left one.
SPIRAL_CORNERS = ScanPattern("spiral_corners", 4, both_ways(spiral, turned(mirrored(spiral))))
# Turned, because the curve over a rectangle that is not square is its own transpose.
HILBERT = ScanPattern("hilbert", 4, both_ways(hilbert, turned(hilbert)))
LOCAL_WINDOWS_2 = local_windows(2)
LOCAL_WINDOWS_7 = local_windows(7)

PATTERNS |= {
    pattern.name: pattern
    for pattern in (
        FORWARD, REVERSE, BIDIRECTIONAL, CROSS, ATROUS, MULTI_SCALE,
        SNAKE, DIAGONAL, SPIRAL, SPIRAL_CORNERS, HILBERT, LOCAL_WINDOWS_2, LOCAL_WINDOWS_7,
    )
}  # fmt: skip


def get_pattern(name: str | ScanPattern) -> ScanPattern:
    """The catalogue's pattern of that name, or the `directions` that it lists; a pattern is returned as it is.

    Raises:
        ValueError: no such pattern; the message offers near names.
    """
    if isinstance(name, ScanPattern):
        return name
    if name not in PATTERNS:
        names = str(name).split()
        if names and all(map(_DIRECTION.fullmatch, names)):
            return directions(*names)
        raise ValueError(f"unknown scan pattern {name!r}{did_you_mean(str(name), PATTERNS)}")
    return PATTERNS[name]


def checked_pattern(pattern: ScanPattern | str, default: ScanPattern) -> ScanPattern:
    """The pattern, or the catalogue's one of that name, if it can stand in for ``default``.

    Raises:
        ValueError: it has another number of orders, and so would need other parameters.
    """
    pattern = get_pattern(pattern)
    if pattern.num_orders != default.num_orders:
        raise ValueError(
            f"pattern: got {pattern.name!r} with {pattern.num_orders} orders, expected {default.num_orders} "
            f"as {default.name!r} has"
        )
    return pattern


def backwards(pattern: ScanPattern) -> ScanPattern:
    """The same orders, each from its last step to its first."""
    if pattern == FORWARD:
        return REVERSE
    order_fn = partial(_last_to_first, pattern.order_fn)
    sequence = None if pattern.sequence is None else tuple(-way for way in pattern.sequence)
    return ScanPattern(f"{pattern.name}_backwards", pattern.num_orders, order_fn, pattern.pad_to, sequence)


def _last_to_first(order_fn: OrderFn, grid: Tensor) -> Tensor:
    return order_fn(grid).flip(1)
