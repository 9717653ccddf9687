"""What the kernels must know about a table of orders, found once per table."""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass
class OrderFacts:
    """``repeats``: an order visits some token twice. ``complete``: every order visits every token (and none twice).

    ``disjoint``: no token is visited twice by all orders together; ``covers``: they visit every token between them.
    """

    repeats: bool
    complete: bool
    disjoint: bool
    covers: bool


_known: dict[tuple, tuple[StorageWeakRef, OrderFacts]] = {}


def order_facts(orders: Tensor | None, length: int, k: int) -> OrderFacts:
    """Facts about ``orders`` (k, t) over ``length`` tokens; None is 0..length-1 for each of k orders.

    The first sight of a table waits for the device. It is remembered for as long as its storage lives unmodified. A
    table first seen during the capture of a CUDA graph, where nothing may wait, is taken to repeat and to skip
    tokens, which is right for any table, though slower, and its range is not checked.

    Raises:
        ValueError: a token is out of range.
    """
    if orders is None:
        return OrderFacts(repeats=False, complete=True, disjoint=k == 1, covers=True)
    storage = orders.untyped_storage()
    version = 0 if orders.is_inference() else orders._version
    key = (storage._cdata, orders.storage_offset(), tuple(orders.shape), version, length)
    if key in _known:
        reference, facts = _known[key]
        if not reference.expired():
            return facts
    if orders.is_cuda and torch.cuda.is_current_stream_capturing():
        return OrderFacts(repeats=True, complete=False, disjoint=False, covers=False)
    for old in [old for old, (reference, _) in list(_known.items()) if reference.expired()]:
        _known.pop(old, None)
    facts = _inspect(orders, length)
    _known[key] = StorageWeakRef(storage), facts
    return facts


def visits_of(orders: Tensor, length: int, per_order: bool) -> tuple[Tensor, Tensor]:
    """(visits, starts): the visits of token p are ``visits[starts[p] : starts[p + 1]]``, each as step * k + order.

    With ``per_order``, "token p" is p * k + order: every order has its own list.
    """
    k = orders.shape[0]
    tokens = orders.T.long()
    rows = length
    if per_order:
        tokens = tokens * k + torch.arange(k, device=orders.device)
        rows = length * k
    tokens, visits = torch.sort(tokens.flatten(), stable=True)
    starts = torch.searchsorted(tokens, torch.arange(rows + 1, device=orders.device))
    return visits.int(), starts.int()


def _inspect(orders: Tensor, length: int) -> OrderFacts:
    low, high = (int(x) for x in torch.stack(torch.aminmax(orders)).tolist())
    if low < 0 or high >= length:
        found = low if low < 0 else high
        raise ValueError(f"orders: found token {found}, expected 0..{length - 1} (delta has {length} tokens)")
    k, t = orders.shape
    visits = torch.zeros(k, length, dtype=torch.int32, device=orders.device)
    visits.scatter_add_(1, orders.long(), torch.ones_like(orders))
    most, most_in_all, least_in_all = torch.stack([visits.max(), visits.sum(0).max(), visits.sum(0).min()]).tolist()
    repeats = most > 1
    return OrderFacts(repeats, not repeats and t == length, most_in_all == 1, least_in_all > 0)
