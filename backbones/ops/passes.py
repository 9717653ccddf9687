"""Functions of tensors, recorded with their gradients from what autograd does: one node in its graph.

The forward pass is recorded while autograd looks on, and the backward pass when it is first asked for. From then on
neither Python nor autograd goes through the function again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from backbones.ops import recorded
from backbones.ops.derivatives import WAY_OUT
from backbones.ops.recorded import Recordings, below_autocast
from backbones.ops.recorder import BackwardRecorder, Program, Recorder
from backbones.ops.remember import remember
from backbones.ops.source import Packed
from backbones.ops.tracing import has_gradient_hooks, has_saved_tensor_hooks
from backbones.ops.triton_host import device_of, is_capturing, launches

Function = Callable[..., tuple[Tensor | None, ...]]
_ATTEMPTS = 3  # of which none may be followed by a backward pass


@dataclass(frozen=True, eq=False, slots=True)
class _Pair:
    """Programs of both passes.

    Attributes:
        forward: returns the outputs, and then what is saved.
        backward: of the gradients of the outputs that are differentiable, and of what is saved.
        packed: the same where some of it is packed.
        differentiable: for each output.
        learning: numbers of the tensors that have gradients.
    """

    forward: Program
    backward: Program
    packed: Program
    differentiable: tuple[bool, ...]
    learning: tuple[int, ...]


class Passes:
    """Of a function whose kernels have no second derivatives, by the kinds of its calls.

    Args:
        name: of an operator in it, for the message where second derivatives are asked for.
    """

    def __init__(self, name: str) -> None:
        self._name = name
        self._recordings = Recordings(closed=True)  # without gradients
        self._kinds: dict[Any, _Pair | int | None] = {}  # or how many calls there were, or None: never

    def call(self, function: Function, arguments: Sequence[Tensor], weights: Sequence[Tensor], *key: Any) -> Any:
        """``function(*arguments)``.

        Args:
            function: returns a tuple of tensors and None. What it does depends on nothing but the kinds of arguments
                and weights, the key, and tensors of integers that live longer than this.
            arguments: of the same dtypes, shapes and device at every call with the same key.
            weights: which the function finds by itself; likewise, contiguous.
            key: hashable.
        """
        tensors = (*arguments, *weights)
        learns = [x.requires_grad for x in tensors] if torch.is_grad_enabled() else ()
        if not any(learns):
            with device_of(tensors[0]):
                return self._recordings.call(lambda given, *_: function(*given[: len(arguments)]), tensors, *key)
        strides = tuple([x.stride() for x in arguments])
        kind = key, tuple(learns), strides, torch.are_deterministic_algorithms_enabled()
        found = self._kinds.get(kind, 0)
        if found is None or has_saved_tensor_hooks() or launches.listener is not None:
            return function(*arguments)
        if isinstance(found, _Pair):
            return _Recorded.apply(self._name, found, tensors, *[tensors[i] for i in found.learning])
        if is_capturing(tensors[0]) or any([has_gradient_hooks(x) for x in weights]):  # which would see gradients twice
            return function(*arguments)
        if found >= recorded.SEEN:
            self.settle(kind, found + 1 if found < recorded.SEEN + _ATTEMPTS else None)
            attempt = _Attempt(self, kind, function, arguments, weights, learns)
            return _Attempted.apply(self._name, attempt, *attempt.linked)
        if found < recorded.SEEN - 1:
            self.settle(kind, found + 1)
            return function(*arguments)
        # What reads other numbers has gradients elsewhere; what launches nothing of ours may be differentiated twice.
        with _without_cached_casts(), Recorder(tensors, closed=True) as trial:
            results = function(*arguments)
        fits = trial.is_closed and trial.has_launched and type(results) is tuple
        self.settle(kind, found + 1 if fits else None)
        return results

    def settle(self, kind: Any, found: _Pair | int | None) -> None:
        """What is known of a kind of calls."""
        remember(self._kinds, kind, found, recorded.MOST)


@contextmanager
def _without_cached_casts() -> Iterator[None]:
    """Autocast keeps copies of weights that were made before, which would look like other numbers."""
    cached = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(cached)


class _Attempt:
    """A call that is recorded; its gradients are those of autograd."""

    def __init__(
        self, passes: Passes, kind: Any, function: Function, arguments: Sequence[Tensor], weights: Sequence[Tensor],
        learns: Sequence[bool],
    ) -> None:  # fmt: skip
        self._passes, self._kind, self._function = passes, kind, function
        tensors = (*arguments, *weights)
        self._learning = [i for i, learn in enumerate(learns) if learn]
        self.linked = [tensors[i] for i in self._learning]
        self._leaves = [
            x.detach().requires_grad_(learn) for x, learn in zip(arguments, learns[: len(arguments)], strict=True)
        ]
        own = (*self._leaves, *weights)
        self._inputs = [own[i] for i in self._learning]
        self._recorder = Recorder(own, closed=True)

    def forward(self) -> list[Tensor | None]:
        """The outputs, as autograd knows them."""
        with _without_cached_casts(), torch.enable_grad(), device_of(self._leaves[0]), self._recorder:
            self._outputs = list(self._function(*self._leaves))
        return self._outputs

    def backward(self, grads: Sequence[Tensor]) -> list[Tensor | None]:
        """The gradients of `linked`; puts programs of both passes in place of the function."""
        differentiable = tuple([x is not None and x.requires_grad for x in self._outputs])
        outputs = [x for x in self._outputs if x is not None and x.requires_grad]
        given = [grad.contiguous() for grad, is_one in zip(grads, differentiable, strict=True) if is_one]
        recorder = BackwardRecorder(given, self._recorder)
        device = given[0].device.type
        with torch.autocast(device, enabled=False), device_of(given[0]), recorder:
            found = torch.autograd.grad(outputs, self._inputs, given, retain_graph=True, allow_unused=True)
        kept = [(i, x) for i, x in zip(self._learning, found, strict=True) if x is not None]
        programs = recorder.passes([x for _, x in kept], self._outputs)
        pair = None if programs is None else _Pair(*programs, differentiable, tuple([i for i, _ in kept]))
        self._passes.settle(self._kind, pair)
        return list(found)


class _Attempted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, name: str, attempt: _Attempt, *linked: Tensor) -> tuple[Tensor | None, ...]:
        outputs = [(x, None if x is None else x.detach()) for x in attempt.forward()]
        ctx.mark_non_differentiable(*[y for x, y in outputs if x is not None and not x.requires_grad])
        anchor: Any = torch.empty(0)
        anchor.attempt = attempt  # which lives as long as what is saved, and no longer
        ctx.name = name
        ctx.save_for_backward(*linked, anchor)
        return tuple([y for _, y in outputs])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second(ctx.name)
        *_, anchor = ctx.saved_tensors
        return None, None, *anchor.attempt.backward(grads)


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, name: str, pair: _Pair, tensors: Sequence[Tensor], *linked: Tensor
    ) -> tuple[Tensor | None, ...]:  # fmt: skip
        first = tensors[0]
        with device_of(first):
            found = below_autocast(first, pair.forward, tensors)
        count = len(pair.differentiable)
        outputs, saved = found[:count], found[count:]
        ctx.name, ctx.pair, ctx.is_packed = name, pair, bool(saved) and isinstance(saved[-1], Packed)
        ctx.save_for_backward(*(saved[:-1] if ctx.is_packed else saved))
        if not all(pair.differentiable):
            pairs = zip(outputs, pair.differentiable, strict=True)
            ctx.mark_non_differentiable(*[x for x, is_one in pairs if x is not None and not is_one])
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        _refuse_second(ctx.name)
        pair, saved = ctx.pair, ctx.saved_tensors
        given = [grad.contiguous() for grad, is_one in zip(grads, pair.differentiable, strict=True) if is_one]
        program = pair.packed if ctx.is_packed else pair.backward
        with device_of(given[0]):
            found = below_autocast(given[0], program, (*given, *saved))
        return None, None, None, *found


def _refuse_second(name: str) -> None:
    """Raises NotImplementedError where gradients are to be differentiated again: what they depend on is gone."""
    if torch.is_grad_enabled():
        raise NotImplementedError(f"{name}: this backend has no second derivatives (create_graph=True), {WAY_OUT}")
