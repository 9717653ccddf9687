"""Pruned and merged tokens in plain models, against ToP-ViM's recording and against loops over tokens."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

import backbones
from backbones.analysis.flops import count
from backbones.base.reduction import ReducedPass, TokenReduction
from backbones.layers import SelectiveSSM
from backbones.layers.rotary import rotate
from backbones.mm import ImageClassifier
from backbones.patterns import BIDIRECTIONAL
from tests import tolerances
from tools import recordings
from tools.parity import official_file, relative

SMALL: dict[str, Any] = {"embed_dim": 16, "depth": 6, "d_state": 4, "num_classes": 5, "patch_size": 8, "img_size": 40}
MODES = [{"schedule": 0.6}, {"schedule": {1: 3, 3: 4}, "mode": "merge"}]
FAMILIES = ["vim_tiny", "lbvim_tiny", "localvim_tiny", "localvim_tiny_midcls", "plainmamba_l1", "adventurer_tiny"]


def small(name: str = "vim_tiny", **kwargs: Any) -> Any:
    """A model of 5 x 5 patches in float64, so that a wrong token is no rounding error."""
    wide = {"embed_dim": 32} if name.startswith("adventurer") else {}  # a head is 64 channels of twice the width
    return timm.create_model(name, **SMALL | wide | kwargs).double().eval()


def images(batch: int = 2, height: int = 40, width: int = 40) -> Tensor:
    return torch.randn(batch, 3, height, width, dtype=torch.float64)


def test_topvim_keeps_the_recorded_tokens(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recording = recordings.load("topvim_tiny_224")
    overlay = {"file": str(official_file(tmp_path, recording))}
    model = timm.create_model("vim_tiny", pretrained=True, pretrained_cfg_overlay=overlay).eval()
    backbones.reduce_tokens(model, 0.8, mirrored=True)
    kept, pruned = [], ReducedPass._pruned

    def spied(self: ReducedPass, x: Tensor, count: int) -> tuple[Tensor, Tensor]:
        index, x = pruned(self, x, count)
        kept.append(torch.cat([index[:, : count // 2], index[:, count // 2 + 1 :]], dim=1))  # without the class token
        return index, x

    monkeypatch.setattr(ReducedPass, "_pruned", spied)
    image = recording.image().requires_grad_()
    logits = model(image)
    logits.square().mean().backward()
    assert len(kept) == 3
    for i, index in enumerate(kept):
        assert torch.equal(index, recording.arrays[f"kept{i}"].long())
    torch.testing.assert_close(logits.detach(), recording.arrays["logits"], rtol=0, atol=tolerances.LOGITS)
    found, expected = image.grad[:, :, 8:24, 8:24], recording.arrays["input_grad_crop"]
    assert relative(found, expected) <= tolerances.INPUT_GRADIENT
    assert image.grad.norm().item() == pytest.approx(recording.arrays["input_grad_norm"].item(), rel=1e-3)


def merged_by_hand(x: Tensor, h: Tensor, size: list[float], place: int | None, away: int) -> tuple[Tensor, Any]:
    """R-MeeTo's step for one image, (l, c), token by token: the tokens, and (their sizes, the class token's place)."""
    tokens = [i for i in range(len(x)) if i != place]
    unit = [h[i] / h[i].norm() for i in tokens]
    sources, targets = range(0, len(tokens), 2), range(1, len(tokens), 2)
    partner = {a: max(targets, key=lambda b: float(unit[a] @ unit[b])) for a in sources}
    alike = sorted(sources, key=lambda a: -float(unit[a] @ unit[partner[a]]))[:away]
    sums = {i: x[tokens[i]] * size[i] for i in range(len(tokens))}
    sizes = dict(enumerate(size))
    for a in alike:
        sums[partner[a]] = sums[partner[a]] + sums.pop(a)
        sizes[partner[a]] += sizes.pop(a)
    left = [sums[i] / sizes[i] for i in sorted(sums)]
    if place is not None:
        moved = place * (len(x) - away) // len(x)
        left.insert(moved, x[place])
        place = moved
    return torch.stack(left), ([sizes[i] for i in sorted(sizes)], place)


@torch.no_grad()
@pytest.mark.parametrize("name, place", [("vim_tiny", 12), ("lbvim_tiny", None)])
def test_merging_is_that_of_loops(name: str, place: int | None) -> None:
    model, schedule = small(name), {1: 3, 3: 4}
    batch = images()
    expected = []
    for image in batch:
        x, _, _ = model._embed(image[None])
        here, size, branch = place, [1.0] * 25, x
        for i, block in enumerate(model.blocks):
            if i in schedule:
                left, (size, here) = merged_by_hand(x[0], branch[0], size, here, schedule[i])
                x = left[None]
            branch = block.branch(x, (1, x.shape[1]))
            x = x + branch
        x = model.norm(x)
        expected.append(model.head(x.mean(1) if here is None else x[:, here]))
    backbones.reduce_tokens(model, schedule, "merge")
    torch.testing.assert_close(model(batch), torch.cat(expected))


@torch.no_grad()
@pytest.mark.parametrize("name", ["plainmamba_l1", "localvim_tiny", "adventurer_tiny"])
def test_tokens_of_a_grid_are_pruned_by_the_outputs_of_all_orders(name: str) -> None:
    model, image = small(name), images(1)
    x, grid, tables = model._embed(image)
    along_sequence, score = name.startswith("adventurer"), torch.empty(0)
    assert (getattr(model.blocks[0].mixer, "directions", None) is not None) == along_sequence
    for block in model.blocks[:2]:
        x = rotate(x, *tables) if tables else x
        branch, gated = block.mixer(block.norm(x), grid, per_order=True)
        torch.testing.assert_close(branch, block.branch(x, grid))
        x, score = block.join(x, branch, grid), gated.sum((2, 3))[0, :25]
    expected = sorted(score.topk(15).indices.tolist())
    place = model._class_token_index if along_sequence else None
    reduced = ReducedPass(TokenReduction({2: 0.6}), grid, tables, place, False)
    x = model._embed(image)[0]
    for i, block in enumerate(model.blocks[:3]):
        x, _ = reduced.through(i, block, x, False)
    assert reduced.subset is not None and reduced.subset.cells[0].tolist() == expected


@torch.no_grad()
@pytest.mark.parametrize("score", ["out", "norm"])
def test_pruning_keeps_the_highest_scores(score: str) -> None:
    model, image = small(), images(1)
    x, grid, _ = model._embed(image)
    scores = torch.empty(0)
    for i, block in enumerate(model.blocks):
        if i == 2:
            order = sorted((j for j in range(26) if j != 12), key=lambda j: -float(scores[0, j]))
            kept = sorted(order[:15])  # of 25 x 0.6
            x, grid = x[:, [*kept[:7], 12, *kept[7:]]], (1, 16)
        branch, gated = block.mixer(block.norm(x), grid, per_order=True)
        scores = branch.norm(dim=-1) if score == "norm" else gated[:, :, 1].sum(-1)
        x = x + branch
    backbones.reduce_tokens(model, {2: 0.6}, score=score)
    torch.testing.assert_close(model(image), model.head(model.norm(x)[:, 7]))


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("kwargs", [{"schedule": 1.0}, {"schedule": 0, "mode": "merge"}])
@pytest.mark.parametrize("size", [(40, 40), (24, 24), (24, 56)])
def test_nothing_removed_is_the_identity(name: str, kwargs: dict, size: tuple[int, int]) -> None:
    model = small(name, dynamic_img_size=True)
    x = images(2, *size)
    expected = model(x)
    assert torch.equal(backbones.reduce_tokens(model, **kwargs)(x), expected)


def test_as_many_patches_stay_on_either_side_of_a_middle_token() -> None:
    prune = TokenReduction({}, "prune")
    assert [prune.kept_patches(n, 0.8, True) + 1 for n in (196, 156, 124)] == [157, 125, 101]  # as ToP-ViM's
    assert [prune.kept_patches(9, amount, True) for amount in (1, 0.9, 0.5, 0.01)] == [9, 9, 5, 1]
    assert [prune.kept_patches(9, amount, False) for amount in (1, 0.9, 0.5, 0.01)] == [9, 9, 5, 1]
    assert prune.kept_patches(10, 0.45, False) == 5 and prune.kept_patches(10, 0.45, True) == 4
    assert prune.kept_patches(100, 0.55, False) == 55  # 100 * 0.55 is a little more in floating point
    merge = TokenReduction({}, "merge")
    assert [merge.kept_patches(9, amount, True) for amount in (0, 3, 4, 71)] == [9, 6, 5, 5]


@pytest.mark.parametrize("kwargs", MODES)
@pytest.mark.parametrize("position", ["first", "middle", "last"])
def test_the_class_token_stays_where_the_head_reads_it(kwargs: dict, position: str) -> None:
    model = small(class_token_position=position, num_classes=0)
    x = images()
    backbones.reduce_tokens(model, **kwargs)
    marked = torch.full((16,), 7.0, dtype=torch.float64)
    for block in model.blocks:  # blocks that change nothing, so that the class token stays recognisable
        block.mixer.out_proj.weight.data.zero_()
    model.cls_token.data.copy_(marked)
    model.pos_embed.data[:, model._class_token_index(25)] = 0
    model.norm = nn.Identity()
    features = model.forward_features(x)
    assert features.shape[1] < 26
    assert torch.equal(model(x), marked.expand(2, -1))
    assert (features == marked).all(-1).sum() == 2


@pytest.mark.parametrize("kwargs", MODES)
@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("size", [(40, 40), (24, 56)])
def test_features_are_put_back_on_the_grid(name: str, kwargs: dict, size: tuple[int, int]) -> None:
    width = 32 if name.startswith("adventurer") else 16
    own = SMALL | {"num_classes": 0, "embed_dim": width}
    model = timm.create_model(name, features_only=True, out_indices=(0, 2, 5), dynamic_img_size=True, **own)
    full = model(x := images(2, *size).float())
    backbones.reduce_tokens(model, **kwargs)
    maps = model(x)
    grid = (size[0] // 8, size[1] // 8)
    assert [tuple(y.shape) for y in maps] == [(2, width, *grid)] * 3
    assert torch.equal(maps[0], full[0])
    for image in maps[2].flatten(2).transpose(1, 2):
        assert len(image.unique(dim=0)) < grid[0] * grid[1]


def test_a_dropped_cell_takes_the_nearest_kept_token() -> None:
    reduced = ReducedPass(TokenReduction({1: 0.5}), (4, 5), None, lambda patches: patches // 2, False)
    cells = [0, 7, 8, 13, 19]
    reduced._class = 2
    reduced._lose(torch.tensor([[*cells[:2], -1, *cells[2:]]]))
    values = torch.tensor(cells, dtype=torch.float32)[None, :, None]
    found = reduced.on_grid(values)[0, :, 0].long()
    for cell, owner in enumerate(found.tolist()):
        distance = {k: (k // 5 - cell // 5) ** 2 + (k % 5 - cell % 5) ** 2 for k in cells}
        assert distance[owner] == min(distance.values())
    assert found[cells].tolist() == cells


def test_merged_cells_share_the_mean_of_their_tokens() -> None:
    model = small(num_classes=0)
    for block in model.blocks:
        block.mixer.out_proj.weight.data.mul_(1e-9)  # tokens stay what they are, but their matching does not vanish
    x = images(1)
    (before,) = model.forward_intermediates(x, [0], output_fmt="NLC", intermediates_only=True)
    backbones.reduce_tokens(model, {1: 5, 2: 5, 4: 3}, "merge")
    (after,) = model.forward_intermediates(x, [5], output_fmt="NLC", intermediates_only=True)
    groups, owner = after[0].unique(dim=0, return_inverse=True)
    assert len(groups) == 25 - 13
    for group, value in enumerate(groups):
        torch.testing.assert_close(value, before[0, owner == group].mean(0), rtol=0, atol=1e-6)


def test_the_state_decays_over_dropped_tokens() -> None:
    ssm = SelectiveSSM(6, 4, 2, 2, dtype=torch.float64)
    u = torch.randn(2, 9, 2, 6, dtype=torch.float64)
    kept = torch.tensor([[1, 2, 5, 8], [0, 3, 4, 6]])
    zeroed = torch.zeros_like(u)
    for image, cells in zip(range(2), kept, strict=True):
        zeroed[image, cells] = u[image, cells]
    orders = BIDIRECTIONAL.orders(1, 9, torch.device("cpu"))
    full = ssm(zeroed, orders, "per_order")
    reduced = ReducedPass(TokenReduction({1: 0.5}, align="decay"), (3, 3), None, None, False)
    reduced._cells = kept
    block = nn.Module()
    block.mixer = nn.Module()
    block.mixer.directions = (1, -1)
    gaps = reduced._gaps(block)
    assert gaps.tolist()[0] == [[1, 0], [0, 2], [2, 2], [2, 0]]
    few = torch.stack([u[image, cells] for image, cells in zip(range(2), kept, strict=True)])
    found = ssm.per_order_over_gaps(few, gaps, BIDIRECTIONAL.orders(1, 4, torch.device("cpu")))
    expected = torch.stack([full[image, cells] for image, cells in zip(range(2), kept, strict=True)])
    torch.testing.assert_close(found, expected)


def test_alignment_reaches_the_blocks_behind() -> None:
    model = small()
    x = images()
    plain = backbones.reduce_tokens(model, {2: 0.5})(x)
    aligned = backbones.reduce_tokens(model, {2: 0.5}, align="decay")(x)
    assert 1e-9 < (plain - aligned).abs().max() < 1


@pytest.mark.parametrize(
    "name, kwargs",
    [
        *((name, kwargs) for name in FAMILIES for kwargs in MODES),
        ("vim_tiny", {"schedule": 0.6, "align": "decay"}),
        ("vim_tiny", {"schedule": 0.6, "score": "norm"}),
    ],
)
def test_training_reaches_every_parameter_and_checkpointing_changes_nothing(name: str, kwargs: dict) -> None:
    model = small(name, drop_path_rate=0.1).train()
    backbones.reduce_tokens(model, **kwargs)
    x, gradients = images(), []
    for checkpointed in (False, True):
        model.set_grad_checkpointing(checkpointed)
        model.zero_grad()
        torch.manual_seed(1)
        model(x).square().mean().backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for parameter, gradient in gradients[0].items():
        assert gradient.abs().sum() > 0, parameter
        torch.testing.assert_close(gradients[1][parameter], gradient)


@pytest.mark.parametrize("kwargs", MODES)
@pytest.mark.parametrize("name", ["vim_tiny", "plainmamba_l1"])
def test_gradients_are_those_of_finite_differences(name: str, kwargs: dict) -> None:
    model = backbones.reduce_tokens(small(name, scan_backend="naive"), **kwargs)
    x, step = images(1), images(1)
    x.requires_grad_()
    y = model(x).square().sum()
    (gradient,) = torch.autograd.grad(y, x)
    with torch.no_grad():
        moved = [model(x + sign * 1e-5 * step).square().sum() for sign in (1, -1)]
    assert ((moved[0] - moved[1]) / 2e-5).item() == pytest.approx((gradient * step).sum().item(), rel=1e-5)


@pytest.mark.parametrize("kwargs", MODES)
def test_rotary_angles_follow_their_tokens(kwargs: dict) -> None:
    model = small(rope=True)
    x = images()
    full = model(x)
    for block in model.blocks:
        block.mixer.out_proj.weight.data.zero_()
    turned = model.forward_features(x)
    backbones.reduce_tokens(model, {2: 0.6})
    left = model.forward_features(x)
    for image in range(2):  # every token that is left was turned as it would have been with all others there
        assert all((turned[image] - token).abs().amax(-1).min() < 1e-12 for token in left[image])
    assert full.isfinite().all()


def test_state_dicts_are_those_of_the_whole_model() -> None:
    model, reduced = small(), small(token_reduction={"schedule": 5, "mode": "merge"})
    reduced.load_state_dict(model.state_dict())
    x = images()
    assert not torch.allclose(reduced(x), model(x))
    assert torch.equal(copy.deepcopy(reduced)(x), reduced(x))
    reduced.token_reduction = None
    assert torch.equal(reduced(x), model(x))


def test_operations_fall_with_the_tokens() -> None:
    whole, few = count("vim_tiny"), count("vim_tiny", token_reduction={"schedule": 0.8})
    tokens = [197] * 5 + [157] * 5 + [125] * 5 + [101] * 9
    outside = whole.total.macs - whole.stages["blocks"].macs
    assert few.stages["blocks"].macs * 24 * 197 == whole.stages["blocks"].macs * sum(tokens)
    assert few.total.scan * 24 * 197 == whole.total.scan * sum(tokens)
    assert few.total.macs == outside + few.stages["blocks"].macs
    merged = count("vim_tiny", token_reduction={"mode": "merge", "schedule": 5})
    tokens = [197 - 5 * (i // 2) for i in range(24)]
    assert merged.total.scan * 24 * 197 == whole.total.scan * sum(tokens)


@pytest.mark.parametrize(
    "name, kwargs, words",
    [
        ("vim_tiny", {"mode": "drop"}, ["mode", "'drop'", "prune"]),
        ("vim_tiny", {"schedule": {0: 0.5}}, ["schedule", "block 0", "1..5"]),
        ("vim_tiny", {"schedule": {6: 0.5}}, ["schedule", "block 6", "1..5"]),
        ("vim_tiny", {"schedule": 1.5}, ["schedule", "1.5", "(0, 1]"]),
        ("vim_tiny", {"schedule": 0.5, "mode": "merge"}, ["schedule", "0.5", "number of tokens"]),
        ("vim_tiny_shallow", {"schedule": 0.8}, ["schedule", "2 blocks", "{block: amount}"]),
        ("vim_tiny_shallow", {"schedule": 2, "mode": "merge"}, ["schedule", "2 blocks"]),
        ("vim_tiny", {"score": "delta"}, ["score", "'delta'", "norm"]),
        ("vim_tiny", {"align": "copy"}, ["align", "'copy'", "decay"]),
        ("vim_tiny", {"align": "decay", "mirrored": True}, ["align", "mirrored"]),
        ("vim_tiny", {"mirrored": True, "mode": "merge"}, ["mirrored", "merge"]),
        ("lbvim_tiny", {"align": "decay"}, ["align", "window"]),
        ("vim_tiny_windowed", {"align": "decay"}, ["align", "window"]),
        ("plainmamba_l1", {"align": "decay"}, ["align", "PlainMambaMixer", "'snake'", "sequence"]),
        ("adventurer_tiny", {"align": "decay"}, ["align", "Mamba2Mixer", "sequence"]),
        ("localvim_tiny", {"align": "decay"}, ["align", "MambaMixer", "'h v_flip w7 w7_flip'", "sequence"]),
        ("vmamba_tiny_s1l8", {}, ["model", "VMamba", "0 plain backbones"]),
        ("resnet18", {}, ["model", "ResNet", "0 plain backbones"]),
    ],
)
def test_mistakes_get_one_clear_line(name: str, kwargs: dict, words: list[str]) -> None:
    plain = {"depth": 6} if name.startswith(("plainmamba", "adventurer", "localvim")) else {}
    own = SMALL if name.startswith(("vim", "lbvim")) else plain
    if name.endswith("_windowed"):
        name, own = name.removesuffix("_windowed"), {**own, "local_window": 4}
    if name.endswith("_shallow"):
        name, own = name.removesuffix("_shallow"), {**own, "depth": 2}
    with torch.device("meta"):
        model = timm.create_model(name, **own)
    with pytest.raises(ValueError, match=words[0]) as raised:
        backbones.reduce_tokens(model, **kwargs)
    assert all(word in str(raised.value) for word in words) and "\n" not in str(raised.value)


def test_a_classifier_of_openmmlab_takes_it_by_config() -> None:
    network = {"name": "vim_tiny", "token_reduction": {"schedule": {2: 0.5}}, **SMALL}
    model = ImageClassifier(network, {"type": "LabelSmoothingCrossEntropy"}).eval()
    assert model.network.forward_features(torch.randn(1, 3, 40, 40)).shape[1] == 14
