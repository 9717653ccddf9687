"""The pyramid of plain backbones, beside mmseg's own."""

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
