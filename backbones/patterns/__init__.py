"""Scan patterns: in which order a state-space layer visits the cells of a grid.

An *order* is one traversal: the raster index ``i * width + j`` of the cell visited at each step. A
*pattern* is a set of K orders of equal length. An order may skip or repeat cells. The index -1 marks a
*padded slot*: a step outside the grid, which reads zeros but still decays the state.

An order is defined by a function: from the grid, the ``(H, W)`` tensor of raster indices, it returns the
``(T,)`` cells in the order of their visits. The same function on a transposed or flipped grid gives another
order; see `transposed`, `mirrored`, `turned` and `reversed_order`. `concatenated` joins several orders into
one long order. `stacked`, `filled_up` and `both_ways` make the ``(K, T)`` table of a pattern::

    zigzag_and_back = ScanPattern("zigzag_and_back", 2, both_ways(diagonal))
"""

from backbones.patterns.catalogue import (
    ATROUS,
    BIDIRECTIONAL,
    CROSS,
    DIAGONAL,
    FORWARD,
    HILBERT,
    LOCAL_WINDOWS_2,
    LOCAL_WINDOWS_7,
    MULTI_SCALE,
    REVERSE,
    SNAKE,
    SPIRAL,
    SPIRAL_CORNERS,
    backwards,
    checked_pattern,
    directions,
    get_pattern,
    local_windows,
)
from backbones.patterns.pattern import PATTERNS, OrderFn, ScanPattern
from backbones.patterns.traversals import (
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

__all__ = [
    "ATROUS",
    "BIDIRECTIONAL",
    "CROSS",
    "DIAGONAL",
    "FORWARD",
    "HILBERT",
    "LOCAL_WINDOWS_2",
    "LOCAL_WINDOWS_7",
    "MULTI_SCALE",
    "PATTERNS",
    "REVERSE",
    "SNAKE",
    "SPIRAL",
    "SPIRAL_CORNERS",
    "OrderFn",
    "ScanPattern",
    "backwards",
    "both_ways",
    "checked_pattern",
    "column_major",
    "concatenated",
    "diagonal",
    "directions",
    "filled_up",
    "get_pattern",
    "hilbert",
    "local_windows",
    "mirrored",
    "raster",
    "reversed_order",
    "snake",
    "spiral",
    "stacked",
    "transposed",
    "turned",
    "windows",
]
