"""Norms that are fast on the narrow rows of channels-last maps and tokens."""

import torch
from torch import Tensor, nn

from backbones.layers.scan import OnBackend
from backbones.ops import rms_norm
from backbones.ops.fused.layer_norm.operator import layer_norm, runs_on


class LayerNorm(OnBackend, nn.LayerNorm):
    """PyTorch's LayerNorm over the last axis, on a GPU in one Triton kernel.

    Args:
        dim: length of the last axis.
        eps: added to the variance.
        autocast_out: under autocast on a GPU, return autocast's dtype instead of writing float32 that the next
            layer reads once and rounds. For norms in front of a linear layer and within residual branches; the
            stream between the blocks stays in float32.
    """

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        autocast_out: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, eps, device=device, dtype=dtype)
        self.autocast_out = autocast_out

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim)."""
        if self.backend == "naive" or not runs_on(x):
            return super().forward(x)
        dtype = x.dtype
        if torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type) if self.autocast_out else torch.float32
        return layer_norm(x, self.weight, self.bias, self.eps, dtype)


class RMSNorm(OnBackend, nn.RMSNorm):
    """PyTorch's RMSNorm over the last axis, on a CPU in one pass through memory.

    Args:
        dim: length of the last axis.
        eps: added to the mean of squares.
    """

    eps: float

    def __init__(
        self,
        dim: int,
        eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, eps, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim)."""
        return rms_norm(x, self.weight, self.eps, self.backend)
