"""The gate in plain PyTorch: the definition that the kernel is held against."""

import torch.nn.functional as F
from torch import Tensor


def forward(x: Tensor, z: Tensor, scale: float) -> Tensor:
    """:func:`backbones.ops.silu_gate`, unchecked."""
    y = x * F.silu(z)
    return y if scale == 1 else y * scale
