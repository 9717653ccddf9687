"""LBVim: a plain stack of Mamba blocks whose scan looks back inside small windows, in alternating directions.

LBMamba: Locally Bi-directional Mamba, arXiv:2506.15976.
Original: https://github.com/cvlab-stonybrook/LBMamba, which names no licence. Written from the paper and from
measurements of the original, without its code.

Every block scans the patches once. Within windows of a few steps a state also receives the later inputs of
its window, which costs little because they are at hand in the same pass; over the whole image both directions
take part because even blocks walk the patches in raster order and odd blocks from the last to the first. (The
original flips hidden state and residual after every block, which is the same; here no token moves.) There is
no class token: tokens are averaged, or pooled by attention.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar

import torch
from timm.layers import trunc_normal_
from timm.models import generate_default_cfgs, register_model
from torch import Tensor, nn

from backbones.base import PlainBackbone, build_model
from backbones.layers import LayerNorm, MambaBlock, MambaMixer, Scan
from backbones.layers.attention import attention
from backbones.layers.scan import OnBackend
from backbones.patterns import FORWARD
from backbones.weights import ONE_ORDER, KeyRule, Layout, Weights
from backbones.zoo import default_cfgs as zoo_cfgs

_logger = logging.getLogger(__name__)

_MIXER = "layers.{}.mixer."
_OURS = "blocks.{}.mixer."
# Depthwise kernels (c, 1, d) and (1, c, d).
_SWAP_FIRST = Layout(lambda x: x.transpose(0, 1), lambda x: x.transpose(0, 1))


def window_rule(tokens: int) -> int:
    """The published models' window, in steps, for ``tokens`` tokens: 4 up to 128, 8 up to 256, 16 beyond.

    In the original this is a launch heuristic of its CUDA kernel, the number of consecutive steps that one
    thread holds (its ROCm branch has other limits). It changes the function that is computed: an image of
    224 x 224 pixels is scanned with windows of 8, one of 512 x 512 with windows of 16.
    """
    if tokens <= 128:
        return 4
    return 8 if tokens <= 256 else 16


class LatentAttentionPool(OnBackend, nn.Module):
    """One learned query attends to all tokens, without projections of query or output.

    Args:
        dim: width of the tokens.
        num_heads: heads, which divide ``dim``.
    """

    prunable: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self,
        dim: int,
        num_heads: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads: got {num_heads}, expected a divisor of the width {dim}")
        self.num_heads = num_heads
        self.latent = nn.Parameter(torch.empty(1, 1, dim, device=device, dtype=dtype))
        self.kv = nn.Linear(dim, 2 * dim, device=device, dtype=dtype)
        self.post_norm = LayerNorm(dim, device=device, dtype=dtype)
        trunc_normal_(self.latent, std=dim**-0.5)
        trunc_normal_(self.kv.weight, std=0.02)
        nn.init.zeros_(self.kv.bias)

    def forward(self, x: Tensor) -> Tensor:
        """(b, l, dim) to (b, dim)."""
        q = self.latent.expand(x.shape[0], -1, -1)
        k, v = self.kv(x).chunk(2, dim=-1)
        q, k, v = (y.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        return self.post_norm(attention(q, k, v, self.backend).flatten(1))


class LBVim(PlainBackbone):
    """Locally bi-directional Vim. See :class:`backbones.base.PlainBackbone` for its arguments."""

    defaults: ClassVar = {"class_token": False, "global_pool": "avg"}
    key_rules: ClassVar[Sequence[KeyRule]] = (
        KeyRule(_MIXER + "conv1d.weight", _OURS + "conv_weight", _SWAP_FIRST),
        KeyRule(_MIXER + "conv1d.bias", _OURS + "conv_bias", ONE_ORDER),
        KeyRule(_MIXER + "x_proj.weight", _OURS + "ssm.x_proj_weight", ONE_ORDER),
        KeyRule(_MIXER + "dt_proj.weight", _OURS + "ssm.dt_proj_weight", ONE_ORDER),
        KeyRule(_MIXER + "dt_proj.bias", _OURS + "ssm.dt_proj_bias", ONE_ORDER),
        KeyRule(_MIXER + "A_log", _OURS + "ssm.A_log", ONE_ORDER),
        KeyRule(_MIXER + "D", _OURS + "ssm.D", ONE_ORDER),
        KeyRule("layers.{*}", "blocks.{*}"),
        KeyRule("norm_f.{}", "norm.{}"),
    )


class LBVimAttentionHead(LBVim):
    """LBVim whose official head pools the tokens by attention before its linear layer."""

    key_rules = (
        KeyRule("head.0.{*}", "attn_pool.{*}"),
        KeyRule("head.1.{}", "head.{}"),
        *LBVim.key_rules,
    )

    def adapt_state_dict(self, weights: Weights, img_size: tuple[int, int] | None = None) -> Weights:
        """As the base; also leaves the pooling's weights out where the model has another pooling."""
        weights = super().adapt_state_dict(weights, img_size)
        if self.attn_pool is not None:
            return weights
        _logger.info("attn_pool of the weight file is not used: global_pool is %r", self.global_pool)
        kept = {name: x for name, x in weights.items() if not name.startswith("attn_pool.")}
        return Weights(kept, weights.grids)


def _create_lbvim(
    variant: str, pretrained: bool, *, model_cls: type[LBVim] = LBVim, d_state: int = 16, **kwargs: Any
) -> nn.Module:
    """``pattern`` is the one order that even blocks walk, and odd blocks backwards."""
    kwargs["local_window"] = _checked_window(kwargs.get("local_window"))
    scan = Scan.pop(kwargs, FORWARD)
    mixers = [partial(MambaMixer, scan=each, d_state=d_state) for each in (scan, scan.backwards())]
    blocks = [partial(MambaBlock, mixer=mixer) for mixer in mixers]
    return build_model(model_cls, variant, pretrained, scan=scan, block=blocks, **kwargs)


def _checked_window(local_window: int | None) -> int | Callable[[int], int]:
    """A window in steps; None follows ``window_rule`` at the number of tokens of the image at hand."""
    if local_window is not None and local_window < 1:
        raise ValueError(f"local_window: got {local_window}, expected at least 1 step, or None for window_rule")
    return window_rule if local_window is None else local_window


default_cfgs = generate_default_cfgs(zoo_cfgs("lbmamba"))


@register_model
def lbvim_tiny(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LBVim-Ti, 6 M parameters."""
    return _create_lbvim("lbvim_tiny", pretrained, **dict({"embed_dim": 192}, **kwargs))


@register_model
def lbvim_300(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LBVim of width 300, 15 M parameters, made to run as fast as Vim-Ti."""
    return _create_lbvim("lbvim_300", pretrained, **dict({"embed_dim": 300}, **kwargs))


@register_model
def lbvim_small(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LBVim-S, 24 M parameters."""
    return _create_lbvim("lbvim_small", pretrained, **dict({"embed_dim": 384}, **kwargs))


@register_model
def lbvim_528(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    """LBVim of width 528 with attention pooling, 45 M parameters, made to run as fast as Vim-S."""
    pool = partial(LatentAttentionPool, num_heads=6)
    args: dict[str, Any] = {"embed_dim": 528, "attn_pool": pool, "global_pool": "map"}
    return _create_lbvim("lbvim_528", pretrained, model_cls=LBVimAttentionHead, **dict(args, **kwargs))
