"""Facts about a table of orders that the kernels need, computed once per table."""

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from backbones.ops.scan.visits import Visits
from backbones.ops.tracing import identity

_known: dict[tuple, tuple[StorageWeakRef, Visits]] = {}


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
    key = (*identity(orders), length)
    if key in _known:
        reference, facts = _known[key]
        if not reference.expired():
            return facts
    if orders.is_cuda and torch.cuda.is_current_stream_capturing():
        return Visits(repeats=True, complete=False, disjoint=False, covers=False)
    for old in [old for old, (reference, _) in list(_known.items()) if reference.expired()]:
        _known.pop(old, None)
    facts = Visits.of(orders, length)
    _known[key] = StorageWeakRef(orders.untyped_storage()), facts
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
