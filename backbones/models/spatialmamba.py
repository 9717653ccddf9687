"""Spatial-Mamba: one raster scan whose states, not outputs, are mixed with their neighbours in the plane.

Spatial-Mamba: Effective Visual State Space Models via Structure-Aware State Fusion, arXiv:2410.15091.
Original: https://github.com/EdwardChasel/Spatial-Mamba, Apache-2.0. Written from the paper and from
measurements of the original, without its code.

A convolutional stem and four stages. A layer scans its map once, row by row, with one state for each channel;
the map of states is convolved by three depthwise 3 x 3 kernels of dilation 1, 3 and 5, added up; only then do
C and D turn states into outputs. A single direction is enough: later cells reach a state through the fusion.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from backbones.base import HierarchicalBackbone, build_model
from backbones.layers import (
    DepthwiseConv2d,
    LayerNorm,
    PositionalBlock,
    ResidualConvStem,
    Scan,
    SelectiveSSM,
    WideDownsample,
    channels_first,
    channels_last,
    scan_grid,
)
from backbones.layers.key_rules import RESIDUAL_STEM
from backbones.layers.tracing import Opaque
from backbones.ops import silu_gate
from backbones.patterns import FORWARD
from backbones.weights import ONE_ORDER, SQUEEZE_1, KeyRule
from backbones.zoo import default_cfgs as zoo_cfgs

_FORWARD = Scan(FORWARD)
_BLOCK = "layers.{}.blocks.{}."
_MIXER = _BLOCK + "self_attention."
_OUR_BLOCK = "stages.{}.blocks.{}."
_OUR_MIXER = _OUR_BLOCK + "mixer."


class StateScan(SelectiveSSM):
    """A selective state-space layer that gives its states, one a channel; C and D are left to the caller.

    With n = 1, C = 1 and no D the scan's output is its state: u (b, l, c) to states (b, l, c), in float32 at least.
    """

    def operands(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor | None]:
        delta, dt_weight, B, _ = self.project(u)
        return u.to(torch.promote_types(u.dtype, torch.float32)), delta, dt_weight, B, torch.ones_like(B), None


class StateFusion(nn.Module):
    """Weighted sum of depthwise 3 x 3 convolutions of dilation 1, 3 and 5 that repeat the border (SASF).

    The sum stays in the states' dtype under autocast: half precision overflows on 27 taps that start at 1.
    """

    dilations = (1, 3, 5)

    def __init__(self, dim: int, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(len(self.dilations), dim, 3, 3, device=device, dtype=dtype))
        self.alpha = nn.Parameter(torch.ones(len(self.dilations), device=device, dtype=dtype))
        self.fused: Tensor | None
        self.register_buffer("fused", None, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) to (b, h, w, dim)."""
        with nullcontext() if x.is_meta else torch.autocast(x.device.type, enabled=False):
            if self.fused is not None:
                return _convolve(x, self.fused, dilation=1)
            kernels = (self.alpha.view(-1, 1, 1, 1) * self.weight).unsqueeze(2)
            one, three, five = (_convolve(x, k, d) for k, d in zip(kernels, self.dilations, strict=True))
            return one + three + five

    @torch.no_grad()
    def fuse(self) -> None:
        """Merges the kernels into one of 11 x 11, until ``train()`` or weights that are loaded."""
        if self.training:
            raise RuntimeError("fuse: the model is in training mode, call eval() first")
        reach = self.dilations[-1]
        fused = self.weight.new_zeros(self.weight.shape[1], 1, 2 * reach + 1, 2 * reach + 1)
        for alpha, kernel, d in zip(self.alpha, self.weight, self.dilations, strict=True):
            taps = slice(reach - d, reach + d + 1, d)
            fused[:, 0, taps, taps] += alpha * kernel
        self.fused = fused

    def train(self, mode: bool = True) -> StateFusion:
        """Training mode takes the merged kernel apart."""
        if mode:
            self.fused = None
        return super().train(mode)

    def _load_from_state_dict(self, *args: Any) -> None:
        self.fused = None
        super()._load_from_state_dict(*args)


def _convolve(x: Tensor, kernel: Tensor, dilation: int) -> Tensor:
    """Depthwise on (b, h, w, c); outside of the map its border repeats."""
    reach = dilation * (kernel.shape[-1] // 2)
    x = F.pad(channels_first(x), (reach,) * 4, mode="replicate")
    return channels_last(F.conv2d(x, kernel.to(x.dtype), dilation=dilation, groups=x.shape[1]))


class StructureAwareSSM(Opaque, nn.Module):
    """Linear, depthwise 3 x 3 convolution, SiLU, scan, state fusion, C and D, norm, gate, linear.

    Args:
        dim: width of the map.
        scan: the one order to scan, window and backend.
        ssm_ratio: inner width over ``dim``.
    """

    def __init__(
        self,
        dim: int,
        scan: Scan = _FORWARD,
        ssm_ratio: float = 2.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        d_inner = int(ssm_ratio * dim)
        self.scan = scan
        self.in_proj = nn.Linear(dim, 2 * d_inner, bias=False, device=device, dtype=dtype)
        self.conv2d = DepthwiseConv2d(d_inner, silu=True, device=device, dtype=dtype)
        self.ssm = StateScan(d_inner, 1, -(-dim // 16), 1, scan.backend, device, dtype)
        self.fusion = StateFusion(d_inner, device, dtype)
        self.out_norm = LayerNorm(d_inner, autocast_out=True, device=device, dtype=dtype)
        self.out_proj = nn.Linear(d_inner, dim, bias=False, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) to (b, h, w, dim)."""
        x, z = self.in_proj(x).chunk(2, dim=-1)
        x = self.conv2d(x)
        states = self.fusion(scan_grid(self.ssm, x, self.scan))
        C = F.linear(x, self.ssm.x_proj_weight[0, -1:])
        y = states * C + x * self.ssm.D
        y = self.out_norm(y.to(self.out_norm.weight.dtype))  # float32 under autocast, as the states
        return self.out_proj(silu_gate(y, z, backend=self.ssm.backend))


class SpatialMamba(HierarchicalBackbone):
    """Spatial-Mamba. See :class:`backbones.base.HierarchicalBackbone` for its arguments."""

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


def _create_spatialmamba(variant: str, pretrained: bool = False, *, mlp_ratio: float = 4.0, **kwargs: Any) -> nn.Module:
    scan = Scan.pop(kwargs, FORWARD)
    block = partial(PositionalBlock, mixer=partial(StructureAwareSSM, scan=scan), mlp_ratio=mlp_ratio)
    parts: dict[str, Any] = {"stem": ResidualConvStem, "block": block, "downsample": WideDownsample}
    return build_model(SpatialMamba, variant, pretrained, scan=scan, **parts, **kwargs)


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
