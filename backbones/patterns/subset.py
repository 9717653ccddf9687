"""Orders of the tokens that are left of a grid, image by image."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.patterns.known import known_tables
from backbones.patterns.pattern import ScanPattern


@dataclass(frozen=True)
class Subset:
    """Tokens of a grid that are left, as many in every image.

    Attributes:
        grid: rows and columns of the whole grid.
        cells: (b, patches) the raster index of each patch that is left, in ascending order.
        class_index: where a class token stands among the tokens, None without one.
    """

    grid: tuple[int, int]
    cells: Tensor
    class_index: int | None = None
    _orders: dict[ScanPattern, tuple[Tensor, Tensor]] = field(default_factory=dict, repr=False, compare=False)

    def orders(self, pattern: ScanPattern) -> tuple[Tensor, Tensor]:
        """The way of each order along the tokens, without those that are missing.

        Returns:
            The tokens at each step, (b, k, l), and the steps of each token, (b, k, l), its inverse. A class token takes
            the middle step; there are no padded slots.

        Raises:
            ValueError: an order does not visit each cell of the grid once.
        """
        if pattern not in self._orders:
            self._orders[pattern] = self._found(pattern)
        return self._orders[pattern]

    def _found(self, pattern: ScanPattern) -> tuple[Tensor, Tensor]:
        if pattern.visits_each_cell_once(*self.grid) is False:
            raise ValueError(
                f"pattern: {pattern.name!r} does not visit each cell of a {self.grid[0]} x {self.grid[1]} grid once, "
                "which an order of the tokens that are left needs"
            )
        whole = _steps(pattern, *self.grid, device=self.cells.device)
        orders = whole[:, self.cells].transpose(0, 1).argsort(-1)
        if self.class_index is not None:
            patches = orders.shape[-1]
            orders = orders + (orders >= self.class_index)
            token = torch.full_like(orders[..., :1], self.class_index)
            orders = torch.cat([orders[..., : patches // 2], token, orders[..., patches // 2 :]], dim=-1)
        return orders, orders.argsort(-1)

    def placed(self, x: Tensor) -> Tensor:
        """Patches (b, patches, c) on the grid, (b, height, width, c), and zeros where none is left."""
        (height, width), (batch, _, channels) = self.grid, x.shape
        whole = x.new_zeros(batch, height * width, channels)
        return whole.scatter(1, self.cells.unsqueeze(-1).expand_as(x), x).unflatten(1, (height, width))

    def taken(self, x: Tensor) -> Tensor:
        """The patches that are left, (b, patches, c), of a map (b, height, width, c)."""
        return tokens_at(x.flatten(1, 2), self.cells)


def tokens_at(x: Tensor, index: Tensor) -> Tensor:
    """Tokens (b, m, c) of x (b, l, c) by the indices (b, m) of each image."""
    first = torch.arange(x.shape[0], device=x.device).unsqueeze(1) * x.shape[1]
    return x.flatten(0, 1).index_select(0, (index + first).flatten()).unflatten(0, index.shape)


def in_step_order(x: Tensor, orders: Tensor) -> Tensor:
    """Tokens (b, l, c) as each order (b, k, t) meets them, (b, t, k, c)."""
    order = orders.transpose(1, 2)
    return tokens_at(x, order.flatten(1)).unflatten(1, order.shape[1:])


def in_token_order(y: Tensor, steps: Tensor) -> Tensor:
    """Steps (b, t, k, c) of each order as the tokens that they visited, (b, l, k, c); ``steps`` is (b, k, l)."""
    k = y.shape[2]
    index = steps.transpose(1, 2) * k + torch.arange(k, device=y.device)
    return tokens_at(y.flatten(1, 2), index.flatten(1)).unflatten(1, index.shape[1:])


@known_tables
def _steps(pattern: ScanPattern, height: int, width: int, *, device: torch.device) -> Tensor:
    """The step at which each order comes to each cell, (k, cells)."""
    orders = pattern.orders(height, width, device).long()
    cells = height * width
    slots = orders.masked_fill(orders < 0, cells)
    step = torch.arange(orders.shape[1], device=device).expand_as(slots)
    return torch.zeros_like(F.pad(orders[:, :1], (0, cells))).scatter(1, slots, step)[:, :cells]
