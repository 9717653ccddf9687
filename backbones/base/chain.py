"""Blocks behind one another, of which each leaves its last residual sum to the norm that comes next.

The sum and the norm are one pass through memory, and so are their gradients, with the conversion for the branch.
"""

import functools
from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from backbones.layers.line import kind_of_call, steps_of
from backbones.layers.recorded import run_recorded
from backbones.ops.tracing import is_hooked, is_replaced, runs_eagerly

_PARTS = {"forward", "branch", "join"}  # of which ``chained`` is another form


def can_chain(blocks: Iterable[nn.Module], x: Tensor) -> bool:
    """Whether :func:`run_chain` computes what calls of the blocks would: in eager mode, if all have a method
    ``chained``, and nothing else stands for their ``forward`` or waits for their outputs.
    """
    if not isinstance(x, Tensor) or not runs_eagerly(x):
        return False
    return all([_is_as_written(block) for block in blocks])


def run_chain(blocks: Iterable[Any], x: Tensor, *args: Any) -> tuple[Tensor, Tensor | None]:
    """``x = block(x, *args)`` for all blocks: the result is the sum of both tensors, or the first one.

    ``block.chained(x, pending, *args)`` returns such a pair for x + pending (x where that is None). Where its class has
    a method ``line`` beside it, ``block.line(x, pending, *args)`` is first asked for the same as one line of steps.
    """
    pending: Tensor | None = None
    kind = None
    for block in blocks:
        cls: Any = type(block)
        steps = None
        if _has_line(cls):
            kind = kind or kind_of_call(x, pending, *args)
            steps = steps_of(block, kind, x, pending, *args)
        if steps is None:
            x, pending = run_recorded(block.chained, block, x, pending, *args)
            kind = None
        else:  # what comes out of them is of the same kind
            x, pending = steps.run(x, pending)
    return x, pending


def _is_as_written(block: nn.Module) -> bool:
    kind: Any = type(block)
    return _has_chained(kind) and not is_replaced(block) and not is_hooked(block)


@functools.cache
def _has_chained(kind: Any) -> bool:
    """Whether ``chained`` was written for the ``forward`` that the class has, not for that of a base class."""
    for base in kind.__mro__:
        if "chained" in vars(base):
            return True
        if _PARTS & vars(base).keys():
            return False
    return False


@functools.cache
def _has_line(kind: Any) -> bool:
    """Whether ``line`` was written for the ``chained`` that the class has, not for that of a base class."""
    written = next(base for base in kind.__mro__ if "chained" in vars(base))
    return "line" in vars(written)
