"""VMamba: four stages of blocks that scan their map by rows and by columns, both ways.

VMamba: Visual State Space Model, arXiv:2401.10166.
Original: https://github.com/MzeroMiko/VMamba, MIT. Written from the paper and from measurements of the
original, without its code.

A mixer projects the map, convolves it depthwise, and scans it along four orders (SS2D), each with
state-space parameters of its own; their outputs are added, normalised and projected back. The first
generation ("vanilla") has 16 states for each channel, gates the result with a second projection, and has no
feed-forward layer. The second drops the gate, needs a single state, and pairs every mixer with an MLP;
"s2l5" means an inner width twice that of the map (ssm_ratio 2) and five blocks in the third stage.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

from timm.layers import Mlp
from timm.models import generate_default_cfgs, register_model
from torch import nn

from backbones.base import Constructor, HierarchicalBackbone, build_model
from backbones.layers import SS2D, ConvDownsample, ConvStem, MultiHeadScan, PatchMerging, PatchStem, Scan
from backbones.layers.key_rules import (
    BLOCKS,
    CLASSIFIER,
    CONV_DOWNSAMPLE,
    CONV_STEM,
    LINEAR,
    PATCH_MERGING,
    PATCH_STEM,
    ss2d_rules,
)
from backbones.layers.vss_block import VSSBlock
from backbones.patterns import CROSS
from backbones.weights import KeyRule
from backbones.zoo import default_cfgs as zoo_cfgs


class VMamba(HierarchicalBackbone):
    """VMamba of the second generation. See :class:`backbones.base.HierarchicalBackbone` for its arguments."""

    defaults: ClassVar = {"stem": ConvStem, "downsample": ConvDownsample}
    key_rules = (
        *CONV_STEM,
        *CONV_DOWNSAMPLE,
        *ss2d_rules(),
        KeyRule("layers.{}.blocks.{}.mlp.{}.weight", "stages.{}.blocks.{}.mlp.{}.weight", LINEAR),
        *BLOCKS,
        *CLASSIFIER,
    )


class VanillaVMamba(HierarchicalBackbone):
    """VMamba of the first generation. See :class:`backbones.base.HierarchicalBackbone` for its arguments."""

    defaults: ClassVar = {"stem": PatchStem, "downsample": PatchMerging}
    key_rules = (*PATCH_STEM, *PATCH_MERGING, *ss2d_rules(), *BLOCKS, *CLASSIFIER)


def _create_vmamba(
    variant: str, pretrained: bool, *, d_state: int = 1, ssm_ratio: float = 2.0, mlp_ratio: float = 4.0, **kwargs: Any
) -> nn.Module:
    scan = Scan.pop(kwargs, CROSS)
    mixer = partial(SS2D, scan=scan, d_state=d_state, ssm_ratio=ssm_ratio, gated=False, conv_bias=False)
    block = partial(VSSBlock, mixer=mixer, mlp=Mlp, mlp_ratio=mlp_ratio)
    return build_model(VMamba, variant, pretrained, scan=scan, block=block, **kwargs)


def _create_vanilla_vmamba(
    variant: str, pretrained: bool, *, d_state: int = 16, ssm_ratio: float = 2.0, heads: Sequence[str] | None = None,
    threshold: float = 0.0, **kwargs: Any,
) -> nn.Module:  # fmt: skip
    """``heads`` are the patterns of multi-head scanning, with ``threshold``, see `_multi_head`."""
    if threshold and heads is None:
        raise ValueError(f"threshold: got {threshold} without heads, whose gates it belongs to")
    scan = Scan.pop(kwargs, CROSS)
    mixer = partial(SS2D, scan=scan, d_state=d_state, ssm_ratio=ssm_ratio)
    block = partial(VSSBlock, mixer=mixer if heads is None else _multi_head(scan, d_state, heads, threshold))
    return build_model(VanillaVMamba, variant, pretrained, scan=scan, block=block, **kwargs)


def _multi_head(scan: Scan, d_state: int, heads: Sequence[str], threshold: float) -> Constructor:
    """The mixer of MHS-VM, as wide inside as outside: `MultiHeadScan` replaces the scan and the output's projection."""
    scanner = partial(MultiHeadScan, patterns=heads, threshold=threshold, d_state=d_state, backend=scan.backend)
    return partial(SS2D, ssm_ratio=1.0, scanner=scanner, out_proj=False)


default_cfgs = generate_default_cfgs(zoo_cfgs("vmamba"))

_TINY_DIMS = (96, 192, 384, 768)  # of small, too
_BASE_DIMS = (128, 256, 512, 1024)


@register_model
def vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VMamba-T of the authors' front page: vmamba_tiny_s1l8."""
    return vmamba_tiny_s1l8(pretrained, **kwargs)


@register_model
def vmamba_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VMamba-S of the authors' front page: vmamba_small_s2l15."""
    return vmamba_small_s2l15(pretrained, **kwargs)


@register_model
def vmamba_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VMamba-B of the authors' front page: vmamba_base_s2l15."""
    return vmamba_base_s2l15(pretrained, **kwargs)


@register_model
def vmamba_tiny_s1l8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VMamba-T, 30 M parameters, inner width as the map's, 14 blocks."""
    args = {"depths": (2, 2, 8, 2), "dims": _TINY_DIMS, "ssm_ratio": 1.0}
    return _create_vmamba("vmamba_tiny_s1l8", pretrained, **dict(args, **kwargs))


@register_model
def vmamba_tiny_s2l5(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VMamba-T, 31 M parameters, inner width twice the map's, 11 blocks."""
    args = {"depths": (2, 2, 5, 2), "dims": _TINY_DIMS, "ssm_ratio": 2.0}
    return _create_vmamba("vmamba_tiny_s2l5", pretrained, **dict(args, **kwargs))


@register_model
def vmamba_small_s1l20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VMamba-S, 49 M parameters, inner width as the map's, 26 blocks."""
    args = {"depths": (2, 2, 20, 2), "dims": _TINY_DIMS, "ssm_ratio": 1.0}
    return _create_vmamba("vmamba_small_s1l20", pretrained, **dict(args, **kwargs))


@register_model
def vmamba_small_s2l15(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VMamba-S, 50 M parameters, inner width twice the map's, 21 blocks."""
    args = {"depths": (2, 2, 15, 2), "dims": _TINY_DIMS, "ssm_ratio": 2.0}
    return _create_vmamba("vmamba_small_s2l15", pretrained, **dict(args, **kwargs))


@register_model
def vmamba_base_s1l20(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VMamba-B, 87 M parameters, inner width as the map's, 26 blocks."""
    args = {"depths": (2, 2, 20, 2), "dims": _BASE_DIMS, "ssm_ratio": 1.0}
    return _create_vmamba("vmamba_base_s1l20", pretrained, **dict(args, **kwargs))


@register_model
def vmamba_base_s2l15(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VMamba-B, 89 M parameters, inner width twice the map's, 21 blocks."""
    args = {"depths": (2, 2, 15, 2), "dims": _BASE_DIMS, "ssm_ratio": 2.0}
    return _create_vmamba("vmamba_base_s2l15", pretrained, **dict(args, **kwargs))


@register_model
def vanilla_vmamba_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VMamba-T of the first generation, 23 M parameters."""
    args = {"depths": (2, 2, 9, 2), "dims": _TINY_DIMS}
    return _create_vanilla_vmamba("vanilla_vmamba_tiny", pretrained, **dict(args, **kwargs))


@register_model
def vanilla_vmamba_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VMamba-S of the first generation, 44 M parameters."""
    args = {"depths": (2, 2, 27, 2), "dims": _TINY_DIMS}
    return _create_vanilla_vmamba("vanilla_vmamba_small", pretrained, **dict(args, **kwargs))


@register_model
def vanilla_vmamba_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VMamba-B of the first generation, 76 M parameters."""
    args = {"depths": (2, 2, 27, 2), "dims": _BASE_DIMS}
    return _create_vanilla_vmamba("vanilla_vmamba_base", pretrained, **dict(args, **kwargs))
