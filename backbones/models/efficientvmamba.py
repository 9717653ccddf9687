"""EfficientVMamba: state-space blocks on the two large maps, inverted residuals on the two small ones.

EfficientVMamba: Atrous Selective Scan for Light Weight Visual Mamba, arXiv:2403.09977.
Original: https://github.com/TerryPei/EfficientVMamba, Apache-2.0. Written from the paper and from
measurements of the original, without its code.

The scan is atrous: each of four orders visits one pixel of every 2 x 2 patch, so that together they visit
each pixel once. Where a side is odd the map is padded, and the state decays on the padding. Beside the scan
runs a convolution of the same normalised map, one channel gate weighs both, and the block adds them to its
input.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from backbones.base import Constructor, HierarchicalBackbone, build_model
from backbones.layers import SS2D, LayerNorm, PatchMerging, PatchStem, Scan, channels_first, channels_last
from backbones.layers.convolutions import LocalConv2d, PointwiseConv2d, SqueezeExcite, counts_launches
from backbones.layers.key_rules import BLOCKS, CLASSIFIER, PATCH_MERGING, PATCH_STEM, ss2d_rules
from backbones.layers.norm import residual_norm
from backbones.layers.shapes import bottleneck_width
from backbones.layers.tracing import Opaque
from backbones.patterns import ATROUS
from backbones.weights import KeyRule
from backbones.zoo import default_cfgs as zoo_cfgs


class ChannelGate(Opaque, nn.Module):
    """Weighs the channels of maps by the means of their normalised values, and adds the maps."""

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.norm = LayerNorm(dim, autocast_out=True, device=device, dtype=dtype)
        self.global_reduce = nn.Linear(dim, hidden_dim, device=device, dtype=dtype)
        self.channel_select = nn.Linear(hidden_dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """Two maps (b, h, w, dim) to one."""
        if not counts_launches(x):
            return x * self._weight(x) + y * self._weight(y)
        both = torch.cat((x, y))  # a copy, for half the launches
        pair = (2, x.shape[0])
        both, weight = both.unflatten(0, pair), self._weight(both).unflatten(0, pair)
        return (both * weight).sum(0, dtype=both.dtype)  # autocast's default is float32

    def _weight(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) to (b, 1, 1, dim)."""
        hidden = F.gelu(self.global_reduce(self.norm(x).mean((1, 2), keepdim=True)))
        return torch.sigmoid(self.channel_select(hidden))


class EVSSBlock(nn.Module):
    """x + gate(mixer(norm(x))) + gate(conv(norm(x))), one gate for both branches (EfficientVMamba, 4.2).

    Args:
        dim: width of the map.
        mixer: constructor called as ``mixer(dim, device=, dtype=)``.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        mixer: Constructor,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.norm1 = LayerNorm(dim, autocast_out=True, **dd)
        self.mixer = mixer(dim, **dd)
        self.conv_branch = nn.Sequential(
            LocalConv2d(dim, **dd),
            nn.BatchNorm2d(dim, **dd),
            nn.GELU(),
            PointwiseConv2d(dim, dim, **dd),
        )
        self.se = ChannelGate(dim, bottleneck_width(dim, 8), **dd)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) to (b, h, w, dim)."""
        x, y = self.chained(x, None)
        return x + y

    def chained(self, x: Tensor, pending: Tensor | None) -> tuple[Tensor, Tensor]:
        """The block of x + pending, its last sum left to what comes behind: see `backbones.base.chain.run_chain`."""
        x, y = residual_norm(x, pending, self.norm1)
        local = channels_last(self.conv_branch(channels_first(y)))
        return x, self.drop_path(self.se(self.mixer(y), local))


class InvertedResidual(nn.Module):
    """Widen, convolve depthwise, squeeze and excite, narrow, and add (MobileNetV3, section 3), with ReLU.

    Args:
        dim: width of the map.
        expand_ratio: inner width over ``dim``.
        drop_path: rate of stochastic depth.
    """

    def __init__(
        self,
        dim: int,
        expand_ratio: int = 4,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        hidden_dim = expand_ratio * dim
        self.conv_pw = nn.Sequential(
            PointwiseConv2d(dim, hidden_dim, bias=False, **dd),
            nn.BatchNorm2d(hidden_dim, **dd),
            nn.ReLU(inplace=True),
        )
        self.conv_dw = nn.Sequential(
            LocalConv2d(hidden_dim, bias=False, **dd),
            nn.BatchNorm2d(hidden_dim, **dd),
            nn.ReLU(inplace=True),
        )
        self.se = SqueezeExcite(hidden_dim, max(1, hidden_dim // 8), **dd)
        self.conv_pw2 = nn.Sequential(PointwiseConv2d(hidden_dim, dim, bias=False, **dd), nn.BatchNorm2d(dim, **dd))
        self.drop_path = DropPath(drop_path) if drop_path > 0 else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) to (b, h, w, dim)."""
        y = self.se(self.conv_dw(self.conv_pw(channels_first(x))))
        return x + self.drop_path(channels_last(self.conv_pw2(y)))


def _convolutional_stage_rules(stage: int, depth: int) -> list[KeyRule]:
    """Officially such a stage is one sequence: permutation, blocks from 1 on, permutation, downsampling."""
    rules = []
    for i in range(depth):
        official, ours = f"layers.{stage}.{i + 1}.", f"stages.{stage}.blocks.{i}."
        rules += [
            KeyRule(official + "se.conv_reduce.{}", ours + "se.fc1.{}"),
            KeyRule(official + "se.conv_expand.{}", ours + "se.fc2.{}"),
            KeyRule(official + "{*}", ours + "{*}"),
        ]
    return [*rules, KeyRule(f"layers.{stage}.{depth + 2}.{{*}}", f"downsamples.{stage}.{{*}}")]


class EfficientVMamba(HierarchicalBackbone):
    """EfficientVMamba. See :class:`backbones.base.HierarchicalBackbone` for its arguments."""

    defaults: ClassVar = {"stem": PatchStem, "downsample": PatchMerging}

    @property
    def key_rules(self) -> Sequence[KeyRule]:  # type: ignore[override]
        """Official names, which depend on the depths of the convolutional stages."""
        rules: list[KeyRule] = []
        for stage in range(2, len(self.depths)):
            rules += _convolutional_stage_rules(stage, self.depths[stage])
        return (*rules, *PATCH_STEM, *PATCH_MERGING, *ss2d_rules(), *BLOCKS, *CLASSIFIER)


def _create_efficientvmamba(
    variant: str, pretrained: bool, *, d_state: int = 16, ssm_ratio: float = 2.0, **kwargs: Any
) -> nn.Module:
    scan = Scan.pop(kwargs, ATROUS)
    scanning = partial(EVSSBlock, mixer=partial(SS2D, scan=scan, d_state=d_state, ssm_ratio=ssm_ratio))
    blocks = (scanning, scanning, InvertedResidual, InvertedResidual)
    return build_model(EfficientVMamba, variant, pretrained, scan=scan, block=blocks, **kwargs)


default_cfgs = generate_default_cfgs(zoo_cfgs("efficientvmamba"))


@register_model
def efficientvmamba_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EfficientVMamba-T, 6 M parameters."""
    args = {"depths": (2, 2, 4, 2), "dims": (48, 96, 192, 384)}
    return _create_efficientvmamba("efficientvmamba_tiny", pretrained, **dict(args, **kwargs))


@register_model
def efficientvmamba_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EfficientVMamba-S, 11 M parameters. The paper's table gives it B's widths, its weights have these."""
    args = {"depths": (2, 2, 4, 2), "dims": (64, 128, 256, 512)}
    return _create_efficientvmamba("efficientvmamba_small", pretrained, **dict(args, **kwargs))


@register_model
def efficientvmamba_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """EfficientVMamba-B, 34 M parameters."""
    args = {"depths": (2, 2, 9, 2), "dims": (96, 192, 384, 768)}
    return _create_efficientvmamba("efficientvmamba_base", pretrained, **dict(args, **kwargs))
