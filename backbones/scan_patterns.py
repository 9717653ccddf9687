"""Scan patterns: in which order a state-space layer visits the cells of a grid.

An *order* is one traversal: the raster index ``i * width + j`` of the cell visited at each step. A
*pattern* is a set of K orders of equal length. An order may skip cells, repeat them, or hold -1 for a
*padded slot*: a step outside the grid, which reads zeros but still decays the state.

An order is written as a function of the grid, the ``(H, W)`` tensor of raster indices, that returns the
``(T,)`` cells in turn. So the same function on a transposed or flipped grid is another order: see
`transposed`, `mirrored`, `turned` and `reversed_order`. `concatenated` joins several into one long order;
`stacked` and `both_ways` make the ``(K, T)`` table of a pattern::

    zigzag_and_back = ScanPattern("zigzag_and_back", 2, both_ways(diagonal))
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.fx.experimental import symbolic_shapes
from torch.fx.experimental.symbolic_shapes import statically_known_true
from torch.utils._python_dispatch import _disable_current_modes

from backbones.ops.visits import Visits

OrderFn = Callable[[Tensor], Tensor]

# Older versions of PyTorch lack it, and cannot tell while they compile.
has_static_value = getattr(
    symbolic_shapes, "has_static_value", lambda side: isinstance(side, int) and not torch.compiler.is_compiling()
)


@dataclass(frozen=True)
class ScanPattern:
    """A named set of traversals of any grid. A plain sequence of L tokens is the grid ``(1, L)``.

    Args:
        name: what it is called in configs and messages.
        num_orders: K.
        order_fn: pure function from the grid, ``(H, W)`` int64 raster indices, to the ``(K, T)`` cells.
            Made of tensor operations it serves dynamic shapes too; made of module-level functions, as the
            combinators below leave it, it can be pickled.
        pad_to: sides are padded to multiples of this, at the bottom and right; only then may orders hold -1.
    """

    name: str
    num_orders: int
    order_fn: OrderFn = field(repr=False)
    pad_to: int = 1

    def __post_init__(self) -> None:
        _checked_int("num_orders", self.num_orders)
        _checked_int("pad_to", self.pad_to)

    def __deepcopy__(self, memo: dict) -> ScanPattern:
        return self  # immutable, and a copy would not share the cache

    def orders(
        self,
        height: int,
        width: int,
        device: torch.device | str | None = None,
        pad_index: int | None = None,
    ) -> Tensor:
        """The visited cells, ``(K, T)`` int32 on ``device`` (None: CPU).

        Padded slots are -1, or ``pad_index`` where given: ``height * width`` for a caller who appends one
        zero token to the flattened grid. The table is cached and shared: never modify it in place.

        Raises:
            ValueError: a side that is no integer or is below 1; an ``order_fn`` whose result does not have
                ``num_orders`` rows or, outside of compilation, names a cell that is not on the grid.
        """
        height, width = _checked_int("height", height), _checked_int("width", width)
        if pad_index is not None:
            pad_index = _checked_int("pad_index", pad_index) if self.padded(height, width) else None
        probe = torch.empty(0, device="cpu" if device is None else device)
        if is_traced(probe):
            # Opaque to compilers, which neither have to index along the orders' arithmetic nor do it at every call.
            if (
                torch.compiler.is_compiling()
                and not _is_exporting()
                and self._is_catalogued()
                and _static(height, width)
            ):
                return torch.ops.backbones.scan_orders(probe, self.name, height, width, pad_index)
            return _filled(_table(self, height, width, probe.device), pad_index)
        return _cached_table(self, height, width, probe.device, pad_index)

    def visits(self, height: int, width: int) -> Visits | None:
        """What ``selective_scan`` asks of ``orders(height, width, pad_index=height * width)``; None: not known yet.

        The tokens are the cells and, on a grid that is `padded`, the zero token behind them. Found on the CPU once for
        each grid, also where a compiled program makes the orders at every call. None where a side is dynamic.

        Raises:
            ValueError: as `orders` does.
        """
        sides = _checked_int("height", height), _checked_int("width", width)
        # Where `torch.jit` traces, sides are tensors.
        if torch.jit.is_tracing() or not _static(*sides):  # type: ignore[attr-defined]
            return None
        return Visits(*self._visits(*sides))

    @torch.compiler.assume_constant_result
    def _visits(self, height: int, width: int) -> tuple[bool, ...]:
        return _cached_visits(self, height, width)

    @torch.compiler.assume_constant_result
    def _is_catalogued(self) -> bool:
        return PATTERNS.get(self.name) is self

    def padded(self, height: int, width: int) -> bool:
        """Whether `orders` may hold padded slots on this grid (with dynamic sides: on some grid)."""
        sides = _checked_int("height", height), _checked_int("width", width)
        return not all(statically_known_true(side % self.pad_to == 0) for side in sides)


@torch.compiler.assume_constant_result  # traced, PyTorch's own is True whether one exports or not
def _is_exporting() -> bool:
    return getattr(torch.compiler, "is_exporting", lambda: True)()  # older versions of PyTorch cannot tell


def _static(*sides: int) -> bool:
    return all(has_static_value(side) for side in sides)


def _checked_int(name: str, value: int) -> int:
    if isinstance(value, Tensor) and torch.jit.is_tracing():  # where x.shape holds tensors
        value = int(value)
    if isinstance(value, torch.SymInt):
        return value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return value


def is_traced(tensor: Tensor) -> bool:
    """Whether tensors made now belong to a tracer or function transform, and must not outlive it."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()  # type: ignore[attr-defined]
        or type(tensor) is not Tensor
        or torch._C._functorch.is_functorch_wrapped_tensor(tensor)
    )


def _table(pattern: ScanPattern, height: int, width: int, device: torch.device) -> Tensor:
    table = pattern.order_fn(torch.arange(height * width, device=device).view(height, width))
    if table.ndim != 2 or table.shape[0] != pattern.num_orders or table.is_floating_point():
        raise ValueError(
            f"order_fn of pattern {pattern.name!r} must return integers of shape "
            f"({pattern.num_orders}, steps), got {table.dtype} of shape {tuple(table.shape)}"
        )
    return table.to(torch.int32)


def _filled(table: Tensor, pad_index: int | None) -> Tensor:
    return table if pad_index is None else table.masked_fill(table < 0, pad_index)


@lru_cache(maxsize=128)
def _cached_table(pattern: ScanPattern, height: int, width: int, device: torch.device, pad_index: int | None) -> Tensor:
    # A tensor made under inference_mode could not be saved for the backward pass of a later training step.
    with torch.inference_mode(False):
        table = _table(pattern, height, width, torch.device("cpu"))
        first, last = (-1 if pattern.padded(height, width) else 0), height * width - 1
        if int(table.min()) < first or int(table.max()) > last:
            raise ValueError(
                f"order_fn of pattern {pattern.name!r} (pad_to={pattern.pad_to}) must name cells "
                f"{first}..{last} of a {height} x {width} grid, got {int(table.min())}..{int(table.max())}"
            )
        return _filled(table, pad_index).to(device)


@contextmanager
def _untraced() -> Iterator[None]:
    """Tensors made within hold numbers, which those of a tracer do not."""
    with _disable_current_modes(), torch._C._DisableFuncTorch():
        yield


@lru_cache(maxsize=1024)
def _cached_visits(pattern: ScanPattern, height: int, width: int) -> tuple[bool, ...]:
    cells, padded = height * width, pattern.padded(height, width)
    with _untraced():
        table = _cached_table(pattern, height, width, torch.device("cpu"), cells if padded else None)
        return tuple(Visits.of(table, cells + padded))


_library = torch.library.Library("backbones", "FRAGMENT")
_library.define(
    "scan_orders(Tensor like, str pattern, int height, int width, int? pad_index) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(_library, "scan_orders", "CompositeExplicitAutograd")
def _(like: Tensor, pattern: str, height: int, width: int, pad_index: int | None) -> Tensor:
    # A copy, because compilers may write into what an operator gave them.
    return _cached_table(PATTERNS[pattern], height, width, like.device, pad_index).clone()


@torch.library.register_fake("backbones::scan_orders", lib=_library)
def _(like: Tensor, pattern: str, height: int, width: int, pad_index: int | None) -> Tensor:
    with _untraced():
        shape = _cached_table(PATTERNS[pattern], height, width, torch.device("cpu"), pad_index).shape
    return like.new_empty(shape, dtype=torch.int32)


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
    return torch.stack([order(grid) for order in orders])


def _both_ways(orders: tuple[OrderFn, ...], grid: Tensor) -> Tensor:
    there = _stacked(orders, grid)
    return torch.cat([there, there.flip(1)])


def local_windows(size: int) -> ScanPattern:
    """Windows row by row and column by column, both ways (K = 4), on the grid padded to whole windows."""
    order = partial(windows, size=_checked_int("size", size))
    return ScanPattern(f"local_windows_{size}", 4, both_ways(order, transposed(order)), pad_to=size)


FORWARD = ScanPattern("forward", 1, stacked(raster))
REVERSE = ScanPattern("reverse", 1, stacked(reversed_order(raster)))
BIDIRECTIONAL = ScanPattern("bidirectional", 2, both_ways(raster))  # Vim
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
# Turned, because the curve over a rectangle that is no square is its own transpose.
HILBERT = ScanPattern("hilbert", 4, both_ways(hilbert, turned(hilbert)))
LOCAL_WINDOWS_2 = local_windows(2)
LOCAL_WINDOWS_7 = local_windows(7)

PATTERNS = {
    pattern.name: pattern
    for pattern in (
        FORWARD, REVERSE, BIDIRECTIONAL, CROSS, ATROUS, MULTI_SCALE,
        SNAKE, DIAGONAL, SPIRAL, HILBERT, LOCAL_WINDOWS_2, LOCAL_WINDOWS_7,
    )
}  # fmt: skip


def get_pattern(name: str | ScanPattern) -> ScanPattern:
    """The catalogue's pattern of that name; a pattern is returned as it is.

    Raises:
        ValueError: no such pattern; the message offers near names.
    """
    if isinstance(name, ScanPattern):
        return name
    if name not in PATTERNS:
        near = get_close_matches(str(name), PATTERNS)
        offer = f"did you mean {' or '.join(map(repr, near))}?" if near else f"known: {', '.join(PATTERNS)}"
        raise ValueError(f"unknown scan pattern {name!r}; {offer}")
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
