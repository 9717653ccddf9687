"""LocalVim: a plain stack of Mamba blocks, each scanning along four directions of its own, some inside small windows.

LocalMamba: Visual State Space Model with Windowed Selective Scan, arXiv:2403.09338.
Original: https://github.com/hunto/LocalMamba, Apache-2.0. Written from the paper and from measurements of the
original, without its code.

A direction walks the patches by rows ("h"), by columns ("v") or window by window ("w2", "w7"), forwards or backwards
("_flip"); a search chose four of eight for every layer. Each has a causal convolution and state-space parameters of
its own, as in Vim; the gated outputs pass a channel gate (BiAttn) and are added. A grid that windows do not divide is
padded to whole ones, and padded slots are steps of their own: the convolution runs into them, so they drive the state.
Tokens and residual stream are turned by rotary embeddings before every block, but for the model with a class token.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import nn

from backbones.base import PlainBackbone, build_model
from backbones.layers import BiAttn, MambaBlock, MambaMixer, Scan
from backbones.patterns import directions as directions_pattern
from backbones.weights import SQUEEZE_1, KeyRule
from backbones.zoo import default_cfgs as zoo_cfgs

Directions = Sequence[Sequence[str]]

# What the search chose for the layers of the tiny model, and the position of each in a layer's list, which its
# parameters go by.
SEARCHED: Directions = [
    row.split()
    for row in (
        "h v_flip w7 w7_flip",
        "h_flip w2_flip w7 w7_flip",
        "h h_flip v w7",
        "h h_flip v v_flip",
        "h h_flip v v_flip",
        "h h_flip v v_flip",
        "h_flip v v_flip w7",
        "h_flip v v_flip w2_flip",
        "h h_flip v v_flip",
        "h h_flip v v_flip",
        "h v v_flip w2",
        "h v v_flip w2_flip",
        "h h_flip v_flip w7",
        "h_flip v v_flip w2",
        "h h_flip v v_flip",
        "h v w2 w2_flip",
        "v v_flip w2 w7",
        "h h_flip v w2",
        "h h_flip w2_flip w7",
        "v v_flip w2 w2_flip",
    )
]
UNSEARCHED: Directions = [["h", "h_flip", "w2", "w2_flip"]]

_MIXER = "layers.{}.mixer."
_OURS = "blocks.{}.mixer."


def _of_each_direction(name: str) -> tuple[str, ...]:
    return tuple(_MIXER + name.format(k) for k in range(4))


class LocalVim(PlainBackbone):
    """LocalVim. See :class:`backbones.base.PlainBackbone` for its arguments."""

    defaults: ClassVar = {
        "depth": 20, "class_token": False, "global_pool": "avg", "rope": True, "dynamic_img_pad": True
    }  # fmt: skip
    key_rules = (
        KeyRule(_of_each_direction("conv1d_{}.weight"), _OURS + "conv_weight", SQUEEZE_1),
        KeyRule(_of_each_direction("conv1d_{}.bias"), _OURS + "conv_bias"),
        KeyRule(_of_each_direction("x_proj_{}.weight"), _OURS + "ssm.x_proj_weight"),
        KeyRule(_of_each_direction("dt_proj_{}.weight"), _OURS + "ssm.dt_proj_weight"),
        KeyRule(_of_each_direction("dt_proj_{}.bias"), _OURS + "ssm.dt_proj_bias"),
        KeyRule(_of_each_direction("A_log_{}"), _OURS + "ssm.A_log"),
        KeyRule(_of_each_direction("D_{}"), _OURS + "ssm.D"),
        KeyRule(_MIXER + "attn.{*}", _OURS + "merge.{*}"),
        KeyRule("layers.{*}", "blocks.{*}"),
        KeyRule("norm_f.weight", "norm.weight"),
    )

    @torch.no_grad()
    def init_weights(self) -> None:
        """As the original: every projection from one narrow normal distribution, step sizes of softplus(0)."""
        trunc_normal_(self.pos_embed, std=0.02)
        if self.cls_token is not None:
            self.cls_token.zero_()
        for block in self.blocks:
            for module in block.mixer.modules():
                if isinstance(module, nn.Linear):
                    trunc_normal_(module.weight, std=0.02)
                    if module.bias is not None:
                        module.bias.zero_()
            trunc_normal_(block.mixer.ssm.x_proj_weight, std=0.02)
            trunc_normal_(block.mixer.ssm.dt_proj_weight, std=0.02)
            block.mixer.ssm.dt_proj_bias.zero_()
            nn.init.kaiming_uniform_(block.mixer.out_proj.weight, a=math.sqrt(5))
            block.mixer.out_proj.weight.div_(len(self.blocks) ** 0.5)


def _create_localvim(
    variant: str, pretrained: bool, *, directions: Directions, d_state: int = 16, **kwargs: Any
) -> nn.Module:
    """``directions`` lists the directions of each layer, see :func:`backbones.patterns.directions`; layers use the
    lists in turn.
    """
    scans = Scan.pop_each(kwargs, [directions_pattern(*names) for names in directions])
    mixers = [partial(MambaMixer, scan=scan, d_state=d_state, merge=BiAttn) for scan in scans]
    blocks = [partial(MambaBlock, mixer=mixer) for mixer in mixers]
    return build_model(LocalVim, variant, pretrained, scan=scans[0], block=blocks, **kwargs)


default_cfgs = generate_default_cfgs(zoo_cfgs("localvim"))


@register_model
def localvim_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LocalVim-T, 8 M parameters."""
    args = {"embed_dim": 192, "directions": SEARCHED}
    return _create_localvim("localvim_tiny", pretrained, **dict(args, **kwargs))


@register_model
def localvim_tiny_midcls(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LocalVim-T with a class token in the middle and without rotary embeddings, 8 M parameters."""
    args = {"embed_dim": 192, "directions": SEARCHED, "class_token": True, "global_pool": "token", "rope": False}
    return _create_localvim("localvim_tiny_midcls", pretrained, **dict(args, **kwargs))


@register_model
def localvim_tiny_unsearched(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LocalVim-T with rows and windows of 2 in all layers, 8 M parameters."""
    args = {"embed_dim": 192, "directions": UNSEARCHED}
    return _create_localvim("localvim_tiny_unsearched", pretrained, **dict(args, **kwargs))


@register_model
def localvim_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LocalVim-S, 28 M parameters."""
    args = {"embed_dim": 384, "directions": SEARCHED}
    return _create_localvim("localvim_small", pretrained, **dict(args, **kwargs))


@register_model
def localvim_small_unsearched(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LocalVim-S with rows and windows of 2 in all layers, 28 M parameters."""
    args = {"embed_dim": 384, "directions": UNSEARCHED}
    return _create_localvim("localvim_small_unsearched", pretrained, **dict(args, **kwargs))
