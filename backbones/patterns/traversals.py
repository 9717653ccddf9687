"""Traversals of a grid as functions of its ``(H, W)`` raster indices, and what makes new ones of them."""

from __future__ import annotations

import operator
from functools import partial, reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.patterns.pattern import OrderFn


def raster(grid: Tensor) -> Tensor:
    """Row by row, each from the left: step t is at (t // W, t % W)."""
    return grid.flatten()


def column_major(grid: Tensor) -> Tensor:
    """Column by column, each from the top: step t is at (t % H, t // H)."""
    return grid.t().flatten()


def snake(grid: Tensor) -> Tensor:
    """Row by row, every second one from the right: unit steps only (PlainMamba, arXiv 2403.17695)."""
    odd = torch.arange(grid.shape[0], device=grid.device)[:, None] % 2 == 1
    return torch.where(odd, grid.flip(1), grid).flatten()


def diagonal(grid: Tensor) -> Tensor:
    """JPEG's zigzag: anti-diagonals i + j = 0, 1, ...; even ones go up and right, odd ones down and left."""
    i, j = _rows_and_columns(grid)
    within = torch.where((i + j) % 2 == 0, j, i)
    return _sorted_by((i + j) * sum(grid.shape) + within, grid)


def spiral(grid: Tensor) -> Tensor:
    """Clockwise and inward from the top left corner. Every step is a unit step.

    Ring m = min(i, j, H-1-i, W-1-j) is the border of an h x w = (H-2m) x (W-2m) rectangle; it starts at step
    HW - hw.
    """
    i, j = _rows_and_columns(grid)
    height, width = grid.shape
    ring = torch.minimum(torch.minimum(i, height - 1 - i), torch.minimum(j, width - 1 - j))
    i, j, h, w = i - ring, j - ring, height - 2 * ring, width - 2 * ring
    bottom_or_left = torch.where(i == h - 1, (h - 1) + 2 * (w - 1) - j, 2 * (h - 1 + w - 1) - i)
    along_ring = torch.where((i == 0) | (j == w - 1), i + j, bottom_or_left)
    return _sorted_by(height * width - h * w + along_ring, grid)


def hilbert(grid: Tensor) -> Tensor:
    """A Hilbert-like curve on any rectangle, from (0, 0) to the far end of its longer side (a square's top).

    Every step is a unit step, but for one diagonal step where the longer side is odd and the shorter one
    even and above 2. The curve is a recursion on the sides: compilation specialises on them, dynamic export
    refuses.
    """
    height, width = map(operator.index, grid.shape)
    return grid.flatten()[torch.tensor(_hilbert_cells(height, width), device=grid.device)]


def windows(grid: Tensor, size: int) -> Tensor:
    """Square windows in raster order, and raster order inside each (LocalMamba, arXiv 2403.09338).

    The grid is padded at the bottom and right to whole windows: ceil(H / size) ceil(W / size) size^2 steps.
    """
    down, across = ((side + size - 1) // size for side in grid.shape)
    step = torch.arange(down * across * size**2, device=grid.device)
    window, inside = step // size**2, step % size**2
    return _cells_at(grid, window // across * size + inside // size, window % across * size + inside % size)


def _every_second(grid: Tensor, first_row: int, first_column: int) -> Tensor:
    down, across = ((side + 1) // 2 for side in grid.shape)
    step = torch.arange(down * across, device=grid.device)
    return _cells_at(grid, first_row + step // across * 2, first_column + step % across * 2)


def _rows_and_columns(grid: Tensor) -> tuple[Tensor, Tensor]:
    height, width = grid.shape
    return torch.arange(height, device=grid.device)[:, None], torch.arange(width, device=grid.device)[None]


def _sorted_by(key: Tensor, grid: Tensor) -> Tensor:
    return grid.flatten()[key.flatten().argsort()]


def _cells_at(grid: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """The grid's cells at these places, -1 below its last row and right of its last column."""
    height, width = grid.shape
    on_grid = (rows < height) & (columns < width)
    return torch.where(on_grid, grid[rows.clamp(max=height - 1), columns.clamp(max=width - 1)], -1)


@torch.compiler.assume_constant_result  # nothing to trace
def _hilbert_cells(height: int, width: int) -> list[int]:
    sides = (1, width, width, height) if width >= height else (width, height, 1, width)
    return _hilbert_walk(0, *sides)


def _hilbert_walk(start: int, a: int, len_a: int, b: int, len_b: int) -> list[int]:
    """Raster indices over a len_a x len_b rectangle, from ``start`` to the other end of its side along a.

    ``a`` and ``b`` are what one step along either side adds to a raster index.
    """
    if len_a == 1 or len_b == 1:
        return [start + a * s + b * t for s in range(len_a) for t in range(len_b)]
    if 2 * len_a > 3 * len_b:  # one half after the other
        half = _even_half(len_a)
        parts = [(start, a, half, b, len_b), (start + a * half, a, len_a - half, b, len_b)]
    else:  # out along b over half of a, along a, back along b
        half_a, half_b = len_a // 2, _even_half(len_b)
        parts = [
            (start, b, half_b, a, half_a),
            (start + b * half_b, a, len_a, b, len_b - half_b),
            (start + a * (len_a - 1) + b * (half_b - 1), -b, half_b, -a, len_a - half_a),
        ]
    return [cell for part in parts for cell in _hilbert_walk(*part)]


def _even_half(length: int) -> int:
    half = length // 2
    return half + 1 if half % 2 and length > 2 else half


# Combinators: partial objects of module-level functions, because closures cannot be pickled.


def reversed_order(order: OrderFn) -> OrderFn:
    """The same cells from last to first."""
    return partial(_reversed, order)


def transposed(order: OrderFn) -> OrderFn:
    """Rows and columns exchanged."""
    return partial(_transposed, order)


def mirrored(order: OrderFn) -> OrderFn:
    """Left and right exchanged."""
    return partial(_flipped, order, (1,))


def turned(order: OrderFn) -> OrderFn:
    """Turned by 180 degrees."""
    return partial(_flipped, order, (0, 1))


def concatenated(*orders: OrderFn) -> OrderFn:
    """One after the other as a single order: the state runs through the joints."""
    return partial(_concatenated, orders)


def stacked(*orders: OrderFn) -> OrderFn:
    """The ``(K, T)`` table of K orders of equal length."""
    return partial(_stacked, orders)


def filled_up(*orders: OrderFn) -> OrderFn:
    """The ``(K, T)`` table of K orders of any lengths: shorter ones end in padded slots."""
    return partial(_filled_up, orders)


def both_ways(*orders: OrderFn) -> OrderFn:
    """The table of these orders, followed by the reverse of each."""
    return partial(_both_ways, orders)


def _reversed(order: OrderFn, grid: Tensor) -> Tensor:
    return order(grid).flip(0)


def _transposed(order: OrderFn, grid: Tensor) -> Tensor:
    return order(grid.t())


def _flipped(order: OrderFn, dims: tuple[int, ...], grid: Tensor) -> Tensor:
    return order(grid.flip(dims))


def _concatenated(orders: tuple[OrderFn, ...], grid: Tensor) -> Tensor:
    return torch.cat([order(grid) for order in orders])


def _stacked(orders: tuple[OrderFn, ...], grid: Tensor) -> Tensor:
    cells = [order(grid) for order in orders]
    lengths = [x.shape[0] for x in cells]
    # Traced, sides may be dynamic, and to compare their lengths would fix them. The compiler calls those int, too.
    static = not torch.compiler.is_compiling() and all(isinstance(length, int) for length in lengths)
    if static and len(set(lengths)) > 1:
        raise ValueError(
            f"orders: got {', '.join(map(str, lengths))} steps on a {grid.shape[0]} x {grid.shape[1]} grid, "
            "expected as many of each order of a pattern"
        )
    return torch.stack(cells)


def _filled_up(orders: tuple[OrderFn, ...], grid: Tensor) -> Tensor:
    cells = [order(grid) for order in orders]
    lengths = [x.shape[0] for x in cells]
    if any(isinstance(length, Tensor) for length in lengths):  # under torch.jit.trace
        lengths = [int(length) for length in lengths]
    longest = reduce(torch.sym_max, lengths)
    return torch.stack([F.pad(x, (0, longest - length), value=-1) for x, length in zip(cells, lengths, strict=True)])


def _both_ways(orders: tuple[OrderFn, ...], grid: Tensor) -> Tensor:
    there = _stacked(orders, grid)
    return torch.cat([there, there.flip(1)])
