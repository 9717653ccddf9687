"""The pyramid of plain backbones, beside mmseg's own, and the one with finer levels than its maps."""

from __future__ import annotations

from typing import Any

import pytest
import torch

pytest.importorskip("mmengine")

from mmengine.registry import MODELS, DefaultScope

import backbones.mm  # noqa: F401  (registers the neck)
from backbones.mm import UserError


def pyramid(**kwargs: Any) -> torch.nn.Module:
    return MODELS.build({"type": "SimpleFeaturePyramid", "in_channels": 32, "out_channels": 12, **kwargs})


@pytest.mark.parametrize("num_outs", [4, 5, 6])
@pytest.mark.parametrize("stride", [8, 16])
@pytest.mark.parametrize("height, width", [(4, 4), (5, 3), (1, 7), (1, 1)])
def test_strides(height: int, width: int, stride: int, num_outs: int) -> None:
    maps = pyramid(stride=stride, num_outs=num_outs)([torch.randn(2, 32, height, width)])
    expected = [(-(-height * stride // out), -(-width * stride // out)) for out in (4, 8, 16, 32, 64, 128)]
    assert [tuple(x.shape) for x in maps] == [(2, 12, *size) for size in expected[:num_outs]]


def test_parameters_of_vitdet() -> None:
    """Widths 1/4, 1/2, 1 and 1 of the backbone's before the 1 x 1 convolutions."""
    neck, d, c = pyramid(in_channels=192, out_channels=256, num_outs=5), 192, 256
    upsample = (4 * d * d // 2 + d // 2) + 2 * (d // 2) + (4 * (d // 2) * (d // 4) + d // 4)
    ends = (d // 4 + d // 2 + d + d) * c + 4 * (9 * c * c + 4 * c)
    assert sum(p.numel() for p in neck.parameters()) == upsample + (4 * d * d // 2 + d // 2) + ends


@pytest.mark.parametrize("scope", ["mmdet", "mmseg"])
def test_both_libraries_find_it(scope: str) -> None:
    pytest.importorskip(scope)
    with DefaultScope.overwrite_default_scope(scope):
        neck, backbone = pyramid(num_outs=5), MODELS.build({"type": "Vim", "arch": "vim_tiny", "out_indices": (0,)})
        mixed = MODELS.build({"type": "SimpleFeaturePyramid", "in_channels": 192})
    assert len(neck.levels) == 4
    with torch.no_grad():
        maps = mixed(backbone.eval()(torch.randn(1, 3, 70, 50)))
    assert [tuple(x.shape[2:]) for x in maps] == [(20, 16), (10, 8), (5, 4), (3, 2)]


def test_pyramid_of_mmseg() -> None:
    """One map for each level, as in the authors' segmentation models."""
    pytest.importorskip("mmseg")
    with DefaultScope.overwrite_default_scope("mmseg"):
        neck = MODELS.build({"type": "Feature2Pyramid", "embed_dim": 192, "norm_cfg": {"type": "BN"}})
        backbone = MODELS.build({"type": "Vim", "arch": "vim_tiny", "out_indices": (0, 1, 2, 3), "out_norm": False})
    with torch.no_grad():
        maps = neck.eval()(backbone.eval()(torch.randn(1, 3, 64, 96)))
    assert [tuple(x.shape[2:]) for x in maps] == [(16, 24), (8, 12), (4, 6), (2, 3)]


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"stride": 4}, "stride: got 4, expected 8 or 16"),
        ({"num_outs": 3}, "num_outs: got 3, expected at least the 4 levels"),
    ],
)
def test_bad_arguments(kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pyramid(**kwargs)


def test_several_maps_are_refused() -> None:
    with pytest.raises(UserError, match="takes one map, got 2"):
        pyramid()([torch.randn(1, 32, 2, 2)] * 2)


def finer(**kwargs: Any) -> torch.nn.Module:
    return MODELS.build({"type": "FinerFPN", "in_channels": [8, 16, 24], "out_channels": 12, **kwargs})


@pytest.mark.parametrize(("levels", "num_outs"), [(2, 5), (1, 5), (0, 3), (2, 6)])
def test_finer_levels(levels: int, num_outs: int) -> None:
    maps = [torch.randn(2, 8, 13, 18), torch.randn(2, 16, 7, 9), torch.randn(2, 24, 4, 5)]
    sizes = [(13 * 2**i, 18 * 2**i) for i in range(levels, 0, -1)] + [(13, 18), (7, 9), (4, 5), (2, 3), (1, 2)]
    found = finer(finer=levels, num_outs=num_outs)(maps)
    assert [tuple(x.shape) for x in found] == [(2, 12, *size) for size in sizes[:num_outs]]


def test_every_finer_level_sees_the_coarsest_map() -> None:
    neck = finer(finer=2, num_outs=5)
    maps = [torch.randn(1, c, n, n, requires_grad=True) for c, n in ((8, 4), (16, 2), (24, 1))]
    for level in neck(maps)[:3]:
        gradients = torch.autograd.grad(level.square().sum(), maps, retain_graph=True)
        assert all(x.abs().sum() > 0 for x in gradients)


def test_parameters_of_a_finer_pyramid() -> None:
    c = 256
    neck = finer(in_channels=[224, 320, 512], out_channels=c, finer=2)
    laterals = sum(2 * width + (width + 1) * c for width in (224, 320, 512))
    assert sum(p.numel() for p in neck.parameters()) == laterals + 2 * (4 * c * c + c) + 5 * (9 * c * c + c)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"finer": -1}, "finer: got -1, expected a number of levels"),
        ({"finer": 2, "num_outs": 4}, "num_outs: got 4, expected at least 2 finer levels and 3 maps"),
    ],
)
def test_bad_arguments_of_a_finer_pyramid(kwargs: dict[str, int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        finer(**kwargs)
    with pytest.raises(UserError, match="takes 3 maps, got 1"):
        finer()([torch.randn(1, 8, 2, 2)])
