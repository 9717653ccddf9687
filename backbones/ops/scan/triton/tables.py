"""Facts about a table of orders that the kernels need, computed once per table."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from backbones.ops.scan.visits import Visits
from backbones.ops.tracing import identity
from backbones.ops.triton_host import is_capturing

_known: dict[tuple, tuple[StorageWeakRef, Any]] = {}


def order_facts(orders: Tensor | None, length: int, k: int) -> Visits:
    """Facts about ``orders`` (k, t) over ``length`` tokens; None is 0..length-1 for each of k orders.

    The first sight of a table waits for the device. It is remembered for as long as its storage lives unmodified. A
    table first seen during the capture of a CUDA graph, where nothing may wait, is taken to repeat and to skip
    tokens, which is right for any table, though slower, and its range is not checked.

    Raises:
        ValueError: a token is out of range.
    """
    if orders is None:
        return Visits(repeats=False, complete=True, disjoint=k == 1, covers=True)
    if is_capturing(orders):
        unknown = Visits(repeats=True, complete=False, disjoint=False, covers=False)
        return _found((Visits, length), orders, unknown)
    return _remembered((Visits, length), orders, lambda: Visits.of(orders, length))


def _found(kind: tuple, orders: Tensor, otherwise: Any) -> Any:
    """What is remembered of a table, or ``otherwise``."""
    reference, value = _known.get((*kind, *identity(orders)), (None, otherwise))
    return otherwise if reference is None or reference.expired() else value


def _remembered(kind: tuple, orders: Tensor, make: Callable[[], Any]) -> Any:
    """What is remembered of a table, else what ``make`` gives: for as long as the table's storage lives unmodified."""
    found = _found(kind, orders, None)
    if found is None:
        for old in [old for old, (reference, _) in list(_known.items()) if reference.expired()]:
            _known.pop(old, None)
        found = make()
        _known[(*kind, *identity(orders))] = StorageWeakRef(orders.untyped_storage()), found
    return found


def visits_of(orders: Tensor, length: int, per_order: bool) -> tuple[Tensor, Tensor]:
    """(visits, starts): the visits of token p are ``visits[starts[p] : starts[p + 1]]``, each as step * k + order.

    With ``per_order``, "token p" is p * k + order: every order has its own list. Remembered as `order_facts` are.
    """
    kind = ("visits", length, per_order)
    if is_capturing(orders):
        return _found(kind, orders, None) or _sorted_visits(orders, length, per_order)
    return _remembered(kind, orders, lambda: _sorted_visits(orders, length, per_order))


def _sorted_visits(orders: Tensor, length: int, per_order: bool) -> tuple[Tensor, Tensor]:
    k = orders.shape[0]
    tokens = orders.T.long()
    rows = length
    if per_order:
        tokens = tokens * k + torch.arange(k, device=orders.device)
        rows = length * k
    tokens, visits = torch.sort(tokens.flatten(), stable=True)
    starts = torch.searchsorted(tokens, torch.arange(rows + 1, device=orders.device))
    return visits.int(), starts.int()
