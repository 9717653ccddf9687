"""Scan orders as arrows on a grid."""

from __future__ import annotations

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap

from backbones.patterns import ScanPattern, get_pattern

_GAP = 1.0  # between two grids, in cells
_STEPS = ListedColormap(colormaps["plasma"](np.linspace(0, 0.85, 256)))  # its yellow end is lost on white


def draw_orders(pattern: ScanPattern | str, height: int, width: int, ax: Axes) -> None:
    """Draws every order of a pattern on a grid of its own, side by side in ``ax``, at most four in a row.

    Arrows run from dark (first step) to bright (last). A disc marks the first cell, a square the last. Dotted lines are
    jumps, dashed ones pass through padded slots, which lie outside the grid; grey cells are never visited. Where an
    order comes back to a cell, that visit is drawn a little below and to the right.

    Args:
        pattern: a pattern, or the name of one in the catalogue.
        height: rows of the grid, in cells.
        width: columns of the grid, in cells.
        ax: loses its own axes; a figure of 2.2 x 2.4 inches for each grid of 7 x 7 is readable.

    Raises:
        ValueError: no such pattern, or a side below 1.
    """
    pattern = get_pattern(pattern)
    orders = pattern.orders(height, width).numpy()
    columns = min(len(orders), 4)
    rows = -(-len(orders) // columns)
    for k, order in enumerate(orders):
        origin = np.array([k % columns * (width + _GAP), k // columns * (height + 2 * _GAP)])
        _draw_order(order, height, width, origin, ax)
        if len(orders) > 1:
            ax.text(
                origin[0] + (width - 1) / 2,
                origin[1] - 0.75,
                f"order {k + 1}",
                ha="center",
                va="bottom",
                fontsize=8,
                color="0.3",
            )
    ax.set(
        aspect="equal",
        xlim=(-0.7, columns * (width + _GAP) - _GAP - 0.3),
        ylim=(rows * (height + 2 * _GAP) - 2 * _GAP - 0.3, -0.7 - _GAP * (len(orders) > 1)),
    )
    ax.axis("off")


def _draw_order(order: np.ndarray, height: int, width: int, origin: np.ndarray, ax: Axes) -> None:
    steps = np.flatnonzero(order >= 0)
    cells = order[steps]
    visited = np.isin(np.arange(height * width), cells).reshape(height, width)
    ax.pcolormesh(
        origin[0] - 0.5 + np.arange(width + 1), origin[1] - 0.5 + np.arange(height + 1), visited,
        cmap=ListedColormap(["0.86", "white"]), vmin=0, vmax=1, edgecolors="0.8", linewidth=0.6,
    )  # fmt: skip
    if not len(steps):  # as one of the atrous orders on a grid of one row
        return
    visits = _visit_numbers(cells)
    shift = 0.5 / (visits.max() + 1) * (visits - visits.max() / 2)
    points = origin + np.stack([cells % width, cells // width], 1) + shift[:, None]  # (steps, 2): x, y
    colors = _STEPS(steps / max(len(order) - 1, 1))

    moves = np.diff(points, axis=0)
    lengths = np.hypot(*moves.T)
    padded = np.diff(steps) > 1
    jumps = ~padded & (lengths > 1.5 * max(np.median(lengths), 1)) if len(lengths) else padded
    walks = ~padded & ~jumps
    segments = np.stack([points[:-1], points[1:]], 1)
    for chosen, style in ((jumps, ":"), (padded, (0, (4, 2)))):
        ax.add_collection(
            LineCollection(list(segments[chosen]), colors=colors[1:][chosen], linestyles=[style], linewidths=1)
        )
    ax.quiver(
        *points[:-1][walks].T, *moves[walks].T, color=colors[1:][walks],
        angles="xy", units="xy", scale_units="xy", scale=1, width=0.07, headwidth=4, headlength=4, headaxislength=3.6,
    )  # fmt: skip
    ax.scatter(points[0, 0], points[0, 1], s=34, color=colors[0], zorder=3)
    ax.scatter(
        points[-1, 0], points[-1, 1], s=62, facecolor="none", edgecolor=colors[-1], marker="s", linewidth=1.8, zorder=3
    )


def _visit_numbers(cells: np.ndarray) -> np.ndarray:
    """How many times each step's cell was visited before."""
    by_cell = np.argsort(cells, kind="stable")
    _, first, counts = np.unique(cells[by_cell], return_index=True, return_counts=True)
    numbers = np.empty(len(cells), dtype=int)
    numbers[by_cell] = np.arange(len(cells)) - np.repeat(first, counts)
    return numbers
