"""Operations on tensors that are recorded, and from then on run without what the host decides between them.

Between the launches of a block stand shapes, strides, choices among kernels and keys of what was compiled. For tensors
of one kind all of it comes out the same at every call, and takes the host longer than the launches do. A recording is
what remains: allocations, PyTorch's operations and launches, written down as the source of a Python function.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from backbones.ops.recorder import Program, Recorder, Tensors
from backbones.ops.remember import remember
from backbones.ops.triton_host import is_capturing, launches

MOST = 16  # kinds of calls, after which all begin anew: images may be of ever new sizes
SEEN = 2  # calls of a kind before its recording, which the next thirty make up for


class Recordings:
    """Of functions of tensors, by the kinds of their calls.

    Args:
        closed: functions read no floating-point numbers but their arguments; what does otherwise is not recorded.
    """

    def __init__(self, closed: bool = False) -> None:
        self._closed = closed
        self._kinds: dict[Any, Program | int | None] = {}  # the recording, how many calls there were, or None: never

    def call(
        self, function: Callable[..., tuple[Tensor | None, ...]], tensors: Tensors, *key: Any,
        packs: int | None = None, seen: int | None = None,
    ) -> tuple[Any, ...]:  # fmt: skip
        """``function(tensors, *key)``, by its recording once there is one.

        Args:
            function: returns a tuple of tensors; None may stand there and among the arguments. What it does depends on
                nothing but the kinds of the tensors, the key, and tensors that live longer than the recordings.
            tensors: of the same dtypes, shapes and device at every call with the same key; strides are looked at here.
                The first is one.
            key: hashable.
            packs: results from this one on may be packed: then None stands in their places, and behind all results come
                a tensor that holds them, and a :class:`Packed` that knows where.
            seen: how many calls of a kind there are before the one that is recorded, else `SEEN`.
        """
        if launches.listener is not None:  # a program within a recording would not be in it
            return function(tensors, *key)
        seen = SEEN if seen is None else seen
        strides = tuple([None if x is None else x.stride() for x in tensors])
        kind = (function.__name__, key, strides, packs, torch.are_deterministic_algorithms_enabled())
        found = self._kinds.get(kind, 0)
        first: Any = tensors[0]
        if callable(found):
            return below_autocast(first, found, tensors)
        if found == seen and not is_capturing(first):  # whose tables of orders would be made anew at every call
            tensors = _distinct(tensors)
            with Recorder(tensors, self._closed) as recorder:
                results = function(tensors, *key)
            remember(self._kinds, kind, recorder.program(results, packs), MOST)
            return results
        if found is not None and found < seen:
            remember(self._kinds, kind, found + 1, MOST)
        return function(tensors, *key)


def below_autocast(first: Tensor, program: Program, tensors: Tensors) -> tuple[Any, ...]:
    """``program(*tensors)``, whose calls are what autocast made of others, on the device of ``first``."""
    device = first.device.type
    if not torch.is_autocast_enabled(device):
        return program(*tensors)
    torch.set_autocast_enabled(device, False)
    try:
        return program(*tensors)
    finally:
        torch.set_autocast_enabled(device, True)


def _distinct(tensors: Tensors) -> list[Tensor | None]:
    """The same, of which none is there twice: at another call it may be two tensors."""
    seen: set[int] = set()
    found: list[Tensor | None] = []
    for x in tensors:
        found.append(x.detach() if x is not None and id(x) in seen else x)
        seen.add(id(x))
    return found
