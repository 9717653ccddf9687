"""RMSNorm's `cpu` backend, part of the same C++ library as the scan's: one pass through memory.

Results are bitwise the same for any number of threads.
"""

import torch
from torch import Tensor

from backbones.ops.native import NormCall, pointer, run
from backbones.ops.rows import matrix


def _run(direction: str, x: Tensor, weight: Tensor, eps: float, grad: Tensor | None = None, **results: Tensor) -> None:
    rows, c = x.shape
    call = NormCall(
        rows=rows, c=c, threads=torch.get_num_threads(), x=x.data_ptr(), grad=pointer(grad),
        x_row=x.stride(0), grad_row=0 if grad is None else grad.stride(0), weight=weight.data_ptr(), eps=eps,
        **{name: pointer(x) for name, x in results.items()},
    )  # fmt: skip
    run(direction, call)


def forward(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / rms(x) weight, contiguous."""
    y = x.new_empty(x.shape)
    _run("forward", matrix(x), weight, eps, y=y)
    return y


def backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and weight, contiguous."""
    dx, dweight = x.new_empty(x.shape), weight.new_empty(weight.shape)
    _run("backward", matrix(x), weight, eps, matrix(grad), dx=dx, dweight=dweight)
    return dx, dweight
