"""What only training shows: stochastic depth on every branch of every block, and dropout."""

from typing import Any

import pytest
import torch
from timm.layers import DropPath
from torch import Tensor, nn

from backbones.layers import MambaBlock, PositionalBlock
from backbones.layers.vss_block import VSSBlock
from backbones.models.adventurer import AdventurerBlock
from backbones.models.efficientvmamba import EVSSBlock, InvertedResidual
from backbones.models.groupmamba import GroupMambaBlock
from tests.small_models import SMALLEST, blocks_of, create_small, images, is_plain

BRANCHES: dict[type[nn.Module], int] = {
    AdventurerBlock: 2,
    MambaBlock: 1,
    PositionalBlock: 2,
    EVSSBlock: 1,
    InvertedResidual: 1,
    GroupMambaBlock: 2,
}


def branches(block: nn.Module) -> int:
    """How many branches a block adds to its input."""
    if isinstance(block, VSSBlock):
        return 1 if block.mlp is None else 2
    return BRANCHES[type(block)]


def shortcut(block: nn.Module, x: Tensor, rest: tuple[Any, ...]) -> Tensor:
    """What is left of a block whose branches are dropped."""
    if isinstance(block, PositionalBlock):
        x = x + block.cpe1(x)
        return x + block.cpe2(x)
    if isinstance(block, MambaBlock) and block.after is not None:
        return block.after(x, *rest)
    return x


def inputs_of_blocks(model: nn.Module) -> list[tuple[nn.Module, Tensor, tuple[Any, ...]]]:
    """Every block of ``model`` with what it is called with, for two images."""
    taken: list[tuple[nn.Module, Tensor, tuple[Any, ...]]] = []
    handles = [
        block.register_forward_pre_hook(lambda module, args: taken.append((module, args[0].clone(), args[1:])))
        for block in blocks_of(model)
    ]
    model(images())
    for handle in handles:
        handle.remove()
    return taken


@pytest.mark.parametrize("name", SMALLEST)
def test_stochastic_depth_grows_linearly_over_the_whole_depth(name: str) -> None:
    blocks = blocks_of(create_small(name, drop_path_rate=0.3))
    rates = [0.0 if isinstance(x.drop_path, nn.Identity) else x.drop_path.drop_prob for x in blocks]
    assert rates == pytest.approx([0.3 * i / (len(blocks) - 1) for i in range(len(blocks))])
    layers = [m for block in blocks for m in block.modules() if isinstance(m, DropPath)]
    assert len(layers) == len(blocks) - 1 and all(x.scale_by_keep for x in layers)
    for rate in ({}, {"drop_path_rate": 0.0}):
        model = create_small(name, **rate)
        assert all(type(block.drop_path) is nn.Identity for block in blocks_of(model))


@torch.no_grad()
@pytest.mark.parametrize("name", SMALLEST)
def test_a_block_whose_branches_are_dropped_is_its_shortcut(name: str) -> None:
    model = create_small(name).eval()
    for block, x, rest in inputs_of_blocks(model):
        whole, expected = block(x, *rest), shortcut(block, x, rest)
        assert (whole - expected).abs().max() > 1e-5
        block.drop_path = DropPath(1.0).eval()
        assert torch.equal(block(x, *rest), whole)  # nothing is dropped in eval mode
        calls: list[Tensor] = []
        block.drop_path.train().register_forward_hook(lambda module, args, output, calls=calls: calls.append(args[0]))
        torch.testing.assert_close(block(x, *rest), expected, rtol=0, atol=0)
        assert len(calls) == branches(block)
        assert all(call.shape == x.shape for call in calls)


@torch.no_grad()
@pytest.mark.parametrize("name", SMALLEST)
def test_images_are_dropped_one_by_one_and_those_kept_are_scaled(name: str) -> None:
    """A branch is kept for half of the images, and counts twice there."""
    model = create_small(name).eval()
    block, x, rest = inputs_of_blocks(model)[-1]
    block.drop_path = DropPath(0.5).train()
    factors: list[Tensor] = []

    def total(x: Tensor) -> Tensor:
        return x.flatten(1).abs().sum(1)

    block.drop_path.register_forward_hook(lambda module, args, output: factors.append(total(output) / total(args[0])))
    for _ in range(8):
        block(x, *rest)
    assert len(factors) == 8 * branches(block)
    torch.testing.assert_close(torch.stack(factors), 2 * (torch.stack(factors) > 1).float())
    assert any((factor > 1).sum() == 1 for factor in factors)


@torch.no_grad()
@pytest.mark.parametrize("name", SMALLEST)
def test_dropout_stands_before_the_classifier(name: str) -> None:
    model = create_small(name, drop_rate=0.25).eval()
    features = model.forward_features(images()).repeat(64, *[1] * (3 - is_plain(name)))
    expected = model.forward_head(features, pre_logits=True)
    assert torch.equal(model.forward_head(features, pre_logits=True), expected)
    found = model.train().forward_head(features, pre_logits=True)
    kept = found != 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(found[kept], expected[kept] / 0.75, rtol=1e-4, atol=1e-5)
    assert not torch.equal(model(images()), model(images()))
    still = create_small(name).train()
    assert torch.equal(*(still.forward_head(features, pre_logits=True) for _ in range(2)))


@torch.no_grad()
@pytest.mark.parametrize("name", [x for x in SMALLEST if is_plain(x)])
def test_dropout_stands_behind_the_position_embedding(name: str) -> None:
    model = create_small(name, pos_drop_rate=0.25, embed_dim=96).eval()
    seen: list[Tensor] = []
    model.pos_drop.register_forward_hook(lambda module, args, output: seen.extend((args[0], output)))
    model(images())
    torch.manual_seed(0)
    model.pos_drop.train()
    model(images())
    tokens, same, again, dropped = seen
    assert torch.equal(tokens, same) and torch.equal(tokens, again)
    embedded = model.patch_embed(images()).sum() + model.pos_embed.sum() * len(tokens)
    embedded += 0.0 if model.cls_token is None else model.cls_token.sum() * len(tokens)
    torch.testing.assert_close(tokens.sum(), embedded, rtol=1e-4, atol=1e-3)
    kept = dropped != 0
    assert kept.float().mean().item() == pytest.approx(0.75, abs=0.03)
    torch.testing.assert_close(dropped[kept], tokens[kept] / 0.75)
    inputs: list[Tensor] = []
    model.blocks[0].register_forward_pre_hook(lambda module, args: inputs.append(args[0]))
    model(images())
    if model.rope is None:  # else the tokens are turned in between
        assert torch.equal(inputs[0], seen[-1])
