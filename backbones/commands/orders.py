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


def count_grids(pattern: ScanPattern | str, height: int, width: int) -> int:
    """How many grids :func:`draw_orders` draws: one for each walk of each order."""
    return sum(len(_walks(order)) for order in get_pattern(pattern).orders(height, width).numpy())


def draw_orders(pattern: ScanPattern | str, height: int, width: int, ax: Axes) -> None:
    """Draws every order of a pattern on a grid of its own, side by side in ``ax``, at most four in a row.

    Arrows run from dark (first step) to bright (last). A disc marks the first cell, a square the last. Dotted lines are
    jumps, dashed ones pass through padded slots, which lie outside the grid; grey cells are never visited. An order
    that comes back to a cell goes on in another grid, and its colours run on.

    Args:
        pattern: a pattern, or the name of one in the catalogue.
        height: rows of the grid, in cells.
        width: columns of the grid, in cells.
        ax: loses its own axes; a figure of 2.2 x 2.4 inches for each grid of 7 x 7 is readable.

    Raises:
        ValueError: no such pattern, or a side below 1.
    """
    orders = get_pattern(pattern).orders(height, width).numpy()
    grids = [(k, steps) for k, order in enumerate(orders) for steps in _walks(order)]
    columns = min(len(grids), 4)
    rows = -(-len(grids) // columns)
    for number, (k, steps) in enumerate(grids):
        origin = np.array([number % columns * (width + _GAP), number // columns * (height + 2 * _GAP)])
        _draw_walk(orders[k], steps, height, width, origin, ax)
        titles = [f"order {k + 1}"] if len(orders) > 1 else []
        if sum(other == k for other, _ in grids) > 1:
            titles.append(f"steps {steps[0] + 1} to {steps[-1] + 1}")
        if titles:
            ax.text(
                origin[0] + (width - 1) / 2,
                origin[1] - 0.75,
                ", ".join(titles),
                ha="center",
                va="bottom",
                fontsize=8,
                color="0.3",
            )
    ax.set(
        aspect="equal",
        xlim=(-0.7, columns * (width + _GAP) - _GAP - 0.3),
        ylim=(rows * (height + 2 * _GAP) - 2 * _GAP - 0.3, -0.7 - _GAP * (len(grids) > 1)),
    )
    ax.axis("off")


def _walks(order: np.ndarray) -> list[np.ndarray]:
    """The steps of an order that lie on the grid, cut before each that would come to a cell for the second time."""
    steps = np.flatnonzero(order >= 0)
    cuts: list[int] = []
    seen: set[int] = set()
    for number, cell in enumerate(order[steps].tolist()):
        if cell in seen:
            cuts.append(number)
            seen.clear()
        seen.add(cell)
    return np.split(steps, cuts)


def _draw_walk(order: np.ndarray, steps: np.ndarray, height: int, width: int, origin: np.ndarray, ax: Axes) -> None:
    visited = np.isin(np.arange(height * width), order).reshape(height, width)
    ax.pcolormesh(
        origin[0] - 0.5 + np.arange(width + 1), origin[1] - 0.5 + np.arange(height + 1), visited,
        cmap=ListedColormap(["0.86", "white"]), vmin=0, vmax=1, edgecolors="0.8", linewidth=0.6,
    )  # fmt: skip
    if not len(steps):  # as one of the atrous orders on a grid of one row
        return
    cells = order[steps]
    points = origin + np.stack([cells % width, cells // width], 1)  # (steps, 2): x, y
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
