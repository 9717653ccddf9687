"""The gate's and RMSNorm's `cpu` backend, part of the same C++ library as the scan's: one pass through memory each.

Results are bitwise the same for any number of threads.
"""

from typing import Any

import torch
from torch import Tensor

from backbones.ops.scan.cpu import _NO_MEMORY, GATE_CALL, NORM_CALL, _loaded, _rows


def _matrix(x: Tensor) -> Tensor:
    """(..., c) as (rows, c) with contiguous channels, a view where that is possible."""
    return _rows(x.reshape(-1, x.shape[-1]))


def _check(status: int, name: str) -> None:
    if status == _NO_MEMORY:
        raise MemoryError(f"{name}: no memory for the kernel's scratch space")


def _gate(
    function: Any, x: Tensor, z: Tensor, grad: Tensor | None, results: tuple[int, int, int], scale: float
) -> None:
    _check(
        function(
            GATE_CALL.pack(
                *x.shape, torch.get_num_threads(), x.dtype == torch.bfloat16,
                x.data_ptr(), z.data_ptr(), 0 if grad is None else grad.data_ptr(),
                x.stride(0), z.stride(0), 0 if grad is None else grad.stride(0), *results, scale,
            )
        ),
        "gate",
    )  # fmt: skip


def gate(x: Tensor, z: Tensor, scale: float) -> Tensor:
    """x SiLU(z) scale, contiguous."""
    y = x.new_empty(x.shape)
    _gate(_loaded().backbones_gate_forward, _matrix(x), _matrix(z), None, (y.data_ptr(), 0, 0), scale)
    return y


def gate_backward(grad: Tensor, x: Tensor, z: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and z, contiguous."""
    dx, dz = x.new_empty(x.shape), x.new_empty(x.shape)
    results = (0, dx.data_ptr(), dz.data_ptr())
    _gate(_loaded().backbones_gate_backward, _matrix(x), _matrix(z), _matrix(grad), results, scale)
    return dx, dz


def _norm(
    function: Any, x: Tensor, weight: Tensor, grad: Tensor | None, results: tuple[int, int, int], eps: float
) -> None:
    _check(
        function(
            NORM_CALL.pack(
                *x.shape, torch.get_num_threads(), x.data_ptr(), 0 if grad is None else grad.data_ptr(),
                x.stride(0), 0 if grad is None else grad.stride(0), weight.data_ptr(), *results, eps,
            )
        ),
        "rms_norm",
    )  # fmt: skip


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) weight, contiguous."""
    y = x.new_empty(x.shape)
    _norm(_loaded().backbones_rms_norm_forward, _matrix(x), weight, None, (y.data_ptr(), 0, 0), eps)
    return y


def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight, contiguous."""
    dx, dweight = x.new_empty(x.shape), weight.new_empty(weight.shape)
    results = (0, dx.data_ptr(), dweight.data_ptr())
    _norm(_loaded().backbones_rms_norm_backward, _matrix(x), weight, _matrix(grad), results, eps)
    return dx, dweight
