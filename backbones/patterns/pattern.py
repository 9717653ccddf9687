"""A pattern: a named set of traversals of any grid, with its tables and what is known of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from backbones.ops.scan.visits import Visits
from backbones.ops.tracing import has_static_value, is_exporting, is_traced, register_fake, statically_true, untraced
from backbones.patterns.known import CACHE, known_fact, known_tables

OrderFn = Callable[[Tensor], Tensor]
_CPU = torch.device("cpu")


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
        sequence: of orders along the sequence of tokens, 1 for each from the first to the last and -1 for each that
            goes back; None for orders of a grid. Along the sequence a class token is visited where it stands, in a grid
            at the middle step of each order.
    """

    name: str
    num_orders: int
    order_fn: OrderFn = field(repr=False)
    pad_to: int = 1
    sequence: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        checked_int("num_orders", self.num_orders)
        checked_int("pad_to", self.pad_to)

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
            ValueError: a side is not an integer or is below 1; an ``order_fn`` whose result does not have
                ``num_orders`` rows or, outside of compilation, names a cell that is not on the grid.
        """
        height, width = checked_int("height", height), checked_int("width", width)
        if pad_index is not None:
            pad_index = checked_int("pad_index", pad_index) if self.padded(height, width) else None
        # Opaque to compilers, which neither have to index along the orders' arithmetic nor do it at every call.
        if torch.compiler.is_compiling() and not is_exporting() and self._is_catalogued() and _static(height, width):
            like = torch.empty(0, device="cpu" if device is None else device)
            return torch.ops.backbones.scan_orders(like, self.name, height, width, pad_index)
        return _orders(self, height, width, pad_index, device=device)

    def visits(self, height: int, width: int) -> Visits | None:
        """Facts for ``selective_scan`` about ``orders(height, width, pad_index=height * width)``; None: unknown.

        The tokens are the cells and, on a grid that is `padded`, the zero token behind them. Found on the CPU once for
        each grid, also where a compiled program makes the orders at every call. None where a side is dynamic.

        Raises:
            ValueError: as `orders` does.
        """
        sides = checked_int("height", height), checked_int("width", width)
        # Where `torch.jit` traces, sides are tensors.
        if torch.jit.is_tracing() or not _static(*sides):  # type: ignore[attr-defined]
            return None
        return Visits(*self._visits(*sides))

    @torch.compiler.assume_constant_result
    def _visits(self, height: int, width: int) -> tuple[bool, ...]:
        return _visits(self, height, width)

    def tables(self, height: int, width: int, device: torch.device) -> tuple[Tensor, Visits | None, bool]:
        """``orders(height, width, device, pad_index=height * width)``, `visits` and `padded`, by one look into the
        cache.

        Raises:
            ValueError: as `orders` does.
        """
        if type(height) is int and type(width) is int and not is_traced():
            return CACHE.get((ScanPattern, self, height, width, device), lambda: self._tables(height, width, device))
        return self._tables(height, width, device)

    def _tables(self, height: int, width: int, device: torch.device) -> tuple[Tensor, Visits | None, bool]:
        orders = self.orders(height, width, device, pad_index=height * width)
        return orders, self.visits(height, width), self.padded(height, width)

    def visits_each_cell_once(self, height: int, width: int) -> bool | None:
        """Whether every order visits every cell once, padded slots aside; None: not known yet, see `visits`."""
        sides = checked_int("height", height), checked_int("width", width)
        if torch.jit.is_tracing() or not _static(*sides):  # type: ignore[attr-defined]
            return None
        return self._visits_each_cell_once(*sides)

    @torch.compiler.assume_constant_result
    def _visits_each_cell_once(self, height: int, width: int) -> bool:
        return _visits_each_cell_once(self, height, width)

    def shares_cells(self, height: int, width: int) -> bool | None:
        """Whether the orders share the cells among them: one order visits each, once. None: not known, see `visits`."""
        sides = checked_int("height", height), checked_int("width", width)
        return self._shares_cells(*sides) if _static(*sides) else None

    @torch.compiler.assume_constant_result
    def _shares_cells(self, height: int, width: int) -> bool:
        return _shares_cells(self, height, width)

    @torch.compiler.assume_constant_result
    def _is_catalogued(self) -> bool:
        return _named(self.name) is self

    def padded(self, height: int, width: int) -> bool:
        """Whether `orders` may hold padded slots on this grid (with dynamic sides: on some grid)."""
        sides = checked_int("height", height), checked_int("width", width)
        return not all(statically_true(side % self.pad_to == 0) for side in sides)


PATTERNS: dict[str, ScanPattern] = {}  # the catalogue, by name
COMPOSED: dict[str, ScanPattern] = {}  # what `catalogue.directions` made, by name


def _named(name: str) -> ScanPattern | None:
    return PATTERNS.get(name) or COMPOSED.get(name)


def _checked_name(name: str) -> ScanPattern:
    pattern = _named(name)
    assert pattern is not None
    return pattern


def _static(*sides: int) -> bool:
    return all(has_static_value(side) for side in sides)


def checked_int(name: str, value: int) -> int:
    if isinstance(value, Tensor) and torch.jit.is_tracing():  # where x.shape holds tensors
        value = int(value)
    if isinstance(value, torch.SymInt):
        return value
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise ValueError(f"{name} must be an integer of at least 1, got {value!r}")
    return value


@known_tables
def _orders(
    pattern: ScanPattern, height: int, width: int, pad_index: int | None, *, device: torch.device | str | None
) -> Tensor:
    table = pattern.order_fn(torch.arange(height * width, device=device).view(height, width))
    if table.ndim != 2 or table.shape[0] != pattern.num_orders or table.is_floating_point():
        raise ValueError(
            f"order_fn of pattern {pattern.name!r} must return integers of shape "
            f"({pattern.num_orders}, steps), got {table.dtype} of shape {tuple(table.shape)}"
        )
    if not is_traced():
        first, last = (-1 if pattern.padded(height, width) else 0), height * width - 1
        if int(table.min()) < first or int(table.max()) > last:
            raise ValueError(
                f"order_fn of pattern {pattern.name!r} (pad_to={pattern.pad_to}) must name cells "
                f"{first}..{last} of a {height} x {width} grid, got {int(table.min())}..{int(table.max())}"
            )
    table = table.to(torch.int32)
    return table if pad_index is None else table.masked_fill(table < 0, pad_index)


def _cached_orders(
    pattern: ScanPattern, height: int, width: int, pad_index: int | None, device: torch.device
) -> Tensor:
    return _orders.cached(pattern, height, width, pad_index, device=device)  # type: ignore[attr-defined]


@known_fact
def _visits(pattern: ScanPattern, height: int, width: int) -> tuple[bool, ...]:
    cells, padded = height * width, pattern.padded(height, width)
    table = _cached_orders(pattern, height, width, cells if padded else None, _CPU)
    return tuple(Visits.of(table, cells + padded))


@known_fact
def _visits_each_cell_once(pattern: ScanPattern, height: int, width: int) -> bool:
    return bool((_visits_of_cells(pattern, height, width) == 1).all())


@known_fact
def _shares_cells(pattern: ScanPattern, height: int, width: int) -> bool:
    return bool((_visits_of_cells(pattern, height, width).sum(0) == 1).all())


def _visits_of_cells(pattern: ScanPattern, height: int, width: int) -> Tensor:
    """How often each order visits each cell, (k, cells)."""
    cells = height * width
    table = _cached_orders(pattern, height, width, None, _CPU).long()
    counts = torch.zeros(pattern.num_orders, cells + 1, dtype=torch.int64)
    counts.scatter_add_(1, table.where(table >= 0, cells), torch.ones_like(table))
    return counts[:, :cells]


_library = torch.library.Library("backbones", "FRAGMENT")
_library.define(
    "scan_orders(Tensor like, str pattern, int height, int width, int? pad_index) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


@torch.library.impl(_library, "scan_orders", "CompositeExplicitAutograd")
def _(like: Tensor, pattern: str, height: int, width: int, pad_index: int | None) -> Tensor:
    # A copy, because compilers may write into what an operator gave them.
    return _cached_orders(_checked_name(pattern), height, width, pad_index, like.device).clone()


@register_fake(_library, "scan_orders")
def _(like: Tensor, pattern: str, height: int, width: int, pad_index: int | None) -> Tensor:
    with untraced():
        shape = _cached_orders(_checked_name(pattern), height, width, pad_index, _CPU).shape
    return like.new_empty(shape, dtype=torch.int32)
