"""What surrounds the scan in every block, where PyTorch takes several passes through memory: the gate, and RMSNorm.

The C++ kernel takes one. Elsewhere these are PyTorch's own operations: on GPUs, in other dtypes, and in compiled and
exported programs, since compilers fuse such things themselves.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.ops.derivatives import first_order, is_transformed
from backbones.ops.fused import pointwise_cpu
from backbones.ops.scan.operator import choose_backend


def silu_gate(x: Tensor, z: Tensor, scale: float = 1.0, backend: str | None = None) -> Tensor:
    """x SiLU(z) scale (Mamba, figure 3).

    Args:
        x: (..., c).
        z: as x.
        scale: a constant factor.
        backend: "cpu" or None may take the kernel; any other name takes PyTorch's operations.
    """
    if _kernel_runs(x, z, backend) and x.shape == z.shape:
        return _gate_op(x, z, scale)
    y = x * F.silu(z)
    return y if scale == 1 else y * scale


def rms_norm(x: Tensor, weight: Tensor, eps: float, backend: str | None = None) -> Tensor:
    """x / sqrt(mean(x^2) + eps) weight over the last axis (Zhang and Sennrich 2019, equation 4).

    Args:
        x: (..., c), of which the kernel reads float32.
        weight: (c).
        eps: added to the mean of squares.
        backend: "cpu" or None may use the kernel; any other name uses PyTorch's operations.
    """
    if _kernel_runs(x, weight, backend) and x.dtype == torch.float32 and weight.is_contiguous():
        return _norm_op(x, weight, eps)
    return F.rms_norm(x, weight.shape, weight, eps)


def _kernel_runs(x: Tensor, other: Tensor, backend: str | None) -> bool:
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


_library = torch.library.Library("backbones", "FRAGMENT")
_SCHEMAS = {
    "gate": "(Tensor x, Tensor z, float scale) -> Tensor",
    "gate_backward": "(Tensor grad, Tensor x, Tensor z, float scale) -> (Tensor, Tensor)",
    "rms_norm": "(Tensor x, Tensor weight, float eps) -> Tensor",
    "rms_norm_backward": "(Tensor grad, Tensor x, Tensor weight, float eps) -> (Tensor, Tensor)",
}
for _name, _schema in _SCHEMAS.items():
    _library.define(_name + _schema, tags=torch.Tag.pt2_compliant_tag)
    _library.impl(_name, getattr(pointwise_cpu, _name), "CPU")
_gate_op, _norm_op = torch.ops.backbones.gate.default, torch.ops.backbones.rms_norm.default


def _contiguous_like(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(torch.empty_like(x, memory_format=torch.contiguous_format) for x in tensors)


def _register(name: str) -> None:
    """Shapes and gradients of an operator (x, other, constant), whose results are shaped as its arguments."""
    op, backward = (getattr(torch.ops.backbones, x).default for x in (name, f"{name}_backward"))

    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[:2])
        ctx.constant = inputs[2]

    def differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        saved = ctx.saved_tensors  # which gradient checkpointing unpacks once only
        results = backward(grad, *saved, ctx.constant)
        return *first_order(name, results, (grad, *saved)), None

    torch.library.register_fake(op, lambda x, other, constant: _contiguous_like(x)[0], lib=_library)
    torch.library.register_fake(backward, lambda grad, x, other, constant: _contiguous_like(x, other), lib=_library)
    torch.library.register_autograd(op, differentiate, setup_context=setup_context, lib=_library)


for _name in ("gate", "rms_norm"):
    _register(_name)
