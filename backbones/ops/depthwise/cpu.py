"""The depthwise convolution's `cpu` backend, part of the same C++ library as the scan's.

SIMD lanes run across channels; eight outputs are worked on together in registers, SiLU included, and backward computes
SiLU's argument again. Results are bitwise the same for any number of threads.
"""

from typing import Any

import torch
from torch import Tensor

from backbones.ops.scan.cpu import _NO_MEMORY, _ORDER_OUT_OF_RANGE, CONV_CALL, _loaded, _pointer, _rows


def _call(
    function: Any, x: Tensor, weight: Tensor, bias: Tensor | None, taps: Tensor, inverse_taps: Tensor, silu: bool,
    grad: Tensor | None, *results: int,
) -> None:  # fmt: skip
    b, length, c = x.shape
    k, j, m = taps.shape
    x_strides, grad_strides = x.stride(), (0, 0, 0) if grad is None else grad.stride()
    status = function(
        CONV_CALL.pack(
            b, length, m, k, c, j, x.dtype == torch.bfloat16, silu, torch.get_num_threads(),
            x.data_ptr(), _pointer(grad), *x_strides[:2], *grad_strides[:3],
            weight.data_ptr(), _pointer(bias), taps.data_ptr(), inverse_taps.data_ptr(), *results,
        )
    )  # fmt: skip
    if status == _ORDER_OUT_OF_RANGE:
        for name, table, what, size in (("taps", taps, "token", length), ("inverse_taps", inverse_taps, "output", m)):
            for found in table[(table < -1) | (table >= size)][:1].tolist():
                raise ValueError(f"{name}: found {what} {found}, expected -1..{size - 1}")
    if status == _NO_MEMORY:
        raise MemoryError("depthwise_conv: no memory for the kernel's scratch space")


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, taps: Tensor, inverse_taps: Tensor, silu: bool
) -> Tensor:  # fmt: skip
    """y (k, b, m, c). Raises ValueError for a tap outside of -1..l-1."""
    x = _rows(x)
    y = x.new_empty((weight.shape[0], x.shape[0], taps.shape[2], x.shape[2]))
    function = _loaded().backbones_depthwise_forward
    _call(function, x, weight, bias, taps, inverse_taps, silu, None, y.data_ptr(), 0, 0, 0)
    return y


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, taps: Tensor, inverse_taps: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, contiguous; that of an absent bias has shape (0,)."""
    grad, x = _rows(grad), _rows(x)
    dx, dweight = x.new_empty(x.shape), weight.new_empty(weight.shape)
    dbias = weight.new_empty((0,) if bias is None else bias.shape)
    function = _loaded().backbones_depthwise_backward
    results = (0, dx.data_ptr(), dweight.data_ptr(), 0 if bias is None else dbias.data_ptr())
    _call(function, x, weight, bias, taps, inverse_taps, silu, grad, *results)
    return dx, dweight, dbias
