"""MSVMamba: one scan of the full map, and one recurrence that walks a map of half its resolution three times.

Multi-Scale VMamba: Hierarchy in Hierarchy Visual State Space Model, arXiv:2405.14174.
Original: https://github.com/YuHengsss/MSVMamba, which states no licence. Written from the paper and from
measurements of the original, without its code.

Of VMamba's four scans, only the row-major one keeps the full resolution. The other three read a map that a
strided convolution has halved, and follow one another as a single sequence: the state goes on from the end
of one walk to the start of the next, and the three share their parameters. Squeeze-and-excitation and a
convolutional feed-forward layer mix channels. The NeurIPS version ("msvmambav3") is as wide inside as
outside, has wider feed-forward layers that are normalised after instead of before, one norm of both scans'
sum instead of one for each, nearest instead of bilinear upsampling, and, but for the base model, no gate.
"""

from __future__ import annotations

from functools import partial
from typing import Any, ClassVar

from timm.models import generate_default_cfgs, register_model
from torch import nn

from backbones.base import HierarchicalBackbone, build_model
from backbones.layers import (
    ConvDownsample,
    ConvFFN,
    ConvStem,
    MultiScaleSS2D,
    PatchMerging,
    PatchStem,
    Scan,
    VSSBlock,
)
from backbones.layers.key_rules import (
    BLOCKS,
    CLASSIFIER,
    CONV_DOWNSAMPLE,
    CONV_STEM,
    LINEAR,
    PATCH_MERGING,
    PATCH_STEM,
    POINTWISE,
    grouped,
)
from backbones.patterns import MULTI_SCALE
from backbones.weights import WEIGHT_KEYS, KeyRule, Layout
from backbones.zoo import default_cfgs as zoo_cfgs

# Two groups stacked, of which each scan takes one, as its only order.
_SPLIT = Layout(lambda x: x.unsqueeze(1), lambda x: x.squeeze(1))


def _block_rules(*groups: str) -> tuple[KeyRule, ...]:
    """Rules of a block; ``groups`` names the scan of each official parameter group."""
    theirs, ours = "layers.{}.blocks.{}.", "stages.{}.blocks.{}."
    by_group = grouped(2, 1, -1)

    def unbound(name: str) -> tuple[str, ...]:
        return tuple(f"{ours}mixer.{group}.{name}" for group in groups)

    return (
        KeyRule(theirs + "op.x_proj_weight", unbound("x_proj_weight"), _SPLIT),
        KeyRule(theirs + "op.dt_projs_weight", unbound("dt_proj_weight"), _SPLIT),
        KeyRule(theirs + "op.dt_projs_bias", unbound("dt_proj_bias"), _SPLIT),
        KeyRule(theirs + "op.A_logs", unbound("A_log"), by_group),
        KeyRule(theirs + "op.Ds", unbound("D"), by_group),
        KeyRule(theirs + "op.in_proj.weight", ours + "mixer.in_proj.weight", LINEAR),
        KeyRule(theirs + "op.out_proj.weight", ours + "mixer.out_proj.weight", LINEAR),
        KeyRule(theirs + "op.conv2d.{}", ours + "mixer.conv_full.{}"),
        KeyRule(theirs + "op.conv2d_b1.{}", ours + "mixer.conv_low.{}"),
        KeyRule(theirs + "op.se.fc.0.{}", ours + "mixer.se.fc1.{}"),
        KeyRule(theirs + "op.se.fc.2.{}", ours + "mixer.se.fc2.{}"),
        KeyRule(theirs + "op.{*}", ours + "mixer.{*}"),
        KeyRule(theirs + "convFFN.linear1.weight", ours + "mlp.fc1.weight", POINTWISE),
        KeyRule(theirs + "convFFN.linear2.weight", ours + "mlp.fc2.weight", POINTWISE),
        KeyRule(theirs + "convFFN.linear1.bias", ours + "mlp.fc1.bias"),
        KeyRule(theirs + "convFFN.linear2.bias", ours + "mlp.fc2.bias"),
        KeyRule(theirs + "convFFN.dwc.{}", ours + "mlp.dwconv.{}"),
        *BLOCKS,
    )


class MSVMamba(HierarchicalBackbone):
    """MSVMamba as first published. See :class:`backbones.base.HierarchicalBackbone` for its arguments."""

    defaults: ClassVar = {"stem": PatchStem, "downsample": PatchMerging}
    key_rules = (*PATCH_STEM, *PATCH_MERGING, *_block_rules("ssm_low", "ssm_full"), *CLASSIFIER)

    def init_weights(self) -> None:
        """The feed-forward layers are convolutions in the original, and drawn as such."""
        super().init_weights()
        for module in self.modules():
            if isinstance(module, ConvFFN):
                module.fc1.reset_parameters()
                module.fc2.reset_parameters()


class MSVMambaV3(MSVMamba):
    """MSVMamba's NeurIPS version. See :class:`backbones.base.HierarchicalBackbone` for its arguments."""

    defaults: ClassVar = {"stem": ConvStem, "downsample": ConvDownsample}
    key_rules = (*CONV_STEM, *CONV_DOWNSAMPLE, *_block_rules("ssm_full", "ssm_low"), *CLASSIFIER)
    weight_keys = ("model_ema", *WEIGHT_KEYS)  # what this branch of the original evaluates


def _create_msvmamba(
    variant: str, pretrained: bool, *, d_state: int = 1, ssm_ratio: float = 2.0, mlp_ratio: float = 2.0, **kwargs: Any
) -> nn.Module:
    scan = Scan.pop(kwargs, MULTI_SCALE)
    mixer = partial(MultiScaleSS2D, scan=scan, d_state=d_state, ssm_ratio=ssm_ratio)
    block = partial(VSSBlock, mixer=mixer, mlp=partial(ConvFFN, residual=True), mlp_ratio=mlp_ratio)
    return build_model(MSVMamba, variant, pretrained, scan=scan, block=block, **kwargs)


def _create_msvmambav3(
    variant: str, pretrained: bool, *, d_state: int = 1, ssm_ratio: float = 1.0, mlp_ratio: float = 4.0,
    gated: bool = False, **kwargs: Any,
) -> nn.Module:  # fmt: skip
    scan, mlp = Scan.pop(kwargs, MULTI_SCALE), partial(ConvFFN, residual=True)
    published = partial(MultiScaleSS2D, branch_norm=False, upsampling="nearest")
    mixer = partial(published, scan=scan, d_state=d_state, ssm_ratio=ssm_ratio, gated=gated)
    block = partial(VSSBlock, mixer=mixer, mlp=mlp, mlp_ratio=mlp_ratio, mlp_post_norm=True)
    return build_model(MSVMambaV3, variant, pretrained, scan=scan, block=block, **kwargs)


default_cfgs = generate_default_cfgs(zoo_cfgs("msvmamba"))


@register_model
def msvmamba_nano(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MSVMamba-N, 7 M parameters."""
    args = {"depths": (1, 2, 5, 2), "dims": (48, 96, 192, 384)}
    return _create_msvmamba("msvmamba_nano", pretrained, **dict(args, **kwargs))


@register_model
def msvmamba_micro(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MSVMamba-M, 12 M parameters."""
    args = {"depths": (1, 2, 5, 2), "dims": (64, 128, 256, 512)}
    return _create_msvmamba("msvmamba_micro", pretrained, **dict(args, **kwargs))


@register_model
def msvmamba_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MSVMamba-T, 33 M parameters."""
    args = {"depths": (1, 2, 9, 2), "dims": (96, 192, 384, 768)}
    return _create_msvmamba("msvmamba_tiny", pretrained, **dict(args, **kwargs))


@register_model
def msvmambav3_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MSVMamba-T of the NeurIPS version, 32 M parameters."""
    args = {"depths": (2, 2, 9, 2), "dims": (96, 192, 384, 768)}
    return _create_msvmambav3("msvmambav3_tiny", pretrained, **dict(args, **kwargs))


@register_model
def msvmambav3_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MSVMamba-S of the NeurIPS version, 50 M parameters."""
    args = {"depths": (2, 3, 20, 2), "dims": (96, 192, 384, 768)}
    return _create_msvmambav3("msvmambav3_small", pretrained, **dict(args, **kwargs))


@register_model
def msvmambav3_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """MSVMamba-B of the NeurIPS version, 91 M parameters, gated."""
    args = {"depths": (2, 4, 18, 2), "dims": (128, 256, 512, 1024), "gated": True}
    return _create_msvmambav3("msvmambav3_base", pretrained, **dict(args, **kwargs))
