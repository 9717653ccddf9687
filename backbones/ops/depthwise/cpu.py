"""The depthwise convolution's `cpu` backend, part of the same C++ library as the scan's.

SIMD lanes run across channels; eight outputs are worked on together in registers, SiLU included, and backward computes
SiLU's argument again. Results are bitwise the same for any number of threads.
"""

import torch
from torch import Tensor

from backbones.ops.native import ConvCall, pointer, run
from backbones.ops.rows import contiguous_rows


def _run(
    direction: str, x: Tensor, weight: Tensor, bias: Tensor | None, taps: Tensor, inverse_taps: Tensor, silu: bool,
    grad: Tensor | None = None, **results: Tensor | None,
) -> None:  # fmt: skip
    """Calls the kernel. ``results`` are the record's buffers by name."""
    b, length, c = x.shape
    k, j, m = taps.shape
    x_b, x_l, _ = x.stride()
    grad_k, grad_b, grad_m, _ = (0, 0, 0, 0) if grad is None else grad.stride()
    call = ConvCall(
        b=b, l=length, m=m, k=k, c=c, j=j, bf16=x.dtype == torch.bfloat16, silu=silu, threads=torch.get_num_threads(),
        x=x.data_ptr(), grad=pointer(grad), x_b=x_b, x_l=x_l, grad_k=grad_k, grad_b=grad_b, grad_m=grad_m,
        weight=weight.data_ptr(), bias=pointer(bias), taps=taps.data_ptr(), inverse=inverse_taps.data_ptr(),
        **{name: pointer(x) for name, x in results.items()},
    )  # fmt: skip
    if not run(direction, call):
        for name, table, what, size in (("taps", taps, "token", length), ("inverse_taps", inverse_taps, "output", m)):
            for found in table[(table < -1) | (table >= size)][:1].tolist():
                raise ValueError(f"{name}: found {what} {found}, expected -1..{size - 1}")


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, taps: Tensor, inverse_taps: Tensor, silu: bool
) -> Tensor:  # fmt: skip
    """y (k, b, m, c). Raises ValueError for a tap outside of -1..l-1."""
    x = contiguous_rows(x)
    y = x.new_empty((weight.shape[0], x.shape[0], taps.shape[2], x.shape[2]))
    _run("forward", x, weight, bias, taps, inverse_taps, silu, y=y)
    return y


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, taps: Tensor, inverse_taps: Tensor, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, weight and bias, contiguous; that of an absent bias has shape (0,)."""
    grad, x = contiguous_rows(grad), contiguous_rows(x)
    dx, dweight = x.new_empty(x.shape), weight.new_empty(weight.shape)
    dbias = weight.new_empty((0,) if bias is None else bias.shape)
    _run(
        "backward", x, weight, bias, taps, inverse_taps, silu, grad,
        dx=dx, dweight=dweight, dbias=None if bias is None else dbias,
    )  # fmt: skip
    return dx, dweight, dbias
