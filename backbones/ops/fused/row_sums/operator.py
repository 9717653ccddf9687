"""Weighted sums of rows, such as upsampling takes of a map, or a merge of the steps that visited a cell."""

from typing import Any

import torch
from torch import Tensor

from backbones.ops.dispatch import choose_for, kernels
from backbones.ops.fused.row_sums import naive
from backbones.ops.tracing import is_watched, runs_eagerly

_TRITON = "fused.row_sums.triton"
Tables = tuple[Tensor, Tensor, Tensor, Tensor]


def has_row_sums_kernel(x: Tensor, base: Tensor | None, backend: str | None) -> bool:
    """Whether :func:`row_sums` is one launch: on a GPU in eager mode, where nobody looks on.

    Raises:
        ValueError: ``backend`` is given and cannot run.
    """
    served = choose_for("row_sums", backend, x, base) == ("triton", False)
    return served and runs_eagerly(x) and not is_watched() and (base is None or x.dtype == base.dtype)


def row_sums(x: Tensor, base: Tensor | None, tables: Tables, *, backend: str | None = None) -> Tensor:
    """y[:, i] = base[:, i] + sum_j weights[j, i] x[:, table[j, i]], in float32 where a kernel runs.

    Args:
        x: (b, l, c).
        base: (b, m, c), or None for zeros.
        tables: ``table`` (j, m) of rows of x, -1 for none, and ``weights`` (j, m); the same two of the transposed sum
            (i, l), by which the gradient of x goes. See :mod:`backbones.patterns.resampling`.
        backend: "naive" is PyTorch's operations, "triton" a kernel for GPUs. None takes the fastest that runs on the
            tensors' device.

    Returns:
        (b, m, c) in the dtype of ``base``, or that of x.

    Raises:
        ValueError: ``backend`` is given and cannot run.
    """
    if not has_row_sums_kernel(x, base, backend):
        return naive.forward(x, base, *tables[:2])
    if torch.is_grad_enabled():
        return _RowSums.apply(x, base, *tables)
    return kernels(_TRITON).forward(x, base, *tables[:2])


class _RowSums(torch.autograd.Function):
    # Never traced, so it need not be an operator of torch.library, which costs some 50 microseconds a call.

    @staticmethod
    def forward(ctx: Any, x: Tensor, base: Tensor | None, *tables: Tensor) -> Tensor:
        ctx.save_for_backward(*tables)
        ctx.has_base = base is not None
        return kernels(_TRITON).forward(x, base, *tables[:2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        *own, transposed, transposed_weights = ctx.saved_tensors
        dx = _RowSums.apply(grad, None, transposed, transposed_weights, *own)
        return dx, grad if ctx.has_base else None, None, None, None, None
