"""RMSNorm, where PyTorch takes several passes through memory."""

import torch
from torch import Tensor

from backbones.ops.dispatch import choose_for
from backbones.ops.fused.layer_norm import cpu
from backbones.ops.fused.layer_norm.operator import normalise
from backbones.ops.fused.rms_norm import naive
from backbones.ops.tracing import runs_eagerly


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, dtype: torch.dtype | None = None, backend: str | None = None
) -> Tensor:
    """x / sqrt(mean(x^2) + eps) weight over the last axis (Zhang and Sennrich 2019, equation 4).

    Args:
        x: (..., c).
        weight: (c).
        eps: added to the mean of squares.
        dtype: of the result; None is that of ``torch.nn.functional.rms_norm``, to which x and weight promote.
        backend: "naive" is PyTorch's operation, "cpu" a C++ kernel for float32 and bfloat16 in one pass through
            memory, "triton" a kernel for GPUs. None takes the fastest that runs on the tensors' device.
            Compiled and exported programs hold PyTorch's operation, which compilers fuse.

    Returns:
        (..., c).

    Raises:
        ValueError: ``weight`` has another shape; ``backend`` is given and cannot run.
        NotImplementedError: forward-mode or ``torch.func`` derivatives through a kernel that is named, or second
            derivatives through one.
    """
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight: got shape {tuple(weight.shape)}, expected {tuple(x.shape[-1:])}, the last axis of x")
    chosen, _ = choose_for("rms_norm", backend, x, weight)
    if chosen == "naive" or not runs_eagerly(x):
        y = naive.forward(x, weight, eps)
        return y if dtype in (None, y.dtype) else y.to(dtype)
    dtype = torch.promote_types(x.dtype, weight.dtype) if dtype is None else dtype
    if chosen == "triton":
        return normalise(x, weight, None, eps, dtype, False)
    if cpu.reads(x, dtype, None, weight, None):
        return cpu.normalise(x, None, weight, None, eps, False, dtype)[1]
    return naive.forward(x, weight, eps).to(dtype)
