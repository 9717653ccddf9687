"""The block of Spatial-Mamba and VSSD: convolutions encode positions in front of mixer and MLP."""

from typing import Any

import torch
from timm.layers import DropPath, Mlp
from torch import Tensor, nn

from backbones.layers.constructor import Constructor
from backbones.layers.norm import LayerNorm, residual_norm
from backbones.layers.ss2d import DepthwiseConv2d
from backbones.layers.structure_aware import StructureAwareSSM


class PositionalBlock(nn.Module):
    """Mixer and MLP, each after a convolution that encodes positions; all four are residual.

    With the default mixer it is the block of Spatial-Mamba; with :class:`backbones.layers.NonCausalSSD`, VSSD's.

    Args:
        dim: width of the map.
        mixer: constructor called as ``mixer(dim, device=, dtype=)``.
        mlp_ratio: inner width of the MLP over ``dim``.
        drop_path: rate of stochastic depth, on mixer and MLP.
    """

    def __init__(
        self,
        dim: int,
        mixer: Constructor = StructureAwareSSM,
        mlp_ratio: float = 4.0,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.cpe1 = DepthwiseConv2d(dim, **dd)
        self.norm1 = LayerNorm(dim, autocast_out=True, **dd)
        self.mixer = mixer(dim, **dd)
        self.cpe2 = DepthwiseConv2d(dim, **dd)
        self.norm2 = LayerNorm(dim, autocast_out=True, **dd)
        self.mlp = Mlp(dim, int(mlp_ratio * dim), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) to (b, h, w, dim)."""
        x, y = residual_norm(x, self.cpe1(x), self.norm1)
        x = x + self.drop_path(self.mixer(y))
        x, y = residual_norm(x, self.cpe2(x), self.norm2)
        return x + self.drop_path(self.mlp(y))
