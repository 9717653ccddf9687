"""LayerNorm, and RMSNorm, for the GPUs on which PyTorch's own is slow on narrow rows."""

from typing import Any

import torch
from torch import Tensor

from backbones.ops.derivatives import first_order
from backbones.ops.dispatch import choose_for
from backbones.ops.fused.layer_norm import naive
from backbones.ops.tracing import runs_eagerly


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
        backend: "naive" is PyTorch's operation, "triton" a kernel for GPUs, "cpu" PyTorch's operation, as there is no
            kernel. None takes the fastest that runs on the tensors' device. Compiled and exported programs hold
            PyTorch's operation, which compilers fuse.

    Returns:
        (..., c).

    Raises:
        ValueError: ``weight`` or ``bias`` has another shape, or only one is given; ``backend`` is given and cannot
            run.
        NotImplementedError: forward-mode or ``torch.func`` derivatives through "triton" where it is given, or second
            derivatives through it.
    """
    if (weight is None) != (bias is None):
        raise ValueError(f"bias: got {'none' if bias is None else 'one'}, expected one exactly where there is a weight")
    for name, given in (("weight", weight), ("bias", bias)):
        if given is not None and given.shape != x.shape[-1:]:
            raise ValueError(
                f"{name}: got shape {tuple(given.shape)}, expected {tuple(x.shape[-1:])}, the last axis of x"
            )
    chosen, _ = choose_for("layer_norm", backend, x, weight, bias)
    if chosen != "triton" or not runs_eagerly(x):
        return naive.forward(x, weight, bias, eps, dtype)
    if dtype is None:
        dtype = torch.float32 if torch.is_autocast_enabled(x.device.type) else x.dtype
    return Normalise.apply(x, weight, bias, eps, dtype, True)


class Normalise(torch.autograd.Function):
    """LayerNorm, or RMSNorm unless ``centred``."""

    # Never traced, so it need not be an operator of torch.library, which costs some 50 microseconds a call.

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype, centred: bool
    ) -> Tensor:
        from backbones.ops.fused.layer_norm import triton

        x = x.contiguous()
        y, statistics = triton.forward(x, weight, bias, eps, dtype, centred)
        ctx.save_for_backward(x, weight, statistics)
        ctx.centred, ctx.has_bias = centred, bias is not None
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        from backbones.ops.fused.layer_norm import triton

        x, weight, statistics = ctx.saved_tensors
        results = triton.backward(grad.contiguous(), x, weight, statistics, ctx.centred)
        dx, sums = first_order("layer_norm" if ctx.centred else "rms_norm", results, (grad, x, weight))
        if weight is None:
            return dx, None, None, None, None, None
        dweight, dbias = sums.to(weight.dtype)
        return dx, dweight, dbias if ctx.has_bias else None, None, None, None
