"""The gate, where PyTorch takes several passes through memory."""

import torch
from torch import Tensor

from backbones.ops.derivatives import is_transformed
from backbones.ops.fused.gate import cpu, naive
from backbones.ops.fused.registration import register
from backbones.ops.scan.operator import choose_backend

gate_op = register("gate", "z", "scale", cpu)


def silu_gate(x: Tensor, z: Tensor, scale: float = 1.0, backend: str | None = None) -> Tensor:
    """x SiLU(z) scale (Mamba, figure 3).

    Args:
        x: (..., c).
        z: as x.
        scale: a constant factor.
        backend: "cpu" or None may take the kernel; any other name takes PyTorch's operations.
    """
    if kernel_runs(x, z, backend) and x.shape == z.shape:
        return gate_op(x, z, scale)
    return naive.forward(x, z, scale)


def kernel_runs(x: Tensor, other: Tensor, backend: str | None) -> bool:
    """Whether the C++ kernels read such tensors, and nobody compiles: compilers fuse PyTorch's own operations."""
    return (
        x.device.type == "cpu"
        and x.dtype == other.dtype
        and x.dtype in (torch.float32, torch.bfloat16)
        and x.numel() > 0
        and not torch.compiler.is_compiling()
        and not torch.jit.is_tracing()  # type: ignore[attr-defined]
        and choose_backend(backend, "cpu", x.dtype) == "cpu"
        and not is_transformed(x, other)
    )
