"""What a scan must know of its walk over the grid at each cell: when it comes there, and from which direction."""

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.ops.tracing import is_traced
from backbones.patterns.pattern import ScanPattern

START, RIGHT, LEFT, UP, DOWN = range(5)


def walks(pattern: ScanPattern, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """The orders (k, l) of a pattern that visits each cell once; and, flat, for each cell and order (l k) the step of
    the visit, and the direction of the move to it.

    Directions are codes: ``START``, ``RIGHT``, ``LEFT``, ``UP``, ``DOWN``. A move that changes row and column goes up
    or down. The tables are cached and shared: never modify them in place.
    """
    make = _walks if is_traced() else _cached_walks
    return make(pattern, height, width, device)


def _walks(pattern: ScanPattern, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    orders = pattern.orders(height, width, device)
    steps = orders.argsort(1)
    rows, columns = (F.pad(x[:, 1:] - x[:, :-1], (1, 0)) for x in (orders // width, orders % width))
    vertical, horizontal = torch.where(rows < 0, UP, DOWN), torch.where(columns < 0, LEFT, RIGHT)
    codes = torch.where(rows != 0, vertical, horizontal)
    codes = torch.where(torch.arange(codes.shape[1], device=device) == 0, START, codes).gather(1, steps)
    return orders, steps.t().flatten(), codes.t().flatten()


@lru_cache(maxsize=128)
def _cached_walks(pattern: ScanPattern, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    # Tensors made under inference_mode could not be saved for the backward pass of a later training step.
    with torch.inference_mode(False):
        orders, steps, codes = _walks(pattern, height, width, torch.device("cpu"))
        return orders.to(device), steps.to(device), codes.to(device)
