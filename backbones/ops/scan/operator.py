"""The ``torch.library`` operator through which every backend of the scan is reached.

One forward and one backward operator serve all backends (the name is an argument), so that shapes, gradients
and FLOPs are stated once, and ``torch.compile``, ``torch.export`` and ``FlopCounterMode`` see one node
instead of a loop.

A backend is a module with three functions, called with checked and normalised tensors (see
``backbones.ops.selective_scan``):

``states_shape(b, t, k, c, n)``
    Shape of the float32 states that its forward keeps for its backward.
``forward(u, delta, A, B, C, D, orders, delta_bias, dt_weight, delta_softplus, out, local_window, save, visits)``
    (y, states); ``states`` has no elements unless ``save`` is set.
``backward(grad, u, delta, A, B, C, D, orders, delta_bias, dt_weight, states, delta_softplus, out, local_window,
visits)``
    Gradients of u, delta, A, B, C, D, delta_bias, dt_weight; the last three have no elements where the argument
    is None.
"""

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, shape_wrapper

from backbones.ops.derivatives import first_order
from backbones.ops.scan import cpu, naive, triton
from backbones.ops.tracing import below_autograd, is_watched, register_fake

_MODULES: dict[str, ModuleType] = {"naive": naive, "cpu": cpu, "triton": triton}


def output_shape(out: str, b: int, length: int, steps: int, k: int, c: int) -> tuple[int, ...]:
    """Shape of the result, by ``out``."""
    return {"sum": (b, length, c), "per_order": (b, length, k, c), "per_step": (b, steps, k, c)}[out]


_TENSORS = (
    "Tensor u, Tensor delta, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? orders, Tensor? delta_bias, "
    "Tensor? dt_weight"
)
_OPTIONS = "bool delta_softplus, str out, int local_window"
_TENSOR_NAMES = ("u", "delta", "A", "B", "C", "D", "orders", "delta_bias", "dt_weight")
_WITH_GRADIENTS = ("u", "delta", "A", "B", "C", "D", "delta_bias", "dt_weight")  # in the order of the gradients


# `torch.library.custom_op` would do the same, but looks for aliases in every call: 10 microseconds, forward alone.
_library = torch.library.Library("backbones", "FRAGMENT")
_library.define(
    f"selective_scan({_TENSORS}, {_OPTIONS}, bool save, bool[]? visits, str backend) -> (Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    f"selective_scan_backward(Tensor grad, {_TENSORS}, Tensor states, {_OPTIONS}, bool[]? visits, str backend)"
    " -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)",
    tags=torch.Tag.pt2_compliant_tag,
)
scan_op = torch.ops.backbones.selective_scan.default
scan_backward_op = torch.ops.backbones.selective_scan_backward.default


@torch.library.impl(_library, "selective_scan", "CompositeExplicitAutograd")
def _forward(*args):  # type: ignore[no-untyped-def]
    return _MODULES[args[-1]].forward(*args[:-1])


@torch.library.impl(_library, "selective_scan_backward", "CompositeExplicitAutograd")
def _backward(*args):  # type: ignore[no-untyped-def]
    return _MODULES[args[-1]].backward(*args[:-1])


@register_fake(_library, "selective_scan")
def _(u, delta, A, B, C, D, orders, delta_bias, dt_weight, delta_softplus, out, local_window, save, visits, backend):  # type: ignore
    b, length = delta.shape[:2]
    k, c, n = A.shape
    t = length if orders is None else orders.shape[1]
    shape = output_shape(out, b, length, t, k, c)
    states = _MODULES[backend].states_shape(b, t, k, c, n) if save else (0,)
    return u.new_empty(shape), u.new_empty(states, dtype=torch.float32)


@register_fake(_library, "selective_scan_backward")
def _(grad, u, delta, A, B, C, D, orders, delta_bias, dt_weight, states, *options):  # type: ignore[no-untyped-def]
    return tuple(
        states.new_empty(0) if x is None else torch.empty_like(x, memory_format=torch.contiguous_format)
        for x in (u, delta, A, B, C, D, delta_bias, dt_weight)
    )


class Scan(torch.autograd.Function):
    """Every scan with gradients, by what runs its two passes: a call of the operator, or another class with the methods
    of `_Call`. Returns what its forward pass does.
    """

    # `register_autograd` would do the same, but its time grows with the square of the number of arguments.

    @staticmethod
    def forward(ctx: Any, scan: Any, *tensors: Tensor | None) -> tuple[Tensor, Tensor]:
        y, states = scan.forward(tensors, True)
        ctx.scan = scan
        ctx.save_for_backward(*tensors, states)
        ctx.set_materialize_grads(False)
        return y, states

    @staticmethod
    def backward(ctx: Any, grad: Tensor | None, _grad_states: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:  # nobody reads y
            return (None,) * len(ctx.needs_input_grad)
        *tensors, states = ctx.saved_tensors
        found = dict(zip(_WITH_GRADIENTS, ctx.scan.backward(grad, tensors, states), strict=True))
        given = zip(_TENSOR_NAMES, tensors, strict=True)
        return None, *[None if x is None else found.get(name) for name, x in given]


class _Call:
    """One call of the operator, with the keys that the dispatcher has left for it."""

    def __init__(self, keys: Any, options: Sequence[Any]) -> None:
        self._keys, self._options = keys, options

    def forward(self, tensors: Sequence[Tensor | None], _save: bool) -> tuple[Tensor, Tensor]:
        return below_autograd(scan_op, _forward, self._keys, *tensors, *self._options)

    def backward(self, grad: Tensor, tensors: Sequence[Tensor | None], states: Tensor) -> Sequence[Tensor]:
        delta_softplus, out, local_window, _, visits, backend = self._options
        return gradients(grad, tensors, states, delta_softplus, out, local_window, visits, backend)


def gradients(
    grad: Tensor, tensors: Sequence[Tensor | None], states: Tensor, delta_softplus: bool, out: str, local_window: int,
    visits: list[bool] | None, backend: str,
) -> Sequence[Tensor]:  # fmt: skip
    """Those of `_WITH_GRADIENTS`; the last three are anything where the tensor is None.

    Raises:
        NotImplementedError: second derivatives, of another backend than "naive".
    """
    args: Any = (grad, *tensors, states, delta_softplus, out, local_window, visits)
    if backend == "naive":  # autograd's own gradient, which does not run inside of an operator
        return naive.backward(*args)
    run = scan_backward_op if torch.is_grad_enabled() or is_watched() else _backward
    return first_order("selective_scan", run(*args, backend), (grad, *tensors))


def _with_autograd(keys: Any, *args: Any) -> tuple[Tensor, Tensor]:
    if torch.is_grad_enabled() and any([isinstance(x, Tensor) and x.requires_grad for x in args]):
        count = len(_TENSOR_NAMES)
        return Scan.apply(_Call(keys, args[count:]), *args[:count])
    return below_autograd(scan_op, _forward, keys, *args)


_library.impl("selective_scan", _with_autograd, "Autograd", with_keyset=True)


def _forward_flops(u, delta, A, B, C, D, orders, delta_bias, dt_weight, *args, **kwargs) -> int:  # type: ignore
    """9 operations a step, channel and state, 1 a step and channel for D u: the count that the papers use. The
    projection of the step sizes counts as the matrix product that it replaces.
    """
    b, length, k, _ = delta
    _, c, n = A
    steps = b * k * (length if orders is None else orders[1])
    return 9 * steps * c * n + (steps * c if D is not None else 0) + _projection_flops(delta, dt_weight)


def _backward_flops(grad, u, delta, A, B, C, D, orders, delta_bias, dt_weight, *args, **kwargs) -> int:  # type: ignore
    """21 operations a step, channel and state: 5 to compute the states again, 16 in the reverse sweep; three matrix
    products with the projection, the first of them again.
    """
    b, length, k, _ = delta
    _, c, n = A
    steps = b * k * (length if orders is None else orders[1])
    return 21 * steps * c * n + (4 * steps * c if D is not None else 0) + 3 * _projection_flops(delta, dt_weight)


def _projection_flops(delta: torch.Size, dt_weight: torch.Size | None) -> int:
    return 0 if dt_weight is None else 2 * delta.numel() * dt_weight[1]


# `register_flop_formula` of torch 2.4 files a formula where its counter does not look.
flop_registry[torch.ops.backbones.selective_scan] = shape_wrapper(_forward_flops)
flop_registry[torch.ops.backbones.selective_scan_backward] = shape_wrapper(_backward_flops)
