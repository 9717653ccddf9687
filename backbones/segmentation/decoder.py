"""The decoder of a U-Net: from the maps of a hierarchy to one map of the finest one's resolution, and wider."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from timm.layers import ConvNormAct, Mlp
from torch import Tensor, nn

from backbones.base.contract import run_block
from backbones.base.hierarchical import init_linears
from backbones.layers import SS2D, MultiHeadScan, MultiScaleConvFFN, Scan, channels_first, channels_last
from backbones.layers.constructor import Constructor
from backbones.layers.multi_head_scan import HEADS
from backbones.layers.patch_expand import EXPANSIONS
from backbones.layers.vss_block import VSSBlock
from backbones.patterns import CROSS, ScanPattern
from backbones.suggest import did_you_mean

MERGES = ("concat", "add", "add_before")


class ConvBlock(nn.Module):
    """A 3 x 3 convolution, batch norm and ReLU, on a channels-last map; ``drop_path`` has no branch to act on."""

    def __init__(
        self,
        dim: int,
        drop_path: float = 0.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.conv = ConvNormAct(dim, dim, 3, device=device, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        """(b, h, w, dim) to (b, h, w, dim)."""
        return channels_last(self.conv(channels_first(x)))


def vss_block(mlp: Constructor = Mlp) -> Constructor:
    """VMamba's block of the second generation: one state, no gate, a feed-forward layer four times as wide."""
    mixer = partial(SS2D, scan=Scan(CROSS), d_state=1, ssm_ratio=1.0, gated=False, conv_bias=False)
    return partial(VSSBlock, mixer=mixer, mlp=mlp)


def vanilla_block() -> Constructor:
    """VMamba's block of the first generation: 16 states, twice the width inside, a gate, no feed-forward layer."""
    return partial(VSSBlock, mixer=partial(SS2D, scan=Scan(CROSS)))


def multi_head_block(patterns: Sequence[ScanPattern | str] = HEADS, threshold: float = 0.0) -> Constructor:
    """`vanilla_block` with multi-head scanning, as wide inside as outside; see `backbones.layers.MultiHeadScan`."""
    scanner = partial(MultiHeadScan, patterns=patterns, threshold=threshold)
    return partial(VSSBlock, mixer=partial(SS2D, ssm_ratio=1.0, scanner=scanner, out_proj=False))


def conv_block() -> Constructor:
    """A convolution, see `ConvBlock`."""
    return ConvBlock


BLOCKS: dict[str, Callable[..., Constructor]] = {
    "vss": vss_block,
    "vanilla": vanilla_block,
    "multi_head": multi_head_block,
    "multi_scale": partial(vss_block, MultiScaleConvFFN),
    "conv": conv_block,
}


class UNetDecoder(nn.Module):
    """Blocks on the coarsest map, levels that widen it, join the encoder's map and refine it, and a last widening.

    Odd sides need no care: a widened map is cropped to the encoder's map that it meets, at the bottom and right, and
    where the encoder rounds down, its last row and column are repeated.

    Args:
        dims: widths of the encoder's maps, finest first, each of half the resolution of the one before.
        depths: blocks of the bottom, then of each level from the coarsest; len(dims) of them. Without blocks at the
            bottom these are (0, ...).
        block: "vss", "vanilla", "multi_head", "multi_scale" (MSVM-UNet), "conv", or a constructor called as
            ``block(dim, drop_path=rate, device=, dtype=)``.
        block_args: of a block given by name: ``patterns`` and ``threshold`` of "multi_head".
        up: "expand", "lkpe", "bilinear", or a constructor called as ``up(dim, out_dim, scale, device=, dtype=)``, see
            :mod:`backbones.layers.patch_expand`.
        merge: "concat" joins the widened map and the encoder's by a linear layer; "add" adds them; "add_before" adds
            the encoder's map of a level's input before it is widened, so the finest one is never read (VM-UNet).
        scale: of the last widening: the stride of the finest map.
        out_dim: width of the result; None is dims[0].
        drop_path_rate: stochastic depth of the first block; it falls linearly to 0 at the last.

    Raises:
        ValueError: a choice is unknown, or ``dims`` and ``depths`` disagree.
    """

    def __init__(
        self,
        dims: Sequence[int],
        depths: Sequence[int] = (0, 2, 2, 2),
        block: str | Constructor = "vss",
        up: str | Constructor = "expand",
        merge: str = "concat",
        scale: int = 4,
        out_dim: int | None = None,
        drop_path_rate: float = 0.0,
        block_args: dict[str, Any] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if len(depths) != len(dims) or len(dims) < 2 or min(depths) < 0:
            raise ValueError(f"depths: got {tuple(depths)}, expected {len(dims)} numbers of blocks, as dims has maps")
        if merge not in MERGES:
            raise ValueError(f"merge: got {merge!r}, expected one of {MERGES}")
        dd: dict[str, Any] = {"device": device, "dtype": dtype}
        if block_args and block != "multi_head":
            raise ValueError(f"block_args: got {block_args}, but only block 'multi_head' has any")
        new_block = _chosen("block", block, BLOCKS)(**(block_args or {})) if isinstance(block, str) else block
        new_up = _chosen("up", up, EXPANSIONS) if isinstance(up, str) else up
        self.merge, self.out_dim = merge, dims[0] if out_dim is None else out_dim
        self.grad_checkpointing = False
        rates = iter(torch.linspace(drop_path_rate, 0, sum(depths), device="cpu").tolist())
        widths = tuple(reversed(dims))

        def blocks(width: int, depth: int) -> nn.ModuleList:
            return nn.ModuleList(new_block(width, drop_path=next(rates), **dd) for _ in range(depth))

        self.bottom = blocks(widths[0], depths[0])
        self.levels: Any = nn.ModuleList()
        for wide, width, depth in zip(widths[:-1], widths[1:], depths[1:], strict=True):
            join = nn.Linear(2 * width, width, **dd) if merge == "concat" else nn.Identity()
            self.levels.append(Level(new_up(wide, width, 2, **dd), join, blocks(width, depth), merge))
        self.final_up = new_up(dims[0], self.out_dim, scale, **dd)
        init_linears(self)

    def forward(self, x: Tensor, skips: Sequence[Tensor]) -> Tensor:
        """One map of the finest one's sides times ``scale``.

        Args:
            x: the map at the bottom, (b, h, w, dims[-1]).
            skips: len(dims) channels-last maps, finest first; the last has the resolution of ``x``, and is read where
                ``merge`` is "add_before" alone.

        Returns:
            (b, scale height, scale width, out_dim).
        """
        x = _refined(self.bottom, x, self.grad_checkpointing)
        for level, here, skip in zip(self.levels, reversed(skips[1:]), reversed(skips[:-1]), strict=True):
            x = level(x, here, skip, self.grad_checkpointing)
        return self.final_up(x)


class Level(nn.Module):
    """One resolution of the decoder: the map below is widened, joined with the encoder's, and refined.

    Args:
        up: doubles the sides.
        join: from both maps' channels to one's, where ``merge`` is "concat".
        blocks: refine the map.
        merge: see :class:`UNetDecoder`.
    """

    def __init__(self, up: nn.Module, join: nn.Module, blocks: nn.ModuleList, merge: str) -> None:
        super().__init__()
        self.up, self.join, self.blocks, self.merge = up, join, blocks, merge

    def forward(self, x: Tensor, here: Tensor, skip: Tensor, checkpointed: bool = False) -> Tensor:
        """The map of this level, (b, h, w, c).

        Args:
            x: the map of the level below.
            here: the encoder's map with the sides of ``x``, read where ``merge`` is "add_before".
            skip: the encoder's map of this level.
            checkpointed: compute the blocks again in backward.
        """
        before = self.merge == "add_before"
        x = fitted(self.up(x + here if before else x), skip.shape[1], skip.shape[2])
        if self.merge == "concat":
            x = self.join(torch.cat([x, skip], dim=-1))
        elif not before:
            x = x + skip
        return _refined(self.blocks, x, checkpointed)


def _refined(blocks: Any, x: Tensor, checkpointed: bool) -> Tensor:
    for block in blocks:
        x = run_block(block, x, checkpointed=checkpointed)
    return x


def fitted(x: Tensor, height: int, width: int) -> Tensor:
    """(b, h, w, c) cropped at the bottom and right to (b, height, width, c); a row or column too few is repeated."""
    for axis, side in ((1, height), (2, width)):
        if x.shape[axis] > side:
            x = x.narrow(axis, 0, side)
        elif x.shape[axis] < side:
            last = x.narrow(axis, x.shape[axis] - 1, 1)
            x = torch.cat([x, *[last] * (side - x.shape[axis])], dim=axis)
    return x


def _chosen(argument: str, name: str, choices: dict[str, Any]) -> Any:
    if name not in choices:
        raise ValueError(f"{argument}: got {name!r}, expected one of {tuple(choices)}{did_you_mean(name, choices)}")
    return choices[name]
