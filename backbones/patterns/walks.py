"""Facts about a walk over the grid: at which step it reaches each cell, and from which direction."""

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.patterns.known import known_tables
from backbones.patterns.pattern import ScanPattern

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
    rows, columns = (F.pad(x[:, 1:] - x[:, :-1], (1, 0)) for x in (orders // width, orders % width))
    vertical, horizontal = torch.where(rows < 0, UP, DOWN), torch.where(columns < 0, LEFT, RIGHT)
    codes = torch.where(rows != 0, vertical, horizontal)
    codes = torch.where(torch.arange(codes.shape[1], device=device) == 0, START, codes).gather(1, steps)
    return orders, steps.t().flatten(), codes.t().flatten()
