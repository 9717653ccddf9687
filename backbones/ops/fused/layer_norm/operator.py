"""LayerNorm, and RMSNorm: PyTorch's own is slow on narrow rows, and takes several passes through memory."""

from typing import Any

import torch
from torch import Tensor

from backbones.ops.derivatives import first_order
from backbones.ops.dispatch import choose_for, kernels
from backbones.ops.fused.layer_norm import cpu, naive
from backbones.ops.tracing import runs_eagerly

_TRITON = "fused.layer_norm.triton"


def layer_norm(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    eps: float,
    *,
    dtype: torch.dtype | None = None,
    backend: str | None = None,
) -> Tensor:
    """Normalises the last axis of x to mean 0 and variance 1 in float32, then scales and shifts it (arXiv:1607.06450).

    Args:
        x: (..., c).
        weight: (c), or None.
        bias: (c), or None exactly where ``weight`` is.
        eps: added to the variance.
        dtype: of the result; None is that of PyTorch's own, which is the dtype of x and, under autocast on a GPU,
            float32.
        backend: "naive" is PyTorch's operation, "cpu" a C++ kernel for float32 and bfloat16 in one pass through
            memory, "triton" a kernel for GPUs. None takes the fastest that runs on the tensors' device. Compiled and
            exported programs hold PyTorch's operation, which compilers fuse.

    Returns:
        (..., c).

    Raises:
        ValueError: ``weight`` or ``bias`` has another shape, or only one is given; ``backend`` is given and cannot
            run.
        NotImplementedError: forward-mode or ``torch.func`` derivatives through a kernel that is named, or second
            derivatives through one.
    """
    if (weight is None) != (bias is None):
        raise ValueError(f"bias: got {'none' if bias is None else 'one'}, expected one exactly where there is a weight")
    for name, given in (("weight", weight), ("bias", bias)):
        if given is not None and given.shape != x.shape[-1:]:
            raise ValueError(
                f"{name}: got shape {tuple(given.shape)}, expected {tuple(x.shape[-1:])}, the last axis of x"
            )
    chosen, _ = choose_for("layer_norm", backend, x, weight, bias)
    if chosen == "cpu" and cpu.reads(x, x.dtype if dtype is None else dtype, None, weight, bias):
        return cpu.normalise(x, None, weight, bias, eps, True, x.dtype if dtype is None else dtype)[1]
    if chosen != "triton" or not runs_eagerly(x):
        return naive.forward(x, weight, bias, eps, dtype)
    if dtype is None:
        dtype = torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype
    return normalise(x, weight, bias, eps, dtype, True)


def normalise(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype, centred: bool
) -> Tensor:
    """LayerNorm, or RMSNorm unless ``centred``, by the kernel for GPUs."""
    return residual_normalise(x, None, weight, bias, eps, dtype, centred)[1]


def residual_normalise(
    x: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype,
    centred: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """x + branch, or x where that is None, and its norm in ``dtype``, by one kernel for GPUs.

    Used for both, the gradient of x needs no sum of its own, and that of the branch no conversion.
    """
    if torch.is_grad_enabled():
        return _Normalise.apply(x, branch, weight, bias, eps, dtype, centred)
    branch = None if branch is None else branch.contiguous()
    return kernels(_TRITON).forward(x.contiguous(), branch, weight, bias, eps, dtype, centred, False)[:2]


class _Normalise(torch.autograd.Function):
    # Never traced, so it need not be an operator of torch.library, which costs some 50 microseconds a call.

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, branch: Tensor | None, weight: Tensor | None, bias: Tensor | None, eps: float,
        dtype: torch.dtype, centred: bool,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        rows = x.contiguous()
        branch = None if branch is None else branch.contiguous()
        total, y, statistics = kernels(_TRITON).forward(rows, branch, weight, bias, eps, dtype, centred, True)
        ctx.save_for_backward(total, weight, statistics)
        ctx.set_materialize_grads(False)
        ctx.centred, ctx.has_bias, ctx.branch = centred, bias is not None, None if branch is None else branch.dtype
        return x if branch is None else total, y

    @staticmethod
    def backward(ctx: Any, stream: Tensor | None, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:  # nobody reads y
            dbranch = None if stream is None or ctx.branch is None else stream.to(ctx.branch)
            return stream, dbranch, None, None, None, None, None
        total, weight, statistics = ctx.saved_tensors
        stream = None if stream is None else stream.contiguous()
        grad = grad.contiguous()
        results = kernels(_TRITON).backward(grad, stream, total, weight, statistics, ctx.centred, ctx.branch)
        name = "layer_norm" if ctx.centred else "rms_norm"
        dx, dbranch, sums = first_order(name, results, (grad, stream, total, weight))
        dbranch = None if ctx.branch is None else dbranch
        if weight is None:
            return dx, dbranch, None, None, None, None, None
        dweight, dbias = (sums if sums.dtype == weight.dtype else sums.to(weight.dtype)).unbind(0)
        return dx, dbranch, dweight, dbias if ctx.has_bias else None, None, None, None
