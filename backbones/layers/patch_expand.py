"""Where a decoder widens the resolution of a channels-last map: the counterparts of stems and downsampling."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from einops import rearrange
from timm.layers import ConvNormAct
from torch import Tensor, nn

from backbones.layers.constructor import Constructor
from backbones.layers.norm import LayerNorm
from backbones.layers.resolution import channels_first, channels_last
from backbones.layers.ss2d import DepthwiseConv2d
from backbones.layers.tracing import Opaque


def pixel_blocks(x: Tensor, scale: int) -> Tensor:
    """Every cell's channels as a block of cells."""
    return rearrange(x, "b h w (row column c) -> b (h row) (w column) c", row=scale, column=scale)


class PatchExpand(Opaque, nn.Module):
    """A linear layer to a block of cells for each cell, and a norm (Swin-Unet, arXiv:2105.05537, section 3.4).

    Args:
        dim: width of the map.
        out_dim: width of the result.
        scale: cells along each side of a block.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        scale: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.expand = nn.Linear(dim, scale**2 * out_dim, bias=False, device=device, dtype=dtype)
        self.norm = LayerNorm(out_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) to (b, scale h, scale w, out_dim)."""
        return self.norm(pixel_blocks(self.expand(x), self.scale))


class LargeKernelPatchExpand(Opaque, nn.Module):
    """`PatchExpand` whose blocks see their neighbours: linear, batch norm, ReLU, depthwise 3 x 3, blocks, norm.

    MSVM-UNet's LKPE, and with ``scale`` 4 its FLKPE (arXiv:2408.13735, section 3.4).

    Args:
        dim: width of the map.
        out_dim: width of the result.
        scale: cells along each side of a block.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        scale: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.scale = scale
        hidden_dim = scale**2 * out_dim
        self.expand = ConvNormAct(dim, hidden_dim, bias=True, device=device, dtype=dtype)
        self.conv = DepthwiseConv2d(hidden_dim, device=device, dtype=dtype)
        self.norm = LayerNorm(out_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) to (b, scale h, scale w, out_dim)."""
        x = self.conv(channels_last(self.expand(channels_first(x))).contiguous())
        return self.norm(pixel_blocks(x, self.scale))


class BilinearExpand(nn.Module):
    """A linear layer, a norm and bilinear interpolation.

    Args:
        dim: width of the map.
        out_dim: width of the result.
        scale: factor of the resolution.
    """

    def __init__(
        self,
        dim: int,
        out_dim: int,
        scale: int = 2,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.proj = nn.Linear(dim, out_dim, bias=False, device=device, dtype=dtype)
        self.norm = LayerNorm(out_dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) to (b, scale h, scale w, out_dim)."""
        x = channels_first(self.norm(self.proj(x)))
        return channels_last(F.interpolate(x, scale_factor=self.scale, mode="bilinear", align_corners=False))


EXPANSIONS: dict[str, Constructor] = {
    "expand": PatchExpand,
    "lkpe": LargeKernelPatchExpand,
    "bilinear": BilinearExpand,
}
