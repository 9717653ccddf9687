"""The gate's and RMSNorm's `cpu` backend, part of the same C++ library as the scan's: one pass through memory each.

Results are bitwise the same for any number of threads.
"""

import torch
from torch import Tensor

from backbones.ops.native import GateCall, NormCall, contiguous_rows, pointer, run


def _matrix(x: Tensor) -> Tensor:
    """(..., c) as (rows, c) with contiguous channels, a view where that is possible."""
    return contiguous_rows(x.reshape(-1, x.shape[-1]))


def _row(x: Tensor | None) -> int:
    return 0 if x is None else x.stride(0)


def _gate(direction: str, x: Tensor, z: Tensor, scale: float, grad: Tensor | None = None, **results: Tensor) -> None:
    rows, c = x.shape
    call = GateCall(
        rows=rows, c=c, threads=torch.get_num_threads(), bf16=x.dtype == torch.bfloat16,
        x=x.data_ptr(), z=z.data_ptr(), grad=pointer(grad), x_row=_row(x), z_row=_row(z), grad_row=_row(grad),
        scale=scale, **{name: pointer(x) for name, x in results.items()},
    )  # fmt: skip
    run(direction, call)


def gate(x: Tensor, z: Tensor, scale: float) -> Tensor:
    """x SiLU(z) scale, contiguous."""
    y = x.new_empty(x.shape)
    _gate("forward", _matrix(x), _matrix(z), scale, y=y)
    return y


def gate_backward(grad: Tensor, x: Tensor, z: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and z, contiguous."""
    dx, dz = x.new_empty(x.shape), x.new_empty(x.shape)
    _gate("backward", _matrix(x), _matrix(z), scale, _matrix(grad), dx=dx, dz=dz)
    return dx, dz


def _norm(direction: str, x: Tensor, weight: Tensor, eps: float, grad: Tensor | None = None, **results: Tensor) -> None:
    rows, c = x.shape
    call = NormCall(
        rows=rows, c=c, threads=torch.get_num_threads(), x=x.data_ptr(), grad=pointer(grad),
        x_row=_row(x), grad_row=_row(grad), weight=weight.data_ptr(), eps=eps,
        **{name: pointer(x) for name, x in results.items()},
    )  # fmt: skip
    run(direction, call)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) weight, contiguous."""
    y = x.new_empty(x.shape)
    _norm("forward", _matrix(x), weight, eps, y=y)
    return y


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight, contiguous."""
    dx, dweight = x.new_empty(x.shape), weight.new_empty(weight.shape)
    _norm("backward", _matrix(x), weight, eps, _matrix(grad), dx=dx, dweight=dweight)
    return dx, dweight
