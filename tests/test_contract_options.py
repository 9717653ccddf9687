"""The options of timm's contract: what each changes, beside models that are built without it."""

import copy
import re
from collections.abc import Callable
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.layers import PatchEmbed, StemPatchEmbed
from backbones.layers.linear import patch_products
from tests.small_models import SMALLEST, blocks_of, create_small, images, is_plain

PLAIN = [x for x in SMALLEST if is_plain(x)]
HIERARCHIES = [x for x in SMALLEST if not is_plain(x)]
# Parameters without weight decay besides those of one dimension, by the ends of their names.
SCAN = ("ssm.A_log", "ssm.D", "ssm.dt_proj_bias")
NO_DECAY: dict[str, tuple[str, ...]] = {
    "vim": ("pos_embed", "cls_token", "conv_bias", *SCAN),
    "lbvim": ("pos_embed", "conv_bias", *SCAN),
    "localvim": ("pos_embed", "cls_token", "conv_bias", *SCAN),
    "plainmamba": ("pos_embed", "direction_B", *SCAN),
    "adventurer": ("pos_embed", "cls_token", "conv_bias", "mixer.A_log", "mixer.D", "mixer.dt_bias"),
    "msvmamba": tuple(f"{way}.{x.partition('.')[2]}" for x in SCAN for way in ("ssm_full", "ssm_low")),
    "vssd": ("mixer.A_log",),
}


@pytest.fixture(scope="module", params=SMALLEST)
def name(request: pytest.FixtureRequest) -> str:
    """One model of every generation of every family."""
    return request.param


@pytest.fixture(scope="module")
def small(name: str) -> nn.Module:
    """It, in eval mode, its norms away from their start; tests leave it as it is."""
    torch.manual_seed(0)
    return away_from_start(create_small(name, drop_path_rate=0.1).eval())


@torch.no_grad()
def away_from_start(model: nn.Module) -> nn.Module:
    """Norms of weight 1 and bias 0 hide that one is missing where another follows."""
    for module in model.modules():
        if isinstance(module, nn.LayerNorm | nn.RMSNorm):
            for p in module.parameters():
                p.add_(0.3 * torch.randn_like(p))
    return model


def with_outputs_of_blocks(model: nn.Module, **options: Any) -> tuple[Any, list[Tensor]]:
    """What ``forward_intermediates`` gives, and the outputs of the blocks or stages that it ran."""
    seen: list[Tensor] = []
    parts = model.blocks if hasattr(model, "blocks") else model.stages
    handles = [part.register_forward_hook(lambda module, args, output: seen.append(output)) for part in parts]
    try:
        return model.forward_intermediates(images(), **options), seen
    finally:
        for handle in handles:
            handle.remove()


def split(model: nn.Module, tokens: Tensor) -> tuple[Tensor, Tensor | None]:
    """Patches and class token, by the place that the model's name gives it."""
    if model.cls_token is None:
        return tokens, None
    patches = tokens.shape[1] - 1
    i = {"first": 0, "middle": patches // 2, "last": patches}[model.class_token_position]
    return torch.cat([tokens[:, :i], tokens[:, i + 1 :]], dim=1), tokens[:, i : i + 1]


@torch.no_grad()
@pytest.mark.parametrize("norm", [False, True])
def test_features_are_those_of_the_blocks_with_or_without_the_norm(name: str, small: nn.Module, norm: bool) -> None:
    fmt = "NLC" if is_plain(name) else "NHWC"
    (final, found), seen = with_outputs_of_blocks(small, norm=norm, output_fmt=fmt)
    assert len(found) == len(seen) == len(small.feature_info)
    for i, (feature, x) in enumerate(zip(found, seen, strict=True)):
        if norm and (is_plain(name) or i == len(seen) - 1):
            x = small.norm(x)
        torch.testing.assert_close(feature, split(small, x)[0] if is_plain(name) else x, rtol=0, atol=0)
    torch.testing.assert_close(final, small.norm(seen[-1]), rtol=0, atol=0)
    torch.testing.assert_close(final, small.forward_features(images()))
    by_default = small.forward_intermediates(images(), output_fmt=fmt, intermediates_only=True)
    bare = small.forward_intermediates(images(), norm=False, output_fmt=fmt, intermediates_only=True)
    assert all(torch.equal(x, y) for x, y in zip(by_default, bare, strict=True))


@torch.no_grad()
def test_the_last_of_a_number_those_listed_or_all(name: str, small: nn.Module) -> None:
    maps = small.forward_intermediates(images(), intermediates_only=True)
    count = len(maps)
    for indices, expected in (
        (None, range(count)),
        (1, [count - 1]),
        (2, [count - 2, count - 1]),
        ([0, -1], [0, count - 1]),
    ):
        found = small.forward_intermediates(images(), indices=indices, intermediates_only=True)
        assert len(found) == len(expected)
        assert all(torch.equal(x, maps[i]) for x, i in zip(found, expected, strict=True))
    assert all(x.is_contiguous() for x in maps)


@torch.no_grad()
def test_stopping_early_runs_no_block_more(name: str, small: nn.Module) -> None:
    every = len(small.feature_info)
    for stop, indices, ran in ((True, [0], 1), (False, [0], every), (True, [1, 0], 2), (True, [-1], every)):
        (final, maps), seen = with_outputs_of_blocks(small, indices=indices, stop_early=stop)
        assert len(seen) == ran and len(maps) == len(indices)
        normed = is_plain(name) or ran == every
        torch.testing.assert_close(final, small.norm(seen[-1]) if normed else seen[-1], rtol=0, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("plain", PLAIN)
def test_prefix_tokens_stand_beside_their_maps(plain: str) -> None:
    for position in ("first", "middle", "last") if plain in ("vim_tiny", "localvim_tiny_midcls") else (None,):
        given = {} if position is None else {"class_token_position": position}
        model = away_from_start(create_small(plain, **given).eval())
        assert model.num_prefix_tokens == (model.cls_token is not None)
        for norm in (False, True):
            pairs, seen = with_outputs_of_blocks(model, return_prefix_tokens=True, norm=norm, intermediates_only=True)
            maps = model.forward_intermediates(images(), norm=norm, intermediates_only=True)
            for pair, x, alone in zip(pairs, seen, maps, strict=True):
                patches, prefix = split(model, model.norm(x) if norm else x)
                feature, token = (pair, None) if prefix is None else pair
                assert torch.equal(feature, alone)
                torch.testing.assert_close(feature, patches.transpose(1, 2).unflatten(2, (4, 4)), rtol=0, atol=0)
                assert token is None or torch.equal(token, prefix)


@torch.no_grad()
@pytest.mark.parametrize("plain", PLAIN)
def test_a_branch_is_what_the_mixer_adds(plain: str) -> None:
    model = away_from_start(create_small(plain).eval())
    added: list[Tensor] = []
    for block in model.blocks:
        block.mixer.register_forward_hook(lambda module, args, output: added.append(output))
    final, found = model.forward_intermediates(images(), branch=True, output_fmt="NLC")
    assert len(added) == len(found) == len(model.blocks)
    for feature, x in zip(found, added, strict=True):
        assert torch.equal(feature, split(model, x)[0])
    torch.testing.assert_close(final, model.forward_features(images()))
    only = model.forward_intermediates(images(), indices=[1], branch=True, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(only[0], found[1])
    normed = model.forward_intermediates(images(), indices=[1], branch=True, norm=True, output_fmt="NLC")[1][0]
    torch.testing.assert_close(normed, split(model, model.norm(added[1]))[0])


@pytest.mark.parametrize("plain", ["vim_tiny", "adventurer_tiny"])
def test_branches_are_computed_again_when_checkpointed(plain: str) -> None:
    model = create_small(plain).train()
    calls: list[nn.Module] = []
    for block in model.blocks:
        block.mixer.register_forward_pre_hook(lambda module, args: calls.append(module))
    for enable, times in ((False, 1), (True, 2)):
        model.set_grad_checkpointing(enable)
        calls.clear()
        final, maps = model.forward_intermediates(images(), branch=True)
        (final.mean() + sum(x.square().mean() for x in maps)).backward()
        assert len(calls) == times * len(model.blocks)


@torch.no_grad()
@pytest.mark.parametrize("reduced", [None, {"schedule": {1: 0.5}}, {"mode": "merge", "schedule": {1: 3}}])
@pytest.mark.parametrize("plain", ["vim_tiny", "adventurer_tiny", "plainmamba_l1"])
def test_hooks_on_blocks_fire_where_their_insides_are_looked_at(plain: str, reduced: dict | None) -> None:
    """Branches are taken, or tokens leave by what a block added; a hook may also change what a block gives."""
    model = create_small(plain, token_reduction=reduced).eval()
    ways = [lambda: model.forward_intermediates(images(), branch=True)[0], lambda: model(images())]
    for way in ways if reduced else ways[:1]:
        expected = way()
        seen: list[Tensor] = []
        hooks = [x.register_forward_hook(lambda module, args, y, seen=seen: seen.append(y)) for x in model.blocks]
        torch.testing.assert_close(way(), expected)
        assert len(seen) == len(model.blocks)
        assert {(y.dim(), y.shape[2]) for y in seen} == {(3, model.embed_dim)}
        hooks.append(model.blocks[0].register_forward_hook(lambda module, args, y: y.flip(-1)))
        assert (way() - expected).abs().max() > 1e-6
        for hook in hooks:
            hook.remove()


@torch.no_grad()
@pytest.mark.parametrize("pool", ["avg", "max", "token", "map", ""])
@pytest.mark.parametrize("plain", PLAIN)
def test_plain_models_pool_patches_or_take_the_token(plain: str, pool: str) -> None:
    for position in ("first", "middle", "last") if plain == "vim_tiny" else (None,):
        given = {} if position is None else {"class_token_position": position}
        model = create_small(plain, **given)
        if (pool == "token" and model.cls_token is None) or (pool == "map" and model.attn_pool is None):
            with pytest.raises(ValueError, match=f"global_pool: got '{pool}', expected one of"):
                create_small(plain, global_pool=pool, **given)
            continue
        model = away_from_start(create_small(plain, global_pool=pool, **given).eval())
        features = model.forward_features(images())
        patches, token = split(model, features)
        expected = features
        if pool == "token":
            expected = token[:, 0]
        elif pool == "map":
            expected = model.attn_pool(features)
        elif pool:
            expected = patches.mean(1) if pool == "avg" else patches.amax(1)
        assert model.global_pool == pool
        torch.testing.assert_close(model.forward_head(features, pre_logits=True), expected, rtol=0, atol=0)
        torch.testing.assert_close(model(images()), F.linear(expected, model.head.weight, model.head.bias))
        assert (model.attn_pool is not None) == (pool == "map")


@torch.no_grad()
@pytest.mark.parametrize("pool", ["avg", "max", "avgmax", "catavgmax", ""])
@pytest.mark.parametrize("hierarchy", HIERARCHIES)
def test_hierarchies_pool_their_last_map(hierarchy: str, pool: str) -> None:
    if hierarchy.startswith("groupmamba") and pool == "catavgmax":
        with pytest.raises(ValueError, match="global_pool: got 'catavgmax', expected one of"):
            create_small(hierarchy, global_pool=pool)
        return
    model = away_from_start(create_small(hierarchy, global_pool=pool).eval())
    x = model.forward_features(images())
    mean, most = x.mean((1, 2)), x.amax((1, 2))
    expected = {
        "avg": mean, "max": most, "avgmax": (mean + most) / 2, "catavgmax": torch.cat([mean, most], 1), "": x
    }[pool]  # fmt: skip
    if hierarchy.startswith("groupmamba"):
        expected = expected if pool == "" else model.head.class_block(expected[:, None, None])[:, 0, 0]
        expected = model.head.norm(expected)
    assert model.global_pool == pool and model.head_hidden_size == expected.shape[-1]
    torch.testing.assert_close(model.forward_head(x, pre_logits=True), expected)
    classifiers = model.get_classifier() if isinstance(model.get_classifier(), tuple) else (model.get_classifier(),)
    logits = sum(fc(expected) for fc in classifiers) / len(classifiers)
    torch.testing.assert_close(model(images()), logits)


def test_a_classifier_is_replaced_in_the_models_dtype_and_pooling_kept(name: str) -> None:
    model = create_small(name, dtype=torch.float64)
    pool = model.global_pool
    for count in (3, 0, 7):
        model.reset_classifier(count)
        assert (model.num_classes, model.global_pool) == (count, pool)
        found = model.get_classifier()
        for fc in found if isinstance(found, tuple) else (found,):
            assert isinstance(fc, nn.Linear) == (count > 0)
            assert isinstance(fc, nn.Identity) or (fc.out_features == count and fc.weight.dtype == torch.float64)
            assert isinstance(fc, nn.Identity) or not fc.bias.any()
        assert model(images().double()).shape == (2, count or model.head_hidden_size)
    model.reset_classifier(3, "max")
    assert model.global_pool == "max" and model(images().double()).shape == (2, 3)


def test_exactly_these_take_no_weight_decay(name: str, small: nn.Module) -> None:
    family = max((x for x in NO_DECAY if name.startswith(x)), key=len, default="")
    ends = NO_DECAY.get(family, SCAN)
    expected = {key for key, _ in small.named_parameters() if re.search(rf"(^|\.)({'|'.join(ends)})$", key)}
    assert small.no_weight_decay() == expected
    assert {end for end in ends if any(key.endswith(end) for key in expected)} == {
        end for end in ends if end != "cls_token" or small.cls_token is not None
    }


@pytest.mark.parametrize("coarse", [False, True])
@pytest.mark.parametrize("group", [timm.models.group_parameters, timm.models.group_modules])
@pytest.mark.parametrize("plain", PLAIN)
def test_groups_of_a_plain_model_follow_its_depth(plain: str, group: Callable[..., dict], coarse: bool) -> None:
    """The embedding first, then a group a block; the norm belongs to the last block, the pooling to the head."""
    model = create_small(plain, device="meta")
    depth = len(model.blocks)
    expected = {"patch_embed": 0, "pos_embed": 0, "cls_token": 0, "norm": depth}
    expected |= {f"blocks.{i}": i + 1 for i in range(depth)}
    head = depth + 1
    found = group(model, model.group_matcher(coarse), reverse=True)
    parts = {key: [part for part in expected if f"{key}.".startswith(f"{part}.")] for key in found}
    assert found == {key: expected[part[0]] if part else head for key, part in parts.items()}
    outside = {key.partition(".")[0] for key, part in parts.items() if not part}
    assert outside <= {"head", "attn_pool", "head_drop", "pos_drop", "rope"} and "head" in outside


def test_block_counts_of_groups(name: str, small: nn.Module) -> None:
    ids = timm.models.group_parameters(small, small.group_matcher(), reverse=True)
    assert set(ids.values()) == set(range(len(blocks_of(small)) + 2))


@torch.no_grad()
@pytest.mark.parametrize("stride", [4, 8])
@pytest.mark.parametrize("size", [(8, 8), (9, 8), (8, 13), (17, 21), (5, 30)])
def test_patches_are_padded_at_the_bottom_and_right(size: tuple[int, int], stride: int) -> None:
    """A patch at (i, j) begins at pixel (i stride, j stride); what lies outside of the image is zero."""
    embed = PatchEmbed(8, stride, 3, 5, pad=True)
    height, width = size
    rows, columns = (-(-max(side - 8, 0) // stride) + 1 for side in size)
    assert embed.grid_size(*size) == (rows, columns)
    canvas = torch.zeros(2, 3, 60, 60)
    x = images(2, 3, height, width)
    canvas[:, :, :height, :width] = x
    expected = torch.stack(
        [
            (canvas[:, None, :, i * stride : i * stride + 8, j * stride : j * stride + 8] * embed.proj.weight).sum(
                (2, 3, 4)
            )
            + embed.proj.bias
            for i in range(rows)
            for j in range(columns)
        ],
        dim=1,
    )
    torch.testing.assert_close(embed(x), expected, rtol=1e-4, atol=1e-5)
    if height >= 8 and width >= 8:
        whole = PatchEmbed(8, stride, 3, 5)
        whole.load_state_dict(embed.state_dict())
        rows, columns = ((side - 8) // stride + 1 for side in size)
        assert whole.grid_size(*size) == (rows, columns)
        grid = embed(x).unflatten(1, embed.grid_size(*size))[:, :rows, :columns]
        torch.testing.assert_close(whole(x).unflatten(1, (rows, columns)), grid)


@torch.no_grad()
def test_the_map_of_a_stem_is_padded_at_the_bottom_and_right() -> None:
    embed = StemPatchEmbed(16, 16, 3, 5, width=4).eval()
    x = images(1, 3, 33, 50)
    y = embed(x).unflatten(1, embed.grid_size(33, 50))
    assert y.shape == (1, 3, 4, 5)
    stem = F.pad(embed.stem(x), (0, 32 - 25, 0, 24 - 17))
    torch.testing.assert_close(y.permute(0, 3, 1, 2), embed.patches.proj(stem))


@pytest.mark.parametrize("size", [(32, 48), (33, 50)])
def test_patches_of_a_stem_are_one_product(size: tuple[int, int]) -> None:
    embed = StemPatchEmbed(16, 16, 3, 5, width=4).double().eval()
    products, convolved = embed.patches.proj, copy.deepcopy(embed)
    convolved.patches.proj.register_forward_hook(lambda module, args, output: None)  # which has to see its call
    x = [images(2, 3, *size).double().requires_grad_() for _ in range(2)]
    stem = images(2, 4, 16, 24).double().contiguous(memory_format=torch.channels_last)
    assert patch_products(products, stem) is not None
    assert patch_products(products, stem.contiguous()) is None
    assert patch_products(convolved.patches.proj, stem) is None
    assert patch_products(nn.Conv2d(4, 5, 8, 4).double(), stem) is None
    found, expected = embed(x[0]), convolved(x[1])
    assert found.shape == expected.shape
    torch.testing.assert_close(found, expected)
    found.square().sum().backward(), expected.square().sum().backward()
    torch.testing.assert_close(x[0].grad, x[1].grad)
    for ours, theirs in zip(embed.parameters(), convolved.parameters(), strict=True):
        torch.testing.assert_close(ours.grad, theirs.grad)
