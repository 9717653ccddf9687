"""Blocks that leave their last residual sum to what comes behind compute what calls of them do."""

from functools import partial

import pytest
import torch
from torch import nn

from backbones.base.chain import _has_chained, _is_as_written, can_chain, run_chain
from backbones.layers import MambaBlock, VSSBlock
from backbones.models.adventurer import AdventurerBlock
from tests.small_models import create_shallow

GRID = (2, 3)
BLOCKS = {
    "mamba": (MambaBlock, GRID),
    "mamba, a layer behind": (partial(MambaBlock, after=lambda dim, **dd: _Doubled()), GRID),
    "vss": (VSSBlock, None),
}


class _Doubled(nn.Module):
    def forward(self, x: torch.Tensor, grid: tuple[int, int]) -> torch.Tensor:
        return 2 * x


@pytest.mark.parametrize(("make", "grid"), BLOCKS.values(), ids=BLOCKS.keys())
def test_a_chain_is_its_blocks(make: type, grid: tuple[int, int] | None) -> None:
    blocks = [make(8) for _ in range(3)]
    args = () if grid is None else (grid,)
    x = torch.randn(2, 6, 8) if args else torch.randn(2, *GRID, 8)
    expected = x
    for block in blocks:
        expected = block(expected, *args)
    found, pending = run_chain(blocks, x, *args)
    torch.testing.assert_close(found if pending is None else found + pending, expected)


def test_adventurers_chain_is_its_blocks() -> None:
    model = create_shallow("adventurer_tiny").eval()
    assert all(type(block) is AdventurerBlock for block in model.blocks)
    x, grid = torch.randn(1, 7, model.embed_dim), (2, 3)
    expected = x
    for block in model.blocks:
        expected = block(expected, grid)
    found, pending = run_chain(model.blocks, x, grid)
    torch.testing.assert_close(found + pending, expected)


def test_what_stands_for_a_block_is_called() -> None:
    block = VSSBlock(8)
    assert _is_as_written(block)
    handle = block.register_forward_hook(lambda *args: None)
    assert not _is_as_written(block)
    handle.remove()
    block.compile()
    assert not _is_as_written(block)
    block = VSSBlock(8)
    block.forward = lambda x: x
    assert not _is_as_written(block)


def test_only_blocks_that_mean_it_are_chained() -> None:
    class Other(VSSBlock):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return -x

    assert _has_chained(VSSBlock) and _has_chained(AdventurerBlock)
    assert not _has_chained(Other) and not _has_chained(nn.Linear)
    x = torch.randn(1, 2, 3, 8)
    assert can_chain([VSSBlock(8)], x)
    assert not can_chain([VSSBlock(8), Other(8)], x)
    assert not can_chain([VSSBlock(8)], x.to("meta"))
