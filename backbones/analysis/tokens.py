"""Which tokens a model keeps that drops or merges some on their way through its blocks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from backbones.base.reduction import plain_backbone


@dataclass(frozen=True)
class LeftTokens:
    """The patches of a batch in front of a block.

    Attributes:
        block: counted from 0.
        grid: rows and columns of all patches.
        cells: (b, m) the raster index of each patch that is left.
        owner: (b, rows * columns) which of those each cell belongs to: the one that it was merged into, or the nearest
            where it was dropped.
    """

    block: int
    grid: tuple[int, int]
    cells: Tensor
    owner: Tensor


@torch.no_grad()
def left_tokens(model: nn.Module, images: Tensor) -> list[LeftTokens]:
    """The patches that are left in front of each block where some leave, in turn.

    Args:
        model: with tokens to be reduced, see :func:`backbones.reduce_tokens`, in evaluation mode.
        images: (b, in_chans, height, width).

    Raises:
        ValueError: the model holds no plain backbone, or more than one, or it keeps all tokens.
    """
    backbone: Any = plain_backbone(model)
    if backbone.token_reduction is None:
        raise ValueError(
            f"model: got a {type(backbone).__name__} that keeps all tokens, expected one that reduces them"
        )
    x, grid, tables = backbone._embed(images)
    reduced = backbone._reduced_pass(grid, tables)
    found = []
    for i in range(len(backbone.blocks)):
        x, _ = backbone._through(i, x, grid, tables, reduced)
        if i in backbone.token_reduction.schedule and reduced.subset is not None:
            found.append(LeftTokens(i, grid, reduced.subset.cells, reduced.owner()))
    return found
