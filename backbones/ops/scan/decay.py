"""Decay rates from their logarithms."""

from typing import Any

import torch
from torch import Tensor

from backbones.ops.scan.triton import unavailable_reason
from backbones.ops.tracing import is_transformed


def decay_rates(A_log: Tensor) -> Tensor:
    """A = -exp(A_log) (k, c, n), in float32 at least: half precision would change how long a state remembers."""
    A_log = A_log.to(torch.promote_types(A_log.dtype, torch.float32))
    if (
        A_log.is_cuda
        and A_log.dtype == torch.float32
        and A_log.is_contiguous()
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and unavailable_reason() is None
        and not is_transformed(A_log)
    ):
        return _DecayRates.apply(A_log)
    return -torch.exp(A_log)


class _DecayRates(torch.autograd.Function):
    """One launch instead of two, which take longer than the numbers."""

    @staticmethod
    def forward(ctx: Any, A_log: Tensor) -> Tensor:
        from backbones.ops.scan.triton.decay import negative_exp

        A = negative_exp(A_log)
        ctx.save_for_backward(A)
        return A

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (A,) = ctx.saved_tensors  # an output: differentiable again
        return grad * A
