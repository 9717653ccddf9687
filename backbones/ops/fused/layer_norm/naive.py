"""LayerNorm in plain PyTorch: the definition that the kernel is held against."""

import torch
import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float, dtype: torch.dtype | None) -> Tensor:
    """:func:`backbones.ops.layer_norm`, unchecked."""
    y = F.layer_norm(x, x.shape[-1:] if weight is None else weight.shape, weight, bias, eps)
    return y if dtype is None else y.to(dtype)
