"""Tokens that are left of a grid: orders that skip the others, and mixers along them, against loops over tokens."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F

from backbones.layers import MambaMixer, Scan
from backbones.layers.path_ssm import PathSSM
from backbones.ops import selective_scan
from backbones.patterns import BIDIRECTIONAL, HILBERT, MULTI_SCALE, SNAKE, directions
from backbones.patterns.subset import Subset, in_step_order, in_token_order
from backbones.patterns.walks import DOWN, LEFT, RIGHT, START, UP, subset_codes, walks

WINDOWS = directions("h", "v_flip", "w2", "w7_flip")
CELLS = torch.tensor([[0, 3, 4, 8, 13], [1, 2, 7, 11, 14]])  # of 3 x 5
# Every plain family, small; Vim also with orders of a grid.
MODELS: dict[str, dict[str, Any]] = {
    "vim": {"model_name": "vim_tiny", "embed_dim": 16},
    "lbvim": {"model_name": "lbvim_tiny", "embed_dim": 16},
    "localvim": {"model_name": "localvim_tiny", "embed_dim": 16},
    "localvim_midcls": {"model_name": "localvim_tiny_midcls", "embed_dim": 16},
    "plainmamba": {"model_name": "plainmamba_l1", "embed_dim": 16},
    "adventurer": {"model_name": "adventurer_tiny", "embed_dim": 32, "flip_layers": (1,)},
}


def small(family: str, **kwargs: Any) -> Any:
    own = {"depth": 2, "patch_size": 8, "img_size": (24, 40), "num_classes": 3, "d_state": 4}
    return timm.create_model(**(MODELS[family] | own | kwargs)).double().eval()


@pytest.mark.parametrize("class_index", [None, 0, 2, 5])
@pytest.mark.parametrize("pattern", [BIDIRECTIONAL, SNAKE, HILBERT, WINDOWS], ids=lambda x: x.name)
def test_orders_skip_missing_tokens(pattern: Any, class_index: int | None) -> None:
    orders, steps = Subset((3, 5), CELLS, class_index).orders(pattern)
    whole = pattern.orders(3, 5).tolist()
    for image, left in enumerate(CELLS.tolist()):
        tokens = left if class_index is None else [*left[:class_index], "class", *left[class_index:]]
        for k, order in enumerate(whole):
            way: list[Any] = [cell for cell in order if cell in left]
            if class_index is not None:
                way.insert(2, "class")
            assert orders[image, k].tolist() == [tokens.index(cell) for cell in way]
            assert orders[image, k][steps[image, k]].tolist() == list(range(len(tokens)))


def test_orders_that_leave_cells_out_are_refused() -> None:
    with pytest.raises(ValueError, match="pattern: 'multi_scale' does not visit each cell of a 3 x 5 grid once"):
        Subset((3, 5), CELLS).orders(MULTI_SCALE)


def test_tokens_change_places_and_back() -> None:
    x = torch.randn(2, 5, 3)
    orders, steps = Subset((3, 5), CELLS).orders(SNAKE)
    along = in_step_order(x, orders)
    for image in range(2):
        for k in range(4):
            assert torch.equal(along[image, :, k], x[image, orders[image, k]])
    assert torch.equal(in_token_order(along, steps), x.unsqueeze(2).expand(-1, -1, 4, -1))


def test_cells_that_are_left_on_the_map() -> None:
    subset, x = Subset((3, 5), CELLS), torch.randn(2, 5, 4)
    placed = subset.placed(x)
    assert placed.shape == (2, 3, 5, 4) and (placed != 0).any(-1).sum() == 10
    assert torch.equal(placed[1, 2, 4], x[1, 4]) and torch.equal(subset.taken(placed), x)


def test_directions_lead_from_one_token_that_is_left_to_the_next() -> None:
    subset = Subset((3, 5), CELLS)
    orders, _ = subset.orders(SNAKE)
    codes = subset_codes(subset, orders)
    # 0 -> 3 -> 4 -> 8 (a row below) -> 13 (again), and back.
    assert codes[0, 0].tolist() == [START, RIGHT, RIGHT, DOWN, DOWN]
    assert codes[0, 1].tolist() == [START, UP, UP, LEFT, LEFT]
    whole = Subset((3, 5), torch.arange(15).expand(2, -1))
    orders, _ = whole.orders(SNAKE)
    _, steps, expected = walks(SNAKE, 3, 5, torch.device("cpu"))
    found = subset_codes(whole, orders)[0].gather(1, steps.view(15, 4).t())
    assert torch.equal(found, expected.view(15, 4).t())


@pytest.mark.parametrize("window", [0, 3])
def test_paths_over_what_is_left_are_those_of_loops(window: int) -> None:
    ssm, subset = PathSSM(6, 4, 2, 4, dtype=torch.float64), Subset((3, 5), CELLS)
    u = torch.randn(2, 5, 6, dtype=torch.float64)
    found = ssm(u, (1, 5), Scan(SNAKE, window), subset)
    orders, _ = subset.orders(SNAKE)
    codes = subset_codes(subset, orders)
    delta, B, C = (u @ ssm.x_proj_weight[0].T).split([2, 4, 4], -1)
    expected = torch.zeros_like(u)
    for image in range(2):
        for k in range(4):
            here = slice(image, image + 1)
            y = selective_scan(
                u[here, orders[image, k]], (delta[here] @ ssm.dt_proj_weight[0].T).unsqueeze(2), ssm.A,
                (B[here] + ssm.direction_B[codes[image, k]]).unsqueeze(2), C[here].unsqueeze(2), ssm.D,
                delta_bias=ssm.dt_proj_bias, local_window=window, backend="naive",
            )  # fmt: skip
            expected[image, orders[image, k]] += y[0]
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("class_index", [None, 2])
def test_the_mixer_along_what_is_left_is_that_of_loops(class_index: int | None) -> None:
    mixer = MambaMixer(6, Scan(WINDOWS), d_state=4, dtype=torch.float64)
    subset, tokens = Subset((3, 5), CELLS, class_index), 5 + (class_index is not None)
    x = torch.randn(2, tokens, 6, dtype=torch.float64)
    merged, gated = mixer(x, (1, 5), per_order=True, subset=subset)
    orders, _ = subset.orders(WINDOWS)
    inner, z = mixer.in_proj(x).chunk(2, -1)
    expected = torch.zeros_like(gated)
    for image in range(2):
        for k in range(4):
            order = orders[image, k]
            row = F.pad(inner[image, order].T, (3, 0))[None]
            u = F.silu(F.conv1d(row, mixer.conv_weight[k].unsqueeze(1), mixer.conv_bias[k], groups=12))[0].T
            ssm = mixer.ssm
            delta, B, C = (u @ ssm.x_proj_weight[k].T).split([ssm.dt_rank, 4, 4], -1)
            y = selective_scan(
                u[None], (delta @ ssm.dt_proj_weight[k].T)[None, :, None], ssm.A[k : k + 1], B[None, :, None],
                C[None, :, None], ssm.D[k : k + 1], delta_bias=ssm.dt_proj_bias[k : k + 1], backend="naive",
            )  # fmt: skip
            expected[image, order, k] = y[0] * F.silu(z[image, order])
    torch.testing.assert_close(gated, expected)
    torch.testing.assert_close(merged, mixer.out_proj(expected.mean(2)))
    torch.testing.assert_close(mixer(x, (1, 5), subset=subset), merged)


@torch.no_grad()
@pytest.mark.parametrize(
    "family, kwargs",
    [
        *((family, {}) for family in MODELS),
        ("vim", {"pattern": directions("v", "v_flip")}),
        ("vim", {"rope": True}),
        ("adventurer", {"pattern": directions("v")}),
        ("plainmamba", {"local_window": 3}),
    ],
)
def test_all_patches_are_the_whole_image(family: str, kwargs: dict) -> None:
    # Windows of 2 and 7 divide the sides of this grid, so no slot pads it.
    size = (112, 112) if family.startswith("localvim") else (24, 40)
    model = small(family, img_size=size, **kwargs)
    x = torch.randn(2, 3, *size, dtype=torch.float64)
    cells = torch.arange(size[0] * size[1] // 64).expand(2, -1)
    (expected,) = model.forward_intermediates(x, 1, norm=True, output_fmt="NLC", intermediates_only=True)
    torch.testing.assert_close(model.forward_visible(x, cells), expected)


@pytest.mark.parametrize("family", MODELS)
def test_visible_patches_do_not_know_the_others(family: str) -> None:
    model = small(family)
    x = torch.randn(2, 3, 24, 40, dtype=torch.float64)
    seen = torch.zeros(2, 15, dtype=torch.float64).scatter(1, CELLS, 1).view(2, 1, 3, 1, 5, 1)
    visible = (x.unflatten(2, (3, 8)).unflatten(4, (5, 8)) * seen).flatten(4, 5).flatten(2, 3)
    found = model.forward_visible(visible, CELLS)
    assert found.shape == (2, 5, model.embed_dim)
    if family != "plainmamba":  # whose stem reaches over patches
        torch.testing.assert_close(model.forward_visible(x, CELLS), found)
    swapped = model.forward_visible(visible.flip(0), CELLS.flip(0))
    torch.testing.assert_close(swapped.flip(0), found)
    found.square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for name, p in model.named_parameters() if not name.startswith("head"))


def test_mistakes_of_visible_patches_are_named() -> None:
    model, x = small("vim"), torch.randn(2, 3, 24, 40, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"cells: got shape \(1, 15\), expected \(2, m\)"):
        model.forward_visible(x, torch.arange(15)[None])
    reduced = small("vim", token_reduction={"schedule": {1: 0.5}})
    with pytest.raises(ValueError, match="token_reduction: got a model with it"):
        reduced.forward_visible(x, CELLS)
