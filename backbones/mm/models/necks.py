"""Feature pyramids for backbones whose maps have one stride, or none of the fine strides that detectors want."""

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


@MODELS.register_module()
class FinerFPN(BaseModule):
    """A feature pyramid (arXiv:1612.03144) with levels that are finer than the backbone's finest map.

    A layer norm over channels stands before each lateral 1 x 1 convolution. A finer level is the transposed convolution
    of the one below it, a coarser level takes every second cell. EfficientViM's authors detect so: of strides 16 to 64
    ``finer=2`` makes 4 to 64 for Mask R-CNN, and ``finer=1`` with five levels 8 to 128 for RetinaNet.

    Args:
        in_channels: width of each of the backbone's maps, from the finest on; each has twice the stride of the one
            before.
        out_channels: width of the levels.
        finer: levels above the backbone's maps.
        num_outs: number of levels.

    Raises:
        UserError: ``finer`` is negative, or ``num_outs`` below the number of maps and finer levels.
    """

    def __init__(
        self,
        in_channels: Sequence[int],
        out_channels: int = 256,
        finer: int = 0,
        num_outs: int = 5,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(init_cfg)
        if finer < 0:
            raise UserError(f"finer: got {finer}, expected a number of levels")
        if num_outs < finer + len(in_channels):
            raise UserError(
                f"num_outs: got {num_outs}, expected at least {finer} finer levels and {len(in_channels)} maps"
            )
        self.num_outs = num_outs
        self.laterals = nn.ModuleList(
            nn.Sequential(LayerNorm2d(width, eps=1e-5), nn.Conv2d(width, out_channels, 1)) for width in in_channels
        )
        self.upsamples = nn.ModuleList(nn.ConvTranspose2d(out_channels, out_channels, 2, 2) for _ in range(finer))
        self.outputs = nn.ModuleList(
            nn.Conv2d(out_channels, out_channels, 3, padding=1) for _ in range(finer + len(in_channels))
        )

    def forward(self, inputs: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Maps (b, in_channels[i], h, w) to ``num_outs`` maps (b, out_channels, ., .), from the finest on.

        Raises:
            UserError: the backbone gives another number of maps.
        """
        if len(inputs) != len(self.laterals):
            raise UserError(
                f"FinerFPN takes {len(self.laterals)} maps, got {len(inputs)}: see out_indices, in_channels"
            )
        levels = [lateral(x) for lateral, x in zip(self.laterals, inputs, strict=True)]
        for i in range(len(levels) - 1, 0, -1):
            levels[i - 1] = levels[i - 1] + F.interpolate(levels[i], size=levels[i - 1].shape[-2:], mode="nearest")
        for upsample in self.upsamples:
            levels.insert(0, upsample(levels[0]))
        outputs = [output(x) for output, x in zip(self.outputs, levels, strict=True)]
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
