"""LayerNorm as one ``torch.library`` operator, for the GPUs on which PyTorch's own is slow on narrow rows."""

from typing import Any

import torch
from torch import Tensor

from backbones.ops import triton


def runs_on(x: Tensor) -> bool:
    """Whether the kernel runs on this tensor, and nobody compiles: Inductor fuses PyTorch's own with what is around."""
    return x.is_cuda and x.dtype != torch.float64 and not torch.compiler.is_compiling() and _available()


@torch.library.custom_op("backbones::layer_norm", mutates_args=())
def layer_norm_op(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """(y, statistics) of contiguous rows x (rows, c)."""
    from backbones.ops.triton import norm

    return norm.forward(x, weight, bias, eps, dtype)


@torch.library.custom_op("backbones::layer_norm_backward", mutates_args=())
def layer_norm_backward_op(grad: Tensor, x: Tensor, weight: Tensor | None, statistics: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of x, and of weight and bias as two rows."""
    from backbones.ops.triton import norm

    return norm.backward(grad, x, weight, statistics)


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """Normalises the last axis of x in float32.

    Args:
        x: (..., c) in float32, bfloat16 or float16, on a GPU.
        weight: (c), or None.
        bias: (c), or None exactly where ``weight`` is.
        eps: added to the variance.
        dtype: of the result.
    """
    weight, bias = (None if p is None else p.float() for p in (weight, bias))
    return layer_norm_op(x.reshape(-1, x.shape[-1]).contiguous(), weight, bias, eps, dtype)[0].view(x.shape)


def _available() -> bool:
    return triton.unavailable_reason() is None


@layer_norm_op.register_fake
def _(x, weight, bias, eps, dtype):  # type: ignore[no-untyped-def]
    return torch.empty_like(x, dtype=dtype), x.new_empty((2, x.shape[0]), dtype=torch.float32)


@layer_norm_backward_op.register_fake
def _(grad, x, weight, statistics):  # type: ignore[no-untyped-def]
    return torch.empty_like(x), statistics.new_empty((2, 0 if weight is None else x.shape[1]))


def _setup_context(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    x, weight, *_ = inputs
    ctx.save_for_backward(x, weight, output[1])


def _autograd(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    x, weight, statistics = ctx.saved_tensors
    dx, (dweight, dbias) = layer_norm_backward_op(grad.contiguous(), x, weight, statistics)
    return (dx, None, None, None, None) if weight is None else (dx, dweight, dbias, None, None)


layer_norm_op.register_autograd(_autograd, setup_context=_setup_context)
