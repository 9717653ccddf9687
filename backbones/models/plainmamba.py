"""PlainMamba: a plain stack of blocks that scan a map along four snakes and know in which direction each step goes.

PlainMamba: Improving Non-Hierarchical Mamba in Visual Recognition, arXiv:2403.17695.
Original: https://github.com/ChenhongyiYang/PlainMamba, Apache-2.0. Written from the paper and from measurements of
the original, without its code.

A convolutional stem makes patches; there is no class token and no feed-forward layer. Every block convolves its map
(7 x 7, depthwise) and scans it along rows and columns, both ways, always from neighbour to neighbour. The four scans
share all their parameters. A learned vector for the direction of each step (start, right, left, up, down) is added to
the input weights B.

The released weights need two quirks of the original, which the paper does not have:

- ``raster-order parameters``: only the inputs u and the outputs follow a path. Step t of every path takes delta, B
  and C of the t-th token in raster order, whatever token the path visits then. See :class:`PathSSM`.
- ``doubled step-size bias``: the original adds the bias of dt_proj twice. Here ``ssm.dt_proj_bias`` holds the double,
  and the key rule of ``dt_proj.bias`` doubles and halves it.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from backbones.base import PlainBackbone, build_model
from backbones.layers import DepthwiseConv2d, LayerNorm, MambaBlock, Scan, StemPatchEmbed, branch_norm
from backbones.layers.linear import linear_parts
from backbones.layers.path_ssm import PathSSM
from backbones.layers.tracing import Opaque
from backbones.ops import silu_gate
from backbones.patterns import SNAKE
from backbones.patterns.subset import Subset
from backbones.weights import ONE_ORDER, KeyRule, Layout
from backbones.zoo import default_cfgs as zoo_cfgs

_DOUBLED = Layout(lambda x: 2 * x[None], lambda x: x[0] / 2)
_output_norm = partial(LayerNorm, eps=1e-6)
_MIXER = "layers.{}.mamba."
_OURS = "blocks.{}.mixer."


class PlainMambaMixer(Opaque, nn.Module):
    """Linear, depthwise 7 x 7 convolution, SiLU, scan along all paths, gate, linear (PlainMamba, section 3.2).

    Args:
        dim: width of the tokens.
        scan: the paths, window and backend.
        d_state: states of each channel.
        expand: inner width over ``dim``.
    """

    prunable: ClassVar[tuple[str, ...]] = ("out_proj",)

    def __init__(
        self, dim: int, scan: Scan, d_state: int = 16, expand: int = 2, device: Any = None, dtype: Any = None
    ) -> None:
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.scan, d_inner = scan, expand * dim
        self.in_proj = nn.Linear(dim, 2 * d_inner, **dd)
        self.conv2d = DepthwiseConv2d(d_inner, 7, silu=True, **dd)
        self.ssm = PathSSM(d_inner, d_state, -(-dim // 16), scan.pattern.num_orders, scan.backend, **dd)
        self.out_proj = nn.Linear(d_inner, dim, **dd)

    def forward(
        self, x: Tensor, grid: tuple[int, int], per_order: bool = False, subset: Subset | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """(b, l, dim) to (b, l, dim), tokens in raster order.

        Args:
            x: the tokens.
            grid: rows and columns of the map.
            per_order: also return the gated output of all paths together, (b, l, 1, d_inner).
            subset: the tokens that x has, where some of the grid's are missing; the convolution reads zeros there.
        """
        x, z = linear_parts(self.in_proj, x, [self.ssm.d_inner] * 2)
        u = self.conv2d.along(x, grid, subset)
        gated = silu_gate(self.ssm(u, grid, self.scan, subset), z, backend=self.ssm.backend)
        y = self.out_proj(gated)
        return (y, gated.unsqueeze(2)) if per_order else y


class StreamConv(Opaque, nn.Module):
    """A depthwise 3 x 3 convolution, batch norm and GELU over the whole stream, without a residual around them."""

    def __init__(self, dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.conv = DepthwiseConv2d(dim, bias=False, device=device, dtype=dtype)
        # Over rows of tokens: of maps, PyTorch's gradient is wrong for one memory layout in eval mode at batch 1.
        self.norm = nn.BatchNorm1d(dim, device=device, dtype=dtype)

    def forward(self, x: Tensor, grid: tuple[int, int], subset: Subset | None = None) -> Tensor:
        """(b, l, dim) to (b, l, dim)."""
        y = self.conv.along(x, grid, subset).flatten(0, 1)
        return F.gelu(self.norm(y)).unflatten(0, x.shape[:2])


def _rules(prefix: str) -> tuple[KeyRule, ...]:
    mixer, blocks, stem = prefix + _MIXER, prefix + "layers.{}.", prefix + "patch_embed."
    convs = (KeyRule(f"{stem}convs.{i}.{{}}", f"patch_embed.stem.{i + 3}.{{}}") for i in (0, 1, 3, 4))
    return (
        KeyRule(mixer + "x_proj.weight", _OURS + "ssm.x_proj_weight", ONE_ORDER),
        KeyRule(mixer + "dt_proj.weight", _OURS + "ssm.dt_proj_weight", ONE_ORDER),
        KeyRule(mixer + "dt_proj.bias", _OURS + "ssm.dt_proj_bias", _DOUBLED),
        KeyRule(mixer + "A_log", _OURS + "ssm.A_log", ONE_ORDER),
        KeyRule(mixer + "D", _OURS + "ssm.D", ONE_ORDER),
        KeyRule(mixer + "direction_Bs", _OURS + "ssm.direction_B"),
        KeyRule(mixer + "{*}", _OURS + "{*}"),
        KeyRule(blocks + "dw.0.weight", "blocks.{}.after.conv.weight"),
        KeyRule(blocks + "dw.1.{}", "blocks.{}.after.norm.{}"),
        KeyRule(blocks + "norm.{}", "blocks.{}.norm.{}"),
        *convs,
        KeyRule(stem + "stem.{*}", "patch_embed.stem.{*}"),
        KeyRule(prefix + "pos_embed", "pos_embed"),
        KeyRule(stem + "projection.{}", "patch_embed.patches.proj.{}"),
        KeyRule(prefix + "ln1.{}", "norm.{}"),
    )


class PlainMamba(PlainBackbone):
    """PlainMamba. See :class:`backbones.base.PlainBackbone` for its arguments."""

    defaults: ClassVar = {
        "class_token": False, "global_pool": "avg", "dynamic_img_pad": True, "norm_layer": branch_norm,
        "final_norm": _output_norm,
    }  # fmt: skip
    dense_tap = "stream"
    dense_norm = _output_norm
    head_std = 0.01
    dense_rules = (KeyRule("norm_layer{}.{}", "out_norms.{}.{}"),)
    key_rules = (
        *_rules("backbone."),
        *_rules(""),
        KeyRule("head.fc.{}", "head.{}"),
        KeyRule("ema_{}", None),  # the other copy of each parameter, which the hook of L2 and L3 leaves in the file
    )

    @classmethod
    def dense_norm_rules(cls, blocks: Sequence[int]) -> tuple[KeyRule, ...]:
        """As the authors' segmentors: counted by block, and the last one is the classifier's norm."""
        return (*cls.dense_rules, KeyRule("norm.{}", f"out_norms.{max(blocks)}.{{}}"))

    @torch.no_grad()
    def init_weights(self) -> None:
        """As the original, whose pass over all linear layers reaches dt_proj too: step sizes start at softplus(0)."""
        trunc_normal_(self.pos_embed, std=0.02)
        for block in self.blocks:
            mixer = block.mixer
            for weight in (
                mixer.in_proj.weight,
                mixer.out_proj.weight,
                mixer.ssm.x_proj_weight,
                mixer.ssm.dt_proj_weight,
            ):
                trunc_normal_(weight, std=0.02)
            for bias in (mixer.in_proj.bias, mixer.out_proj.bias, mixer.ssm.dt_proj_bias):
                bias.zero_()


def _create_plainmamba(
    variant: str, pretrained: bool, *, num_convs: int = 2, stream_conv: bool = False, d_state: int = 16,
    depth: int = 24, **kwargs: Any,
) -> nn.Module:  # fmt: skip
    """``num_convs`` counts the 3 x 3 convolutions of the stem; ``stream_conv`` puts one behind the first block."""
    scan = Scan.pop(kwargs, SNAKE)
    block = partial(MambaBlock, mixer=partial(PlainMambaMixer, scan=scan, d_state=d_state))
    first = partial(block, after=StreamConv) if stream_conv else block
    blocks = [first, *[block] * (depth - 1)]
    embed = partial(StemPatchEmbed, num_convs=num_convs)
    own: dict[str, Any] = {"block": blocks, "patch_embed": embed, "depth": depth}
    return build_model(PlainMamba, variant, pretrained, scan=scan, **own, **kwargs)


default_cfgs = generate_default_cfgs(zoo_cfgs("plainmamba"))


@register_model
def plainmamba_l1(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PlainMamba-L1, 7 M parameters."""
    args = {"embed_dim": 192, "num_convs": 1, "stream_conv": True}
    return _create_plainmamba("plainmamba_l1", pretrained, **dict(args, **kwargs))


@register_model
def plainmamba_l2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PlainMamba-L2, 26 M parameters."""
    return _create_plainmamba("plainmamba_l2", pretrained, **dict({"embed_dim": 384}, **kwargs))


@register_model
def plainmamba_l3(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """PlainMamba-L3, 51 M parameters."""
    return _create_plainmamba("plainmamba_l3", pretrained, **dict({"embed_dim": 448, "depth": 36}, **kwargs))
