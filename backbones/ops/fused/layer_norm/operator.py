"""LayerNorm for the GPUs on which PyTorch's own is slow on narrow rows."""

from typing import Any

import torch
from torch import Tensor

from backbones.ops.derivatives import first_order, is_transformed
from backbones.ops.scan.triton import unavailable_reason


def runs_on(x: Tensor) -> bool:
    """Whether the kernel runs on this tensor, and nobody compiles: Inductor fuses PyTorch's own with what is around."""
    return (
        x.is_cuda
        and x.dtype != torch.float64
        and not torch.compiler.is_compiling()
        and unavailable_reason() is None
        and not is_transformed(x)
    )


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype) -> Tensor:
    """Normalises the last axis of x in float32.

    Args:
        x: (..., c) in float32, bfloat16 or float16, on a GPU.
        weight: (c), or None.
        bias: (c), or None exactly where ``weight`` is.
        eps: added to the variance.
        dtype: of the result.
    """
    return _LayerNorm.apply(x, weight, bias, eps, dtype)


class _LayerNorm(torch.autograd.Function):
    # Never traced, so it need not be an operator of torch.library, which costs some 50 microseconds a call.

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype
    ) -> Tensor:
        from backbones.ops.fused.layer_norm import triton as kernels

        x = x.contiguous()
        y, statistics = kernels.forward(x, weight, bias, eps, dtype)
        ctx.save_for_backward(x, weight, statistics)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from backbones.ops.fused.layer_norm import triton as kernels

        x, weight, statistics = ctx.saved_tensors
        results = kernels.backward(grad.contiguous(), x, weight, statistics)
        dx, sums = first_order("layer_norm", results, (grad, x, weight))
        if weight is None:
            return dx, None, None, None, None
        dweight, dbias = sums.to(weight.dtype)
        return dx, dweight, dbias, None, None
