"""Derivatives beyond the first backward pass: right in plain PyTorch, refused by kernels."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

WAY_OUT = "backend='naive' has (for a whole model scan_backend='naive', or backbones.layers.set_backend)"


def gradients(function: Callable[..., Tensor], inputs: Sequence[Tensor | None], grad: Tensor) -> list[Tensor | None]:
    """Gradients of ``function(*inputs)``, computed again; differentiable themselves where backward creates a graph."""
    create_graph = torch.is_grad_enabled()
    with torch.enable_grad(), torch.autocast(grad.device.type, enabled=False):
        # A view each, for one tensor may stand for two inputs.
        own: list[Any] = [
            None if x is None else x.view_as(x) if create_graph and x.requires_grad else x.detach().requires_grad_()
            for x in inputs
        ]
        found = iter(
            torch.autograd.grad(function(*own), [x for x in own if x is not None], grad, create_graph=create_graph)
        )
    return [None if x is None else next(found) for x in own]


def empty_result(shape: tuple[int, ...], like: Tensor, *others: Tensor | None) -> Tensor:
    """The result for a batch of 0, in the dtype of ``like``: the gradients of all that it depends on are zeros."""
    given = [x for x in (like, *others) if x is not None]
    return torch.stack([x.sum().to(like.dtype) for x in given]).sum().expand(shape)


def first_order(operator: str, results: Sequence[Tensor], inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """``results`` of a kernel's backward pass, which refuse to be differentiated again.

    Args:
        operator: what to call it in the message.
        results: gradients.
        inputs: what they depend on.
    """
    depends = [x for x in inputs if x is not None and x.requires_grad]
    if not torch.is_grad_enabled() or not depends:
        return tuple(results)
    return _FirstOrder.apply(operator, len(results), *results, *depends)


class _FirstOrder(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, operator: str, count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
        ctx.operator = operator
        return tuple(x.detach() for x in tensors[:count])

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        raise NotImplementedError(f"{ctx.operator}: this backend has no second derivatives, {WAY_OUT}")
