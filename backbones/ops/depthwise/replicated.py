"""The sum of depthwise convolutions that repeat the border of a map, in a few launches on a GPU."""

from typing import Any

import torch
from torch import Tensor

from backbones.ops.depthwise.operator import _as
from backbones.ops.derivatives import first_order
from backbones.ops.dispatch import choose_for, has_kernel, kernels
from backbones.ops.rows import PLAIN
from backbones.ops.tracing import is_watched, runs_eagerly

_TRITON = "depthwise.triton"
Tables = tuple[Tensor, Tensor, Tensor]


def has_replicated_conv(x: Tensor, weight: Tensor, backend: str | None) -> bool:
    """Whether :func:`replicated_conv` serves x and weight: on a GPU in eager mode, where nobody looks on.

    Raises:
        ValueError: ``backend`` is given and cannot run.
        NotImplementedError: ``backend`` is given, and derivatives are asked for that its kernel does not have.
    """
    if not runs_eagerly(x) or is_watched() or type(x) not in PLAIN or type(weight) not in PLAIN:
        return False
    if backend is None and not has_kernel("depthwise_conv", x.device.type, x.dtype):
        return False  # plain PyTorch is no fallback to warn of
    return choose_for("depthwise_conv", backend, x, weight) == ("triton", False)


def replicated_conv(x: Tensor, weight: Tensor, tables: Tables) -> Tensor:
    """y[:, i] = sum_k sum_j weight[k, :, j] x[:, taps[k, j, i]], accumulated in float32; for tensors of which
    :func:`has_replicated_conv` holds.

    Unlike those of :func:`backbones.ops.depthwise_conv`, a tap may read a token for several outputs.

    Args:
        x: (b, l, c).
        weight: (k, c, j).
        tables: of :func:`backbones.patterns.taps.replicated_taps`.

    Returns:
        (b, l, c) in the dtype of x, contiguous. The gradients are deterministic.

    Raises:
        NotImplementedError: second derivatives.
    """
    weight = _as(weight, torch.float32)
    if torch.is_grad_enabled():
        return _ReplicatedConv.apply(x, weight, *tables)
    return kernels(_TRITON).replicated(x, weight, tables[0])


class _ReplicatedConv(torch.autograd.Function):
    # Never traced, so it need not be an operator of torch.library, which costs some 50 microseconds a call.

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, *tables: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, *tables)
        return kernels(_TRITON).replicated(x, weight, tables[0])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, *tables = ctx.saved_tensors
        results = kernels(_TRITON).replicated_backward(grad, x, weight, *tables)
        return *first_order("depthwise_conv", results, (grad, x, weight)), None, None, None
