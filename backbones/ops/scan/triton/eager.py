"""Scans in eager mode where nobody looks on: without the dispatcher, and from the third of a kind on, recorded."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from backbones.ops.recorded import Recordings
from backbones.ops.rows import PLAIN
from backbones.ops.scan import triton
from backbones.ops.scan.operator import Scan, gradients
from backbones.ops.scan.triton.tables import order_facts
from backbones.ops.scan.visits import Visits
from backbones.ops.tracing import is_watched
from backbones.ops.triton_host import device_of

Tensors = Sequence[Any]  # u, delta, A, B, C, D, orders, delta_bias and dt_weight, some of which may be None
_ORDERS, _DT_WEIGHT = 6, 8


class EagerScan:
    """Calls of one kind: with tensors of the same shapes, dtypes and device, which were checked once, and one set of
    options.

    Args:
        given: tensors as such a call is given them.
        brought: the same in the dtypes that the operator reads.
        delta_softplus: see :func:`backbones.ops.selective_scan`.
        out: see there.
        local_window: see there.
        visits: see there.
    """

    def __init__(
        self, given: Tensors, brought: Tensors, delta_softplus: bool, out: str, local_window: int,
        visits: Visits | None,
    ) -> None:  # fmt: skip
        pairs = enumerate(zip(given, brought, strict=True))
        self._casts = [(i, y.dtype) for i, (x, y) in pairs if x is not None and x.dtype != y.dtype]
        self._dtype = given[0].dtype
        self._options = delta_softplus, out, local_window
        _, self._length, self._k, _ = given[1].shape
        self._visits = order_facts(None, self._length, self._k) if given[_ORDERS] is None else visits
        self._recordings = Recordings()

    def __call__(self, given: Tensors) -> Tensor:
        """The scan's result, in the dtype of u."""
        tensors = [*given]
        for i, dtype in self._casts:
            tensors[i] = tensors[i].to(dtype)
        if self._visits is None:
            tensors[_ORDERS] = tensors[_ORDERS].contiguous()  # as it is looked up
        if torch.is_grad_enabled() and any([x is not None and x.requires_grad for x in tensors]):
            y = Scan.apply(self, *tensors)[0]
        else:
            y = self.forward(tensors, False)[0]
        return y if y.dtype == self._dtype else y.to(self._dtype)

    def forward(self, tensors: Tensors, save: bool) -> tuple[Tensor, ...]:
        """The result, and with ``save`` the states."""
        facts = self._facts(tensors)
        with device_of(tensors[0]):
            if not _is_recorded(tensors, facts):
                return self._forward(tensors, save, facts)
            return self._recordings.call(self._forward, tensors, save, facts)

    def backward(self, grad: Tensor, tensors: Tensors, states: Tensor) -> Sequence[Tensor | None]:
        """See :func:`backbones.ops.scan.operator.gradients`."""
        facts = self._facts(tensors)
        if torch.is_grad_enabled() or is_watched() or type(grad) not in PLAIN:
            options: Any = (*self._options, [*facts], "triton")
            return gradients(grad, tensors, states, *options)
        with device_of(grad):
            if not _is_recorded(tensors, facts):
                return self._backward((grad, *tensors, states), facts)
            return self._recordings.call(self._backward, (grad, *tensors, states), facts)

    def _facts(self, tensors: Tensors) -> Visits:
        return self._visits or order_facts(tensors[_ORDERS], self._length, self._k)

    def _forward(self, tensors: Tensors, save: bool, facts: Visits) -> tuple[Tensor, ...]:
        args: Any = (*tensors, *self._options, save, [*facts])
        found = triton.forward(*args)
        return found if save else found[:1]

    def _backward(self, tensors: Tensors, facts: Visits) -> tuple[Tensor | None, ...]:
        args: Any = (*tensors, *self._options, [*facts])
        found = triton.backward(*args)
        _, *given, _ = tensors
        with_gradients = [x for i, x in enumerate(given) if i != _ORDERS]
        return tuple([None if x is None else y for x, y in zip(with_gradients, found, strict=True)])


def _is_recorded(tensors: Tensors, facts: Visits) -> bool:
    """Not where what is done depends on the numbers in ``orders``, or on autocast, which products obey."""
    return not facts.repeats and tensors[_DT_WEIGHT] is None
