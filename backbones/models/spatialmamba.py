"""Spatial-Mamba: one raster scan whose states, not outputs, are mixed with their neighbours in the plane.

Spatial-Mamba: Effective Visual State Space Models via Structure-Aware State Fusion, arXiv:2410.15091.
Original: https://github.com/EdwardChasel/Spatial-Mamba, Apache-2.0. Written from the paper and from
measurements of the original, without its code.

A convolutional stem and four stages. A layer scans its map once, row by row, with one state for each channel;
the map of states is convolved by three depthwise 3 x 3 kernels of dilation 1, 3 and 5, added up; only then do
C and D turn states into outputs. A single direction is enough: later cells reach a state through the fusion.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from timm.models import generate_default_cfgs, register_model
from torch import nn

from backbones.base import HierarchicalBackbone, build_model
from backbones.layers import (
    PositionalBlock,
    ResidualConvStem,
    Scan,
    StateFusion,
    StructureAwareSSM,
    WideDownsample,
)
from backbones.layers.key_rules import RESIDUAL_STEM
from backbones.patterns import FORWARD
from backbones.weights import ONE_ORDER, SQUEEZE_1, KeyRule
from backbones.zoo import default_cfgs as zoo_cfgs

_BLOCK = "layers.{}.blocks.{}."
_MIXER = _BLOCK + "self_attention."
_OUR_BLOCK = "stages.{}.blocks.{}."
_OUR_MIXER = _OUR_BLOCK + "mixer."


class SpatialMamba(HierarchicalBackbone):
    """Spatial-Mamba. See :class:`backbones.base.HierarchicalBackbone` for its arguments."""

    defaults: ClassVar = {"stem": ResidualConvStem, "downsample": WideDownsample}
    key_rules = (
        *RESIDUAL_STEM,
        KeyRule(_MIXER + "x_proj_weight", _OUR_MIXER + "ssm.x_proj_weight", ONE_ORDER),
        KeyRule(_MIXER + "dt_projs_weight", _OUR_MIXER + "ssm.dt_proj_weight", ONE_ORDER),
        KeyRule(_MIXER + "dt_projs_bias", _OUR_MIXER + "ssm.dt_proj_bias", ONE_ORDER),
        KeyRule(_MIXER + "A_logs", _OUR_MIXER + "ssm.A_log", ONE_ORDER),
        KeyRule(_MIXER + "Ds", _OUR_MIXER + "ssm.D", ONE_ORDER),
        KeyRule(
            tuple(_MIXER + f"state_fusion.{name}" for name in ("kernel_3", "kernel_3_1", "kernel_3_2")),
            _OUR_MIXER + "fusion.weight",
            SQUEEZE_1,
        ),
        KeyRule(_MIXER + "state_fusion.alpha", _OUR_MIXER + "fusion.alpha"),
        KeyRule(_MIXER + "{*}", _OUR_MIXER + "{*}"),
        KeyRule(_BLOCK + "ln_1.{}", _OUR_BLOCK + "norm1.{}"),
        KeyRule(_BLOCK + "ln_2.{}", _OUR_BLOCK + "norm2.{}"),
        KeyRule("layers.{}.blocks.{*}", "stages.{}.blocks.{*}"),
        KeyRule("head.{}", "head.fc.{}"),
    )

    def fuse(self) -> SpatialMamba:
        """Merges the three kernels of every state fusion into one of 11 x 11, for deployment; returns itself.

        It computes the same function, as one convolution instead of three. Weights keep their names and
        values; gradients reach the input, but not the kernels. ``train()`` and loading weights undo it; after
        other changes of the weights call it again.

        Raises:
            RuntimeError: the model is in training mode.
        """
        for module in self.modules():
            if isinstance(module, StateFusion):
                module.fuse()
        return self


def _create_spatialmamba(variant: str, pretrained: bool, *, mlp_ratio: float = 4.0, **kwargs: Any) -> nn.Module:
    scan = Scan.pop(kwargs, FORWARD)
    block = partial(PositionalBlock, mixer=partial(StructureAwareSSM, scan=scan), mlp_ratio=mlp_ratio)
    return build_model(SpatialMamba, variant, pretrained, scan=scan, block=block, **kwargs)


default_cfgs = generate_default_cfgs(zoo_cfgs("spatialmamba"))


@register_model
def spatialmamba_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Spatial-Mamba-T, 27 M parameters."""
    args = {"depths": (2, 4, 8, 4), "dims": (64, 128, 256, 512)}
    return _create_spatialmamba("spatialmamba_tiny", pretrained, **dict(args, **kwargs))


@register_model
def spatialmamba_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Spatial-Mamba-S, 43 M parameters: as wide as the tiny model, and deeper."""
    args = {"depths": (2, 4, 21, 5), "dims": (64, 128, 256, 512)}
    return _create_spatialmamba("spatialmamba_small", pretrained, **dict(args, **kwargs))


@register_model
def spatialmamba_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Spatial-Mamba-B, 96 M parameters."""
    args = {"depths": (2, 4, 21, 5), "dims": (96, 192, 384, 768)}
    return _create_spatialmamba("spatialmamba_base", pretrained, **dict(args, **kwargs))
