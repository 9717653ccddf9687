"""Orders of a grid as orders of the tokens of a plain model, among which a class token may stand."""

import torch
from torch import Tensor

from backbones.patterns.known import known_tables
from backbones.patterns.pattern import ScanPattern
from backbones.patterns.taps import causal_taps


@known_tables
def token_tables(
    pattern: ScanPattern, height: int, width: int, tokens: int, num_taps: int, *, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """The orders (k, t) of ``tokens`` tokens, and both tables of causal convolutions along them.

    The tokens are the cells of the grid in raster order, and a class token in their middle where there is one more.
    Each order's padded slots are tokens behind them, which no tap reads. The tables are cached and shared: never modify
    them in place.
    """
    orders = _token_orders(pattern, height, width, tokens, device)
    taps, inverse_taps = causal_taps(orders, num_taps)
    return orders, taps.masked_fill(taps >= tokens, -1), inverse_taps[:, :, :tokens]


def _token_orders(pattern: ScanPattern, height: int, width: int, tokens: int, device: torch.device) -> Tensor:
    if pattern.sequence is not None:
        return pattern.orders(1, tokens, device)
    cells = height * width
    orders = pattern.orders(height, width, device)
    if tokens != cells:
        middle = cells // 2
        orders = orders + (orders >= middle).to(orders.dtype)
        class_token = orders.new_full((orders.shape[0], 1), middle)
        orders = torch.cat([orders[:, :middle], class_token, orders[:, middle:]], dim=1)
    if pattern.padded(height, width):
        slots = orders < 0
        orders = torch.where(slots, tokens - 1 + slots.cumsum(1), orders).int()
    return orders
