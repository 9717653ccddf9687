"""The depthwise convolution in plain PyTorch: the definition that every other backend is held against."""

from functools import reduce

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.ops.derivatives import gradients


def forward(
    x: Tensor, weight: Tensor, bias: Tensor | None, taps: Tensor, inverse_taps: Tensor, silu: bool
) -> Tensor:  # fmt: skip
    """:func:`backbones.ops.depthwise_conv`, stored and returned as (k, b, m, c). Differentiable any number of times."""
    for name, table, tensor, what in (("taps", taps, x, "token"), ("inverse_taps", inverse_taps, taps, "output")):
        low, high = (int(i) for i in torch.aminmax(table))
        last = (x.shape[1] if tensor is x else taps.shape[2]) - 1
        if low < -1 or high > last:
            raise ValueError(f"{name}: found {what} {low if low < -1 else high}, expected -1..{last}")
    return _convolve(x, weight, bias, taps, silu)


def _convolve(x: Tensor, weight: Tensor, bias: Tensor | None, taps: Tensor, silu: bool) -> Tensor:
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    with torch.autocast(x.device.type, enabled=False):
        padded = F.pad(x.to(dtype), (0, 0, 0, 1))  # -1 is its last token, a zero
        read = (padded[:, tokens].transpose(0, 1) for tokens in taps.long().unbind(1))  # (k, b, m, c) a tap
        y = reduce(torch.add, (w[:, None, None] * t for w, t in zip(weight.unbind(2), read, strict=True)))
        if bias is not None:
            y = y + bias[:, None, None]
        return (F.silu(y) if silu else y).to(x.dtype).contiguous()


def backward(
    grad: Tensor, x: Tensor, weight: Tensor, bias: Tensor | None, taps: Tensor, inverse_taps: Tensor, silu: bool
) -> tuple[Tensor, ...]:
    """Gradients of x, weight and bias, the last one without elements where there is no bias."""
    found = gradients(lambda x, weight, bias: _convolve(x, weight, bias, taps, silu), (x, weight, bias), grad)
    return tuple(weight.new_empty(0) if t is None else t for t in found)
