"""Facts about a table of orders that a kernel needs before it runs."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Visits(NamedTuple):
    """How often the k orders of a table visit the tokens.

    ``repeats``: an order visits some token twice. ``complete``: every order visits every token (and none twice).
    ``disjoint``: no token is visited twice by all orders together; ``covers``: they visit every token between them.
    """

    repeats: bool
    complete: bool
    disjoint: bool
    covers: bool

    @classmethod
    def of(cls, orders: Tensor, length: int) -> Visits:
        """Counts the visits of ``orders`` (k, t) to ``length`` tokens; on a GPU this waits for the device.

        Raises:
            ValueError: a token is out of range.
        """
        low, high = (int(x) for x in torch.stack(torch.aminmax(orders)).tolist())
        if low < 0 or high >= length:
            found = low if low < 0 else high
            raise ValueError(f"orders: found token {found}, expected 0..{length - 1} (delta has {length} tokens)")
        k, t = orders.shape
        visits = torch.zeros(k, length, dtype=torch.int32, device=orders.device)
        visits.scatter_add_(1, orders.long(), torch.ones_like(orders, dtype=torch.int32))
        most, most_in_all, least_in_all = torch.stack([visits.max(), visits.sum(0).max(), visits.sum(0).min()]).tolist()
        repeats = most > 1
        return cls(repeats, not repeats and t == length, most_in_all == 1, least_in_all > 0)
