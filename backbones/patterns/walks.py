"""Facts about a walk over the grid: at which step it reaches each cell, and from which direction."""

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.patterns.known import known_tables
from backbones.patterns.pattern import ScanPattern
from backbones.patterns.subset import Subset

START, RIGHT, LEFT, UP, DOWN = range(5)


def walks(pattern: ScanPattern, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The orders (k, l) of a pattern that visits each cell once; and, flat, for each cell and order (l k) the step of
    the visit, and the direction of the move to it.

    Directions are codes: ``START``, ``RIGHT``, ``LEFT``, ``UP``, ``DOWN``. A move that changes row and column goes up
    or down. The tables are cached and shared: never modify them in place.
    """
    return _walks(pattern, height, width, device=device)


@known_tables
def _walks(pattern: ScanPattern, height: int, width: int, *, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    orders = pattern.orders(height, width, device)
    steps = orders.argsort(1)
    codes = _codes(orders, width).gather(1, steps)
    return orders, steps.t().flatten(), codes.t().flatten()


def subset_codes(subset: Subset, orders: Tensor) -> Tensor:
    """The direction of the move to each step, (b, k, l), from the token visited before it among those that are left."""
    b, k, length = orders.shape
    cells = subset.cells.unsqueeze(1).expand(b, k, -1).gather(2, orders)
    return _codes(cells.reshape(b * k, length), subset.grid[1]).view(b, k, length)


def _codes(cells: Tensor, width: int) -> Tensor:
    """The direction of the move to each of the cells (k, t) that walks visit."""
    rows, columns = (F.pad(x[:, 1:] - x[:, :-1], (1, 0)) for x in (cells // width, cells % width))
    vertical, horizontal = torch.where(rows < 0, UP, DOWN), torch.where(columns < 0, LEFT, RIGHT)
    codes = torch.where(rows != 0, vertical, horizontal)
    return torch.where(torch.arange(codes.shape[1], device=cells.device) == 0, START, codes)
