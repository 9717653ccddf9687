"""The outputs of states, where PyTorch takes several passes through memory."""

from typing import Any

import torch
from torch import Tensor

from backbones.ops.derivatives import first_order
from backbones.ops.dispatch import choose_for, kernels
from backbones.ops.fused.state_output import naive
from backbones.ops.rows import PLAIN
from backbones.ops.tracing import is_watched, runs_eagerly

_TRITON = "fused.state_output.triton"


def state_output(
    states: Tensor, C: Tensor, x: Tensor, D: Tensor, dtype: torch.dtype, *, backend: str | None = None
) -> Tensor:  # fmt: skip
    """states C + x D, of a scan with one state a channel and one C a token.

    Args:
        states: (..., c).
        C: (..., 1).
        x: as states, the scan's input.
        D: (c) numbers.
        dtype: of the result.
        backend: "naive" is PyTorch's operations, "triton" a kernel for GPUs, which computes in float32. None takes the
            fastest that runs on the tensors' device.

    Returns:
        (..., c) in ``dtype``.

    Raises:
        ValueError: ``backend`` is given and cannot run.
        NotImplementedError: forward-mode or ``torch.func`` derivatives through a kernel that is named, or second
            derivatives through one.
    """
    given = (states, C, x, D)
    chosen = choose_for("state_output", backend, *given)
    if chosen != ("triton", False) or not runs_eagerly(x) or is_watched() or any([type(t) not in PLAIN for t in given]):
        return naive.forward(*given, dtype)
    if torch.is_grad_enabled():
        return _StateOutput.apply(*given, dtype)
    return kernels(_TRITON).forward(*given, dtype)


class _StateOutput(torch.autograd.Function):
    # Never traced, so it need not be an operator of torch.library, which costs some 50 microseconds a call.

    @staticmethod
    def forward(ctx: Any, states: Tensor, C: Tensor, x: Tensor, D: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(states, C, x, D)
        return kernels(_TRITON).forward(states, C, x, D, dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors
        return *first_order("state_output", kernels(_TRITON).backward(grad, *saved), (grad, *saved)), None
