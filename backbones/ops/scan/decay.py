"""Decay rates from their logarithms."""

from typing import Any

import torch
from torch import Tensor

from backbones.ops.dispatch import choose_for
from backbones.ops.tracing import runs_eagerly


def decay_rates(A_log: Tensor, backend: str | None = None) -> Tensor:
    """A = -exp(A_log) (k, c, n), in float32 at least: half precision would change how long a state remembers."""
    A_log = A_log.to(torch.promote_types(A_log.dtype, torch.float32))
    chosen, _ = choose_for("decay_rates", backend, A_log)
    return _DecayRates.apply(A_log) if chosen == "triton" and runs_eagerly(A_log) else -torch.exp(A_log)


class _DecayRates(torch.autograd.Function):
    """One launch instead of two, which take longer than the numbers."""

    @staticmethod
    def forward(ctx: Any, A_log: Tensor) -> Tensor:
        from backbones.ops.scan.triton.decay import negative_exp

        A = negative_exp(A_log.contiguous())
        ctx.save_for_backward(A)
        return A

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (A,) = ctx.saved_tensors  # an output: differentiable again
        return grad * A
