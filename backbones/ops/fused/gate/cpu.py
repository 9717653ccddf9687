"""The gate's `cpu` backend, part of the same C++ library as the scan's: one pass through memory.

Results are bitwise the same for any number of threads.
"""

import torch
from torch import Tensor

from backbones.ops.native import GateCall, pointer, run
from backbones.ops.rows import matrix


def _run(direction: str, x: Tensor, z: Tensor, scale: float, grad: Tensor | None = None, **results: Tensor) -> None:
    rows, c = x.shape
    call = GateCall(
        rows=rows, c=c, threads=torch.get_num_threads(), bf16=x.dtype == torch.bfloat16,
        x=x.data_ptr(), z=z.data_ptr(), grad=pointer(grad),
        x_row=x.stride(0), z_row=z.stride(0), grad_row=0 if grad is None else grad.stride(0), scale=scale,
        **{name: pointer(x) for name, x in results.items()},
    )  # fmt: skip
    run(direction, call)


def forward(x: Tensor, z: Tensor, scale: float) -> Tensor:
    """x SiLU(z) scale, contiguous."""
    y = x.new_empty(x.shape)
    _run("forward", matrix(x), matrix(z), scale, y=y)
    return y


def backward(grad: Tensor, x: Tensor, z: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Gradients of x and z, contiguous."""
    dx, dz = x.new_empty(x.shape), x.new_empty(x.shape)
    _run("backward", matrix(x), matrix(z), scale, matrix(grad), dx=dx, dz=dz)
    return dx, dz
