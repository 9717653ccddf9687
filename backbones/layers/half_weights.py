"""Casts a block's weights to autocast's dtype together.

Autocast casts every weight where it is used, and its gradient back: two launches per weight and training step, each of
which takes the host as long as a matrix product. Together they are one launch each way per block.
"""

import threading
from collections.abc import Callable, Iterable
from typing import Any, TypeVar
from weakref import WeakSet

import torch
from torch import Tensor, nn

from backbones.ops.tracing import all_modules, casts, is_hooked_before, is_watched, own_weight

Result = TypeVar("Result")

_DEVICE = "cuda"  # on a CPU, a launch costs nothing
_PRODUCTS = (nn.Linear, nn.Conv2d)  # whose weights and biases autocast casts
_NAMES = ("weight", "bias")
cast_their_own: WeakSet[nn.Module] = WeakSet()  # blocks whose weights are left to them
_running = threading.local()  # ``modules``: those whose weights are cast now, for a larger part of the model


def with_half_weights(function: Callable[..., Result], block: nn.Module, *args: Any) -> Result:
    """``function(*args)``, during which the modules of ``block`` see their weights in autocast's dtype.

    What autocast would do by itself, fewer launches: same results, and gradients reach the float32 parameters. Only
    under autocast on a GPU, and only float32 parameters of linear layers, convolutions, and modules that name theirs as
    ``autocast_weights``. Blocks within that `cast_their_own` are left out. Weights that hooks or parametrisations may
    exchange are left to autocast. While the function runs, other threads that call the same modules see these weights,
    too.
    """
    if not torch.is_autocast_enabled(_DEVICE) or torch.compiler.is_compiling():
        return function(*args)
    outer = getattr(_running, "modules", {})
    if block in outer:
        return function(*args)
    modules = all_modules(block, cast_their_own.__contains__)
    found = _weights(modules)
    if not found:
        return function(*args)
    dtype, weights = torch.get_autocast_dtype(_DEVICE), [weight for _, _, weight in found]
    halves = _Cast.apply(dtype, *weights) if torch.is_grad_enabled() else casts(weights, dtype)
    try:
        for (values, name, _), half in zip(found, halves, strict=True):
            values[name] = half  # found before the parameter of that name
        _running.modules = {**outer, **modules}
        return function(*args)
    finally:
        _running.modules = outer
        for values, name, _ in found:
            values.pop(name, None)


def _weights(modules: Iterable[nn.Module]) -> list[tuple[dict[str, Any], str, Tensor]]:
    """What is to be cast: the own attributes of its module, its name, and the parameter."""
    found: list[tuple[dict[str, Any], str, Tensor]] = []
    # Plain tensors are parameters of `torch.func.functional_call`; what its transforms follow is left to autocast.
    kinds = (nn.Parameter,) if is_watched() else (nn.Parameter, Tensor)
    for module in modules:
        if is_hooked_before(module):  # pruning and sharding put other weights in place so
            return []
        names = _NAMES if type(module) in _PRODUCTS else getattr(type(module), "autocast_weights", ())
        for name in names:
            values = vars(module)
            if type(values.get(name)) is Tensor:  # put there by another thread
                return []
            weight = own_weight(module, name)
            if weight is None or type(weight) not in kinds:  # such as a sharded or quantized tensor
                continue
            if weight.device.type == _DEVICE and weight.dtype == torch.float32:
                found.append((values, name, weight))
    return found


class _Cast(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, dtype: torch.dtype, *weights: Tensor) -> tuple[Tensor, ...]:
        ctx.set_materialize_grads(False)
        halves = casts(weights, dtype)
        trained = ctx.needs_input_grad[1:]
        ctx.mark_non_differentiable(*(half for half, learns in zip(halves, trained, strict=True) if not learns))
        return tuple(halves)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        given = [grad for grad in grads if grad is not None]
        if torch.is_grad_enabled():  # to be differentiated again
            whole = iter([grad.float() for grad in given])
        else:
            whole = iter(casts(given, torch.float32))
        return None, *(None if grad is None else next(whole) for grad in grads)
