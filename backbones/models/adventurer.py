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

from collections.abc import Collection
from functools import partial
from typing import Any, ClassVar

from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from backbones.base import PlainBackbone, build_model
from backbones.layers import Mamba2Mixer, MambaBlock, Scan
from backbones.layers.constructor import Constructor
from backbones.layers.mamba import token_norm
from backbones.layers.norm import residual_norm
from backbones.layers.scan import OnBackend
from backbones.ops import silu_gate
from backbones.patterns import FORWARD
from backbones.patterns.subset import Subset
from backbones.weights import ONE_ORDER, KeyRule, Layout
from backbones.zoo import default_cfgs as zoo_cfgs

# Depthwise kernels (c, 1, d) and (1, c, d).
_SWAP_FIRST = Layout(lambda x: x.transpose(0, 1), lambda x: x.transpose(0, 1))


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

    def join(self, x: Tensor, branch: Tensor, grid: tuple[int, int] | None, subset: Subset | None = None) -> Tensor:
        """The block's output, from its input and what the mixer adds to it."""
        x, y = residual_norm(x, self.drop_path(branch), self.norm2)
        return x + self.drop_path(self.mlp(y))

    def chained(
        self, x: Tensor, pending: Tensor | None, grid: tuple[int, int] | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """See :meth:`backbones.layers.MambaBlock.chained`."""
        x, branch = super().chained(x, pending, grid)
        x, y = residual_norm(x, branch, self.norm2)
        return x, self.drop_path(self.mlp(y))


class Adventurer(PlainBackbone):
    """Adventurer. See :class:`backbones.base.PlainBackbone` for its arguments."""

    defaults: ClassVar = {"class_token_position": "last"}
    dense_tap = "stream"
    key_rules = (
        KeyRule("layers.{}.mixer.conv1d.weight", "blocks.{}.mixer.conv_weight", _SWAP_FIRST),
        KeyRule("layers.{}.mixer.conv1d.bias", "blocks.{}.mixer.conv_bias", ONE_ORDER),
        KeyRule("layers.{}.norm_mlp.weight", "blocks.{}.norm2.weight"),
        KeyRule("layers.{*}", "blocks.{*}"),
        KeyRule("norm_f.weight", "norm.weight"),
    )


def _create_adventurer(
    variant: str, pretrained: bool, *, depth: int = 12, flip_layers: Collection[int] = (2, 3), d_state: int = 64,
    **kwargs: Any,
) -> nn.Module:  # fmt: skip
    """``flip_layers``: the blocks that walk the patches backwards, counted from 0; the model may be shallower."""
    if not all(isinstance(i, int) and i >= 0 for i in flip_layers):
        raise ValueError(f"flip_layers: got {flip_layers}, expected numbers of blocks, counted from 0")
    scan = Scan.pop(kwargs, FORWARD)
    scans = [scan.backwards() if i in flip_layers else scan for i in range(depth)]
    blocks = [partial(AdventurerBlock, mixer=partial(Mamba2Mixer, scan=each, d_state=d_state)) for each in scans]
    return build_model(Adventurer, variant, pretrained, scan=scan, block=blocks, depth=depth, **kwargs)


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
