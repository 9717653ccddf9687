"""Feed-forward layers of channels-last maps. The plain one is timm's ``Mlp``."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.layers.ss2d import DepthwiseConv2d


class ConvFFN(nn.Module):
    """Linear, depthwise 3 x 3 convolution, GELU, linear, on (b, h, w, dim).

    Args:
        dim: width of the map.
        hidden_dim: width inside.
        residual: add the convolution to its input instead of replacing it.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        residual: bool,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.residual = residual
        self.fc1 = nn.Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.dwconv = DepthwiseConv2d(hidden_dim, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) to (b, h, w, dim)."""
        x = self.fc1(x)
        y = self.dwconv(x)
        return self.fc2(F.gelu(x + y if self.residual else y))
