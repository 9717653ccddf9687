"""Convolutions of maps (b, c, h, w) that are channels-last in memory, in few launches on a GPU."""

from __future__ import annotations

from typing import ClassVar

import timm.layers
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.layers.autocast import autocast_dtype
from backbones.layers.resolution import channels_first, channels_last
from backbones.layers.ss2d import DepthwiseConv2d
from backbones.layers.tracing import Opaque

_HALVES = (torch.bfloat16, torch.float16)


def counts_launches(x: Tensor) -> bool:
    """Whether the number of operations is what takes the time: on a GPU."""
    return x.is_cuda


def _multiplies(x: Tensor) -> bool:
    """Whether a 1 x 1 convolution of ``x`` is done as a product, which is fewer launches.

    Not in float32, where PyTorch lets convolutions use TF32, and products not.
    """
    return counts_launches(x) and not torch.compiler.is_compiling() and (autocast_dtype(x) or x.dtype) in _HALVES


class PointwiseConv2d(Opaque, nn.Conv2d):
    """A 1 x 1 convolution; in half precision on a GPU a matrix product.

    Args:
        in_channels, out_channels: widths of the maps.
        bias: whether there is a bias.
    """

    autocast_weights: ClassVar[tuple[str, ...]] = ("weight", "bias")

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        bias: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(in_channels, out_channels, 1, bias=bias, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(b, in_channels, h, w) to (b, out_channels, h, w)."""
        if not _multiplies(x):
            return super().forward(x)
        return channels_first(F.linear(channels_last(x), self.weight.flatten(1), self.bias))


class SqueezeExcite(timm.layers.SqueezeExcite):
    """timm's, weighs the channels of a map by their means (arXiv:1709.01507); with `PointwiseConv2d`.

    Args:
        dim: width of the map.
        hidden_dim: width between both convolutions.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(dim, rd_channels=hidden_dim, device=device, dtype=dtype)
        self.fc1 = PointwiseConv2d(dim, hidden_dim, device=device, dtype=dtype)
        self.fc2 = PointwiseConv2d(hidden_dim, dim, device=device, dtype=dtype)


class LocalConv2d(DepthwiseConv2d):
    """A depthwise convolution of a map that is channels-last in memory; on a GPU that of `DepthwiseConv2d`."""

    def forward(self, x: Tensor) -> Tensor:
        """(b, dim, h, w) to (b, dim, h, w)."""
        if not counts_launches(x):
            return nn.Conv2d.forward(self, x)
        return channels_first(super().forward(channels_last(x)))
