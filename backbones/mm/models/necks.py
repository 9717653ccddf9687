"""A feature pyramid for backbones that have all their maps at one stride."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.nn.functional as F
from mmengine.model import BaseModule
from mmengine.registry import MODELS
from timm.layers import LayerNorm2d
from torch import Tensor, nn

from backbones.mm.errors import UserError

MODELS.register_module(module=LayerNorm2d)


@MODELS.register_module()
class SimpleFeaturePyramid(BaseModule):
    """Maps of strides 4, 8, 16 and 32 from one map of a plain backbone (ViTDet, arXiv:2203.16527, section 3).

    Each level scales the one map by transposed convolutions or max-pooling, which narrow it to a half of its
    width for a factor of 2 and to a quarter for a factor of 4, and ends in a 1 x 1 and a 3 x 3 convolution,
    both with a layer norm over channels.

    Args:
        in_channels: width of the backbone's map.
        out_channels: width of the levels.
        num_outs: number of levels; from the fifth on, each takes every second cell of the one before.
        stride: stride of the backbone's map, 8 or 16 pixels.

    Raises:
        UserError: another stride, or fewer than 4 levels.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int = 256,
        num_outs: int = 4,
        stride: int = 16,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if stride not in (8, 16):
            raise UserError(f"stride: got {stride}, expected 8 or 16, the distance between the backbone's patches")
        if num_outs < 4:
            raise UserError(f"num_outs: got {num_outs}, expected at least the 4 levels of strides 4, 8, 16 and 32")
        self.num_outs = num_outs
        self.levels = nn.ModuleList(_level(in_channels, out_channels, stride / out) for out in (4, 8, 16, 32))

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """One map (b, in_channels, h, w), in a sequence, to ``num_outs`` maps (b, out_channels, ., .).

        Raises:
            UserError: the backbone gives several maps.
        """
        if len(inputs) != 1:
            raise UserError(
                f"SimpleFeaturePyramid takes one map, got {len(inputs)}: give the backbone one of out_indices"
            )
        outputs = [level(inputs[0]) for level in self.levels]
        for _ in range(self.num_outs - len(outputs)):
            outputs.append(F.max_pool2d(outputs[-1], kernel_size=1, stride=2))
        return tuple(outputs)


def _level(in_channels: int, out_channels: int, scale: float) -> nn.Sequential:
    """(b, in_channels, h, w) to (b, out_channels, scale * h, scale * w), rounded up."""
    layers: list[nn.Module] = []
    width = in_channels
    if scale == 4:
        layers += [nn.ConvTranspose2d(width, width // 2, 2, 2), LayerNorm2d(width // 2), nn.GELU()]
        width //= 2
    if scale > 1:
        layers.append(nn.ConvTranspose2d(width, width // 2, 2, 2))
        width //= 2
    if scale < 1:
        layers.append(nn.MaxPool2d(round(1 / scale), ceil_mode=True))
    return nn.Sequential(
        *layers,
        nn.Conv2d(width, out_channels, 1, bias=False),
        LayerNorm2d(out_channels),
        nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False),
        LayerNorm2d(out_channels),
    )
