"""Dense backbones: the order of their maps, images of any shape, half precision, compilation, and the exact parts that
``frozen_stages`` freezes.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch.nn.modules.batchnorm import _BatchNorm

from backbones.commands.bench.measure import relative_error

pytest.importorskip("mmengine")

from mmengine.registry import MODELS

from backbones.layers import set_backend
from backbones.mm import DenseBackbone, PlainDenseBackbone, UserError
from backbones.models import FAMILIES
from tests.small_models import SMALLEST, is_plain, smallest_of
from tests.tolerances import AUTOCAST, SAME_FUNCTION

BACKBONES = {
    family.__name__: (arch, {**SMALLEST[arch], **({"depth": 4} if is_plain(arch) else {})})
    for family in FAMILIES
    for arch in [smallest_of(family)]
}


def build(family: str, **settings: Any) -> DenseBackbone:
    arch, args = BACKBONES[family]
    backbone = MODELS.build({"type": family, "arch": arch, "model_args": args, "out_indices": (0, 1, 2, 3), **settings})
    with torch.no_grad():  # norms that differ, so that a map under another's norm shows
        for name, parameter in backbone.out_norms.named_parameters():
            parameter.add_(0.1 * (1 + int(name.partition(".")[0])))
    return backbone.eval()


@pytest.mark.parametrize("family", BACKBONES)
@pytest.mark.parametrize("order", [(1, 0), [3, 0, 2, 1], np.array([2, 0])], ids=str)
def test_maps_come_in_the_order_asked(family: str, order: Sequence[int]) -> None:
    whole = build(family)
    some = build(family, out_indices=order)
    own = some.state_dict()
    some.load_state_dict({name: value for name, value in whole.state_dict().items() if name in own})
    image = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        expected, found = whole(image), some(image)
    assert len(found) == len(order)
    for i, x in zip(order, found, strict=True):
        torch.testing.assert_close(x, expected[i], rtol=0, atol=0)


def test_every_family_is_here() -> None:
    assert BACKBONES.keys() == {family.__name__ for family in FAMILIES}


@torch.no_grad()
@pytest.mark.parametrize("size", [(57, 83), (32, 160), (160, 32), (16, 80)])
@pytest.mark.parametrize("family", BACKBONES)
def test_images_of_any_shape(family: str, size: tuple[int, int]) -> None:
    """Maps one cell high or wide among them; their truth is plain PyTorch in double precision."""
    backbone, image = build(family), torch.randn(2, 3, *size)
    if size == (16, 80) and not is_plain(BACKBONES[family][0]):
        with pytest.raises(ValueError, match="x: got an image of 16 x 80 pixels, expected at least 32 x 32"):
            backbone(image)
        return
    exact = copy.deepcopy(backbone).double()
    set_backend(exact, "naive")
    for found, expected in zip(backbone(image), exact(image.double()), strict=True):
        assert found.isfinite().all()
        assert (found - expected).abs().max() <= 1e-5 * expected.abs().max()


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", BACKBONES)
def test_autocast(family: str, dtype: torch.dtype) -> None:
    backbone, image = build(family), torch.randn(2, 3, 64, 96)
    exact = backbone(image)
    with torch.autocast("cpu", dtype):
        maps = backbone(image)
    for found, expected in zip(maps, exact, strict=True):
        assert relative_error(found, expected) <= AUTOCAST[str(dtype).removeprefix("torch.")]


@torch.no_grad()
@pytest.mark.parametrize("family", [x if x == "Vim" else pytest.param(x, marks=pytest.mark.slow) for x in BACKBONES])
def test_compiles_whole(family: str) -> None:
    torch.compiler.reset()
    backbone, image = build(family), torch.randn(2, 3, 64, 96)
    compiled = torch.compile(backbone, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(image), backbone(image), strict=True):
        torch.testing.assert_close(found, expected, rtol=SAME_FUNCTION, atol=SAME_FUNCTION)


@pytest.mark.parametrize("family", ["Vim", "VMamba"])
@pytest.mark.parametrize("indices", [(0, 0), (1, -3), (-1,), (), (0.5,), 4, ("0",)], ids=str)
def test_other_indices_are_refused(family: str, indices: Any) -> None:
    with pytest.raises(UserError, match=r"out_indices: got .*, expected different numbers within 0..3"):
        build(family, out_indices=indices)


def frozen_parts(backbone: DenseBackbone, frozen: int) -> tuple[str, ...]:
    if frozen < 0:
        return ()
    if isinstance(backbone, PlainDenseBackbone):
        tokens = ("model.patch_embed", "model.pos_embed", "model.cls_token")
        return (*tokens, *(f"model.blocks.{i}" for i in range(frozen)))
    stages = (f"model.stages.{i}" for i in range(frozen))
    # A downsampling belongs to the stage that it leads to.
    return ("model.stem", *stages, *(f"model.downsamples.{i}" for i in range(frozen - 1)))


@pytest.mark.parametrize("frozen", range(-1, 5))
@pytest.mark.parametrize("family", BACKBONES)
def test_exactly_the_stem_and_the_stages_asked_are_frozen(family: str, frozen: int) -> None:
    backbone = build(family, frozen_stages=frozen)
    backbone.train()
    parts = frozen_parts(backbone, frozen)

    def within(name: str) -> bool:
        return any(f"{name}.".startswith(f"{part}.") for part in parts)

    names = [name for name, _ in backbone.named_parameters()]
    assert {name for name, p in backbone.named_parameters() if not p.requires_grad} == set(filter(within, names))
    modules = [name for name, _ in backbone.named_modules()]
    assert {name for name, m in backbone.named_modules() if not m.training} == set(filter(within, modules))
    backbone.train(False)
    assert not any(module.training for module in backbone.modules())


@pytest.mark.parametrize("family", ["EfficientVMamba", "GroupMamba"])
def test_norm_eval_keeps_batch_norms_and_nothing_else(family: str) -> None:
    backbone = build(family, norm_eval=True).train()
    kinds = {isinstance(module, _BatchNorm) for module in backbone.modules() if not module.training}
    assert kinds == {True}
    assert all(p.requires_grad for p in backbone.parameters())


@pytest.mark.parametrize("frozen", [-2, 5, 1.5])
@pytest.mark.parametrize("family", ["Vim", "VMamba"])
def test_other_numbers_of_stages_are_refused(family: str, frozen: Any) -> None:
    with pytest.raises(UserError, match=f"frozen_stages: got {frozen}, expected a number within -1..4"):
        build(family, frozen_stages=frozen)
