"""Vim: a plain stack of bidirectional Mamba blocks over image patches, with the class token in the middle.

Vision Mamba: Efficient Visual Representation Learning with Bidirectional State Space Model, arXiv:2401.09417.
Original: https://github.com/hustvl/Vim, Apache-2.0. Written from the paper and from measurements of the
    original, without its code.

An image becomes patches; a learned class token is put in the middle of their sequence, and position
embeddings are added. Every block scans the sequence forwards and backwards, each direction with a causal
convolution and state-space parameters of its own, and averages the two. The class token, normalised, goes to
the classifier.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from timm.models import generate_default_cfgs, register_model
from torch import nn

from backbones.base import PlainBackbone, build_model
from backbones.layers import MambaBlock, MambaMixer, Scan
from backbones.patterns import BIDIRECTIONAL
from backbones.weights import SQUEEZE_1, KeyRule
from backbones.zoo import default_cfgs as zoo_cfgs

_MIXER = "layers.{}.mixer."
_OURS = "blocks.{}.mixer."


class Vim(PlainBackbone):
    """Vision Mamba. See :class:`backbones.base.PlainBackbone` for its arguments."""

    key_rules: ClassVar[Sequence[KeyRule]] = (
        KeyRule((_MIXER + "conv1d.weight", _MIXER + "conv1d_b.weight"), _OURS + "conv_weight", SQUEEZE_1),
        KeyRule((_MIXER + "conv1d.bias", _MIXER + "conv1d_b.bias"), _OURS + "conv_bias"),
        KeyRule((_MIXER + "x_proj.weight", _MIXER + "x_proj_b.weight"), _OURS + "ssm.x_proj_weight"),
        KeyRule((_MIXER + "dt_proj.weight", _MIXER + "dt_proj_b.weight"), _OURS + "ssm.dt_proj_weight"),
        KeyRule((_MIXER + "dt_proj.bias", _MIXER + "dt_proj_b.bias"), _OURS + "ssm.dt_proj_bias"),
        KeyRule((_MIXER + "A_log", _MIXER + "A_b_log"), _OURS + "ssm.A_log"),
        KeyRule((_MIXER + "D", _MIXER + "D_b"), _OURS + "ssm.D"),
        KeyRule("layers.{*}", "blocks.{*}"),
        KeyRule("norm_f.weight", "norm.weight"),
        KeyRule("rope.{}", None),  # tables of a grid's size, which some older files carry
    )

    @torch.no_grad()
    def init_weights(self) -> None:
        """As the original, whose last pass over linear layers also zeroes the backward direction's step-size bias."""
        super().init_weights()
        for block in self.blocks:
            block.mixer.ssm.dt_proj_bias[1:].zero_()


class RotaryVim(Vim):
    """Vim as the authors' dense models use it, with rotary embeddings; its tables are part of the weights."""

    key_rules = Vim.key_rules[:-1]


def _create_vim(variant: str, pretrained: bool, *, d_state: int = 16, **kwargs: Any) -> nn.Module:
    """``rope=True`` turns the tokens, see :class:`backbones.base.PlainBackbone`."""
    scan = Scan.pop(kwargs, BIDIRECTIONAL)
    block = partial(MambaBlock, mixer=partial(MambaMixer, scan=scan, d_state=d_state))
    return build_model(RotaryVim if kwargs.get("rope") else Vim, variant, pretrained, scan=scan, block=block, **kwargs)


default_cfgs = generate_default_cfgs(zoo_cfgs("vim"))


@register_model
def vim_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Vim-Ti, 7 M parameters, 197 tokens."""
    return _create_vim("vim_tiny", pretrained, **dict({"embed_dim": 192}, **kwargs))


@register_model
def vim_tiny_stride8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Vim-Ti+, patches that overlap by half, 730 tokens."""
    return _create_vim("vim_tiny_stride8", pretrained, **dict({"embed_dim": 192, "stride": 8}, **kwargs))


@register_model
def vim_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Vim-S, 26 M parameters, 197 tokens."""
    return _create_vim("vim_small", pretrained, **dict({"embed_dim": 384}, **kwargs))


@register_model
def vim_small_stride8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Vim-S+, patches that overlap by half, 730 tokens."""
    return _create_vim("vim_small_stride8", pretrained, **dict({"embed_dim": 384, "stride": 8}, **kwargs))


@register_model
def vim_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Vim-B, 98 M parameters, 197 tokens."""
    return _create_vim("vim_base", pretrained, **dict({"embed_dim": 768}, **kwargs))
