"""The gate, where PyTorch takes several passes through memory."""

from typing import Any

import torch
from torch import Tensor

from backbones.ops.derivatives import first_order
from backbones.ops.dispatch import choose_for, kernels
from backbones.ops.fused.gate import cpu, naive
from backbones.ops.fused.registration import reads, register
from backbones.ops.tracing import runs_eagerly

_TRITON = "fused.gate.triton"

gate_op = register("gate", "z", "scale", cpu)


def silu_gate(x: Tensor, z: Tensor, scale: float = 1.0, *, backend: str | None = None) -> Tensor:
    """x SiLU(z) scale (Mamba, figure 3).

    Args:
        x: (..., c).
        z: as x, or of a shape that broadcasts to it.
        scale: a constant factor.
        backend: "naive" is PyTorch's operations, "cpu" a C++ kernel for float32 and bfloat16 in one pass through
            memory, "triton" a kernel for GPUs. None takes the fastest that runs on the tensors' device. Compiled and
            exported programs hold PyTorch's operations, which compilers fuse.

    Returns:
        (..., c) in the dtype of x.

    Raises:
        ValueError: ``backend`` is given and cannot run.
        NotImplementedError: forward-mode or ``torch.func`` derivatives through a kernel that is named, or second
            derivatives through one.
    """
    chosen, _ = choose_for("silu_gate", backend, x, z)
    if chosen == "cpu" and reads(x, z) and x.shape == z.shape:
        return gate_op(x, z, scale)
    if chosen == "triton" and runs_eagerly(x) and x.shape == z.shape and x.dtype == z.dtype:
        if torch.is_grad_enabled():
            return _Gate.apply(x, z, scale)
        return kernels(_TRITON).forward(x, z, scale)
    return naive.forward(x, z, scale)


class _Gate(torch.autograd.Function):
    # Never traced, so it need not be an operator of torch.library, which costs some 50 microseconds a call.

    @staticmethod
    def forward(ctx: Any, x: Tensor, z: Tensor, scale: float) -> Tensor:
        ctx.save_for_backward(x, z)
        ctx.scale = scale
        return kernels(_TRITON).forward(x, z, scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, z = ctx.saved_tensors
        return *first_order("silu_gate", kernels(_TRITON).backward(grad, x, z, ctx.scale), (grad, x, z)), None


def excited_gate(x: Tensor, logits: Tensor, z: Tensor | None, *, backend: str | None = None) -> Tensor:
    """x sigmoid(logits) SiLU(z): squeeze and excitation (arXiv:1709.01507), and the gate of :func:`silu_gate`.

    Args:
        x: (b, l, c).
        logits: (b, c).
        z: as x; None for no gate.
        backend: see :func:`silu_gate`.

    Returns:
        (b, l, c) in the dtype of x.

    Raises:
        ValueError: ``backend`` is given and cannot run.
        NotImplementedError: as :func:`silu_gate`.
    """
    chosen, _ = choose_for("silu_gate", backend, x, logits, z)
    fits = z is None or (z.shape == x.shape and z.dtype == x.dtype)
    if chosen == "triton" and runs_eagerly(x) and fits and logits.shape == (x.shape[0], x.shape[2]):
        if torch.is_grad_enabled():
            return _ExcitedGate.apply(x, logits, z)
        return kernels(_TRITON).excited(x, logits, z)
    y = x * torch.sigmoid(logits).unsqueeze(1)
    return y if z is None else silu_gate(y, z, backend=backend)


class _ExcitedGate(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, logits: Tensor, z: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, logits, z)
        return kernels(_TRITON).excited(x, logits, z)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, logits, z = ctx.saved_tensors
        dx, dlogits, dz = kernels(_TRITON).excited_backward(grad, x, logits, z)
        given = (dx, dlogits) if dz is None else (dx, dlogits, dz)
        results = first_order("silu_gate", given, (grad, x, logits, z))
        return *results, *[None] * (3 - len(results))
