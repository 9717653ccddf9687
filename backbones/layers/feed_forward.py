"""Feed-forward layers of channels-last maps. The plain one is timm's ``Mlp``."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.layers.line import Line, are_whole
from backbones.layers.ss2d import DepthwiseConv2d
from backbones.ops.dispatch import kernels
from backbones.patterns.taps import window_taps


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
        self.fc1 = nn.Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.dwconv = DepthwiseConv2d(hidden_dim, gelu=True, residual=residual, device=device, dtype=dtype)
        self.fc2 = nn.Linear(hidden_dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) to (b, h, w, dim)."""
        return self.fc2(self.dwconv(self.fc1(x)))

    def add_to(self, line: Line, x: Tensor) -> None:
        """The layer, of a map like ``x``, as steps of a block's line."""
        line.linear(self.fc1)
        line.add(self._conv_step(line, *x.shape[1:3]))
        line.linear(self.fc2)

    def _conv_step(self, line: Line, height: int, width: int) -> Any:
        weights = line.weights(self.dwconv, DepthwiseConv2d, "weight", "bias")
        if weights is None or not are_whole(*weights):
            return None
        return kernels("steps").Conv(
            weights, *window_taps(height, width, 3, device=line.x.device), self.dwconv.residual
        )


class MultiScaleConvFFN(nn.Module):
    """Linear, GELU, u + sum of depthwise convolutions of u, linear, on (b, h, w, dim): MS-FFN of MSVM-UNet
    (arXiv:2408.13735, section 3.3).

    Args:
        dim: width of the map.
        hidden_dim: width inside.
        kernel_sizes: sides of the windows of the convolutions, which have no biases.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        kernel_sizes: Sequence[int] = (1, 3, 5),
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.convs = nn.ModuleList(
            DepthwiseConv2d(hidden_dim, size, bias=False, device=device, dtype=dtype) for size in kernel_sizes
        )
        self.fc2 = nn.Linear(hidden_dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) to (b, h, w, dim)."""
        x = F.gelu(self.fc1(x))
        y = x
        for conv in self.convs:
            y = y + conv(x)
        return self.fc2(y)
