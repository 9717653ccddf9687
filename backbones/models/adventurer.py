"""Adventurer: a plain stack of one-way Mamba-2 blocks, with a token of the mean in front and the class token last.

Adventurer: Optimizing Vision Mamba Architecture Designs for Efficiency, arXiv:2410.07599.
Original: https://github.com/wangf3014/Adventurer, which names no licence. Written from the paper's abstract and from
measurements of the original, without its code.

Every block scans its tokens once, from first to last. So that the first patches know of the rest, the mean of all
tokens is put in front of them before the scan, and taken away behind it; the class token stands last and sees all
patches. Some blocks walk the patches backwards: in the published code these are blocks 2 and 3 alone, at every depth
(``flip_layers``). (The original turns the tokens around and back; here no token moves.) Blocks have a SwiGLU
feed-forward layer.
"""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import replace
from functools import partial
from typing import Any, ClassVar

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from backbones.base import PlainBackbone, build_model
from backbones.layers import MambaBlock, Scan
from backbones.layers.constructor import Constructor
from backbones.layers.linear import linear_parts
from backbones.layers.mamba import token_norm
from backbones.layers.norm import RMSNorm
from backbones.layers.scan import OnBackend
from backbones.ops import depthwise_conv, selective_scan, silu_gate, ssd
from backbones.patterns import FORWARD, ScanPattern, backwards
from backbones.patterns.known import known_tables
from backbones.patterns.taps import causal_taps
from backbones.weights import ONE_ORDER, KeyRule, Layout
from backbones.zoo import default_cfgs as zoo_cfgs

# Depthwise kernels (c, 1, d) and (1, c, d).
_SWAP_FIRST = Layout(lambda x: x.transpose(0, 1), lambda x: x.transpose(0, 1))


class Mamba2Mixer(OnBackend, nn.Module):
    """Mamba-2 (arXiv:2405.21060, section 7) from the mean of the tokens over the patches to the class token.

    Args:
        dim: width of the tokens.
        scan: the order of the patches, window and backend.
        d_state: states of each channel.
        head_dim: channels of a head, whose states decay alike.
        d_conv: taps of the causal convolution.
        expand: inner width over ``dim``.
    """

    no_decay: ClassVar[tuple[str, ...]] = ("A_log", "D", "dt_bias", "conv_bias")

    def __init__(
        self, dim: int, scan: Scan, d_state: int = 64, head_dim: int = 64, d_conv: int = 4, expand: int = 2,
        device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__()
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        self.scan, self.backend, self.d_inner, self.d_conv = scan, scan.backend, expand * dim, d_conv
        self.num_heads, mixed = self.d_inner // head_dim, self.d_inner + 2 * d_state
        self.d_state = d_state
        self.in_proj = nn.Linear(dim, self.d_inner + mixed + self.num_heads, bias=False, **dd)
        self.conv_weight = nn.Parameter(torch.empty(1, mixed, d_conv, **dd).uniform_(-(d_conv**-0.5), d_conv**-0.5))
        self.conv_bias = nn.Parameter(torch.empty(1, mixed, **dd).uniform_(-(d_conv**-0.5), d_conv**-0.5))
        self.A_log = nn.Parameter(torch.empty(self.num_heads, **dd).uniform_(1, 16).log())
        self.D = nn.Parameter(torch.ones(self.num_heads, **dd))
        dt = torch.empty(self.num_heads, **dd).uniform_(math.log(1e-3), math.log(0.1)).exp().clamp(min=1e-4)
        self.dt_bias = nn.Parameter(dt + torch.log(-torch.expm1(-dt)))  # softplus of it is dt
        self.norm = RMSNorm(self.d_inner, autocast_out=True, **dd)
        self.out_proj = nn.Linear(self.d_inner, dim, bias=False, **dd)

    def forward(self, x: Tensor, grid: tuple[int, int]) -> Tensor:
        """(b, l, dim) to (b, l, dim): patches in raster order and, behind them, at most one class token."""
        mixed = self.d_inner + 2 * self.d_state
        x = torch.cat([x.mean(1, keepdim=True), x], dim=1)
        z, u, dt = linear_parts(self.in_proj, x, [self.d_inner, mixed, self.num_heads])
        orders, *taps = _tables(self.scan.pattern, *grid, x.shape[1], self.d_conv, device=x.device)
        u = depthwise_conv(u, self.conv_weight, self.conv_bias, *taps, silu=True, backend=self.backend).squeeze(2)
        u, B, C = u.split([self.d_inner, self.d_state, self.d_state], dim=-1)
        y = self._scanned(u, dt, B.unsqueeze(2), C.unsqueeze(2), orders)
        y = silu_gate(y[:, 1:], z[:, 1:], backend=self.backend)
        return self.out_proj(self.norm(y.to(self.norm.weight.dtype)))  # in float32 under autocast

    def _scanned(self, u: Tensor, dt: Tensor, B: Tensor, C: Tensor, orders: Tensor) -> Tensor:
        A = -torch.exp(self.A_log.to(torch.promote_types(self.A_log.dtype, torch.float32)))
        window = self.scan.window(u.shape[1])
        if window < 2:
            order = None if self.scan.pattern == FORWARD else orders[0]
            backend = "naive" if self.backend == "naive" else None
            heads = u.unflatten(-1, (self.num_heads, -1))
            return ssd(heads, dt, A, B, C, self.D, orders=order, dt_bias=self.dt_bias, backend=backend).flatten(2)
        # Windows are the selective scan's: every channel of a head has its decay.
        width = self.d_inner // self.num_heads
        repeat = torch.eye(self.num_heads, dtype=A.dtype, device=A.device).repeat_interleave(width, 0)
        A, D, bias = (parameter.repeat_interleave(width)[None] for parameter in (A, self.D, self.dt_bias))
        return selective_scan(
            u, dt.unsqueeze(2), A[..., None].expand(-1, -1, self.d_state), B, C, D, orders=orders, delta_bias=bias,
            dt_weight=repeat[None], local_window=window, backend=self.backend,
        )  # fmt: skip


@known_tables
def _tables(
    pattern: ScanPattern, height: int, width: int, tokens: int, num_taps: int, *, device: torch.device
) -> tuple[Tensor, ...]:
    """The order (1, l) of the mean, the patches and, where there is one, the class token, and the taps along it."""
    if pattern.padded(height, width) or pattern.visits_each_cell_once(height, width) is False:
        raise ValueError(f"pattern: {pattern.name!r} does not visit each cell of a {height} x {width} grid once")
    order = pattern.orders(height, width, device) + 1
    ends = torch.arange(tokens, device=device, dtype=order.dtype)[None]
    order = torch.cat([ends[:, :1], order, ends[:, height * width + 1 :]], dim=1)
    return order, *causal_taps(order, num_taps)


class SwiGLU(OnBackend, nn.Module):
    """w3(SiLU(w1 x) w2 x) (arXiv:2002.05202, equation 5)."""

    def __init__(self, dim: int, hidden_dim: int, device: Any = None, dtype: Any = None) -> None:
        super().__init__()
        self.w1, self.w2 = (nn.Linear(dim, hidden_dim, device=device, dtype=dtype) for _ in range(2))
        self.w3 = nn.Linear(hidden_dim, dim, device=device, dtype=dtype)
        for layer in (self.w1, self.w2, self.w3):
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., dim) to (..., dim)."""
        return self.w3(silu_gate(self.w2(x), self.w1(x), backend=self.backend))


class AdventurerBlock(MambaBlock):
    """x + mixer(norm(x)), then x + mlp(norm2(x)). Arguments as :class:`backbones.layers.MambaBlock`."""

    def __init__(
        self, dim: int, mixer: Constructor, norm_layer: Constructor = token_norm, drop_path: float = 0.0,
        device: Any = None, dtype: Any = None,
    ) -> None:  # fmt: skip
        super().__init__(dim, mixer, norm_layer, drop_path, device=device, dtype=dtype)
        self.norm2 = norm_layer(dim, device=device, dtype=dtype)
        self.mlp = SwiGLU(dim, int(2.5 * dim), device=device, dtype=dtype)

    def join(self, x: Tensor, branch: Tensor, grid: tuple[int, int]) -> Tensor:
        """The block's output, from its input and what the mixer adds to it."""
        x = super().join(x, branch, grid)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Adventurer(PlainBackbone):
    """Adventurer. See :class:`backbones.base.PlainBackbone` for its arguments."""

    dense_tap = "stream"
    key_rules = (
        KeyRule("layers.{}.mixer.conv1d.weight", "blocks.{}.mixer.conv_weight", _SWAP_FIRST),
        KeyRule("layers.{}.mixer.conv1d.bias", "blocks.{}.mixer.conv_bias", ONE_ORDER),
        KeyRule("layers.{}.norm_mlp.weight", "blocks.{}.norm2.weight"),
        KeyRule("layers.{*}", "blocks.{*}"),
        KeyRule("norm_f.weight", "norm.weight"),
    )


def _create_adventurer(
    variant: str, pretrained: bool = False, *, flip_layers: Collection[int] = (2, 3), d_state: int = 64, **kwargs: Any
) -> nn.Module:
    """``flip_layers``: the blocks that walk the patches backwards, counted from 0; the model may be shallower."""
    if not all(isinstance(i, int) and i >= 0 for i in flip_layers):
        raise ValueError(f"flip_layers: got {flip_layers}, expected numbers of blocks, counted from 0")
    own: dict[str, Any] = {"depth": 12, "class_token_position": "last"} | kwargs
    there = Scan.pop(own, FORWARD)
    back = replace(there, pattern=backwards(there.pattern))
    mixers = (
        partial(Mamba2Mixer, scan=back if i in flip_layers else there, d_state=d_state) for i in range(own["depth"])
    )
    blocks = [partial(AdventurerBlock, mixer=mixer) for mixer in mixers]
    return build_model(Adventurer, variant, pretrained, scan=there, block=blocks, **own)


default_cfgs = generate_default_cfgs(zoo_cfgs("adventurer"))


@register_model
def adventurer_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Adventurer-T, 12 M parameters."""
    return _create_adventurer("adventurer_tiny", pretrained, **dict({"embed_dim": 256}, **kwargs))


@register_model
def adventurer_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Adventurer-S, 44 M parameters."""
    return _create_adventurer("adventurer_small", pretrained, **dict({"embed_dim": 512}, **kwargs))


@register_model
def adventurer_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Adventurer-B, 99 M parameters."""
    return _create_adventurer("adventurer_base", pretrained, **dict({"embed_dim": 768}, **kwargs))


@register_model
def adventurer_base_patch8(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Adventurer-B on patches of 8 x 8 pixels, 99 M parameters, 786 tokens."""
    args = {"embed_dim": 768, "patch_size": 8}
    return _create_adventurer("adventurer_base_patch8", pretrained, **dict(args, **kwargs))


@register_model
def adventurer_large(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """Adventurer-L, 346 M parameters."""
    return _create_adventurer("adventurer_large", pretrained, **dict({"embed_dim": 1024, "depth": 24}, **kwargs))
