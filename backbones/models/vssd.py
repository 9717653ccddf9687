"""VSSD: a pyramid whose state-space layers have no direction, for all tokens share one state.

VSSD: Vision Mamba with Non-Causal State Space Duality, arXiv:2407.18559.
Original: https://github.com/YuHengsss/VSSD, without a licence. Written from the paper and from measurements of the
original, without its code.

Stem, downsampling and block are Spatial-Mamba's. Three stages mix their tokens by non-causal state-space duality,
linear attention whose weights are step size times decay rate; the last stage by softmax attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from backbones.base import Constructor, HierarchicalBackbone, build_model
from backbones.layers import NonCausalSSD, PositionalBlock, ResidualConvStem, Scan, WideDownsample
from backbones.layers.attention import attention
from backbones.layers.key_rules import RESIDUAL_STEM
from backbones.layers.scan import OnBackend
from backbones.patterns import FORWARD
from backbones.weights import WEIGHT_KEYS, KeyRule
from backbones.zoo import default_cfgs as zoo_cfgs

_MIXER = "layers.{}.blocks.{}.attn."
_OUR_MIXER = "stages.{}.blocks.{}.mixer."


class SoftmaxAttention(OnBackend, nn.Module):
    """Multi-head attention among all cells of a map (Vaswani et al. 2017, section 3.2), without position terms.

    Args:
        dim: width of the map.
        num_heads: heads of width dim / num_heads.
    """

    prunable: ClassVar[tuple[str, ...]] = ("proj",)

    def __init__(
        self,
        dim: int,
        num_heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, expected a number that divides the width {dim}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim, bias=False, device=device, dtype=dtype)
        self.proj = nn.Linear(dim, dim, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) to (b, h, w, dim)."""
        qkv = self.qkv(x.flatten(1, 2)).unflatten(-1, (3, self.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (b, heads, l, dim / heads)
        y = attention(q, k, v, self.backend)
        return self.proj(y.transpose(1, 2).flatten(2)).unflatten(1, x.shape[1:3])


class VSSD(HierarchicalBackbone):
    """VSSD. See :class:`backbones.base.HierarchicalBackbone` for its arguments."""

    defaults: ClassVar = {"stem": ResidualConvStem, "downsample": WideDownsample}
    weight_keys: ClassVar[Sequence[str]] = ("model_ema", *WEIGHT_KEYS)  # published files are chosen by averaged weights
    key_rules = (
        *RESIDUAL_STEM,
        KeyRule(_MIXER + "norm.{}", _OUR_MIXER + "out_norm.{}"),
        KeyRule(_MIXER + "to_qkv.{}", _OUR_MIXER + "qkv.{}"),
        KeyRule(_MIXER + "to_out.{}", _OUR_MIXER + "proj.{}"),
        KeyRule(_MIXER + "{*}", _OUR_MIXER + "{*}"),
        KeyRule("layers.{}.blocks.{*}", "stages.{}.blocks.{*}"),
        KeyRule("head.{}", "head.fc.{}"),
    )


class VSSDMicro(VSSD):
    """VSSD whose published file was chosen by the plain weights, not by the averaged ones."""

    weight_keys = WEIGHT_KEYS


def _create_vssd(
    variant: str, pretrained: bool, *, model_cls: type[VSSD] = VSSD, num_heads: Sequence[int] = (2, 4, 8, 16),
    d_state: int = 64, mlp_ratio: float = 4.0, scan_backend: str | None = None, **kwargs: Any,
) -> nn.Module:  # fmt: skip
    *first, last = num_heads
    mixers: list[Constructor] = [partial(NonCausalSSD, num_heads=n, d_state=d_state) for n in first]
    mixers.append(partial(SoftmaxAttention, num_heads=last))
    blocks = [partial(PositionalBlock, mixer=mixer, mlp_ratio=mlp_ratio) for mixer in mixers]
    scan = Scan(FORWARD, backend=scan_backend)  # nothing scans: its backend is what the operators take
    return build_model(model_cls, variant, pretrained, scan=scan, block=blocks, **kwargs)


default_cfgs = generate_default_cfgs(zoo_cfgs("vssd"))


@register_model
def vssd_micro(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VSSD-M, 14 M parameters."""
    args = {"depths": (2, 2, 8, 4), "dims": (48, 96, 192, 384), "d_state": 48}
    return _create_vssd("vssd_micro", pretrained, model_cls=VSSDMicro, **dict(args, **kwargs))


@register_model
def vssd_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VSSD-T, 24 M parameters."""
    args = {"depths": (2, 4, 8, 4), "dims": (64, 128, 256, 512)}
    return _create_vssd("vssd_tiny", pretrained, **dict(args, **kwargs))


@register_model
def vssd_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VSSD-S, 40 M parameters: as wide as the tiny model, and deeper."""
    args = {"depths": (3, 4, 21, 5), "dims": (64, 128, 256, 512)}
    return _create_vssd("vssd_small", pretrained, **dict(args, **kwargs))


@register_model
def vssd_base(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """VSSD-B, 89 M parameters."""
    args = {"depths": (3, 4, 21, 5), "dims": (96, 192, 384, 768), "num_heads": (3, 6, 12, 24)}
    return _create_vssd("vssd_base", pretrained, **dict(args, **kwargs))
