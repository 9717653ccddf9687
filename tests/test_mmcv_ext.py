"""torchvision's operators in place of mmcv's: equal to the compiled ones, and to values known without them."""

from __future__ import annotations

import importlib
import subprocess
import sys
from collections.abc import Iterator
from importlib.machinery import PathFinder
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("mmcv")

import mmcv

from backbones.mm import mmcv_ext

importlib.import_module("mmcv.ops")  # which needs what backbones.mm puts in place
COMPILED = PathFinder.find_spec("mmcv._ext", mmcv.__path__) is not None
needs_compiled = pytest.mark.skipif(not COMPILED, reason="mmcv was installed without its compiled operators")


def devices() -> list[str]:
    return ["cpu", *(["cuda"] if torch.cuda.is_available() else [])]


@pytest.fixture(params=devices())
def device(request: pytest.FixtureRequest) -> str:
    """Every device of this machine; mmcv's own operators may have been compiled for the CPU alone."""
    if request.param == "cuda" and COMPILED and mmcv.ops.get_compiling_cuda_version() == "not available":
        pytest.skip("mmcv was compiled without CUDA")
    return request.param


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[pytest.MonkeyPatch]:
    """A context in which ``mmcv.ops`` calls torchvision's operators, compiled ones or not."""
    ours = SimpleNamespace(**mmcv_ext.OPERATORS)
    with monkeypatch.context() as patch:
        for name in ("nms", "roi_align", "focal_loss"):
            patch.setattr(sys.modules[f"mmcv.ops.{name}"], "ext_module", ours)
        yield patch


def boxes_and_scores(count: int, device: str, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    corners = 60 * torch.rand(count, 2, dtype=dtype, device=device)
    sizes = 40 * torch.rand(count, 2, dtype=dtype, device=device)
    return torch.cat((corners, corners + sizes), dim=1), torch.rand(count, dtype=dtype, device=device)


def regions(count: int, batch: int, size: tuple[int, int], device: str, dtype: torch.dtype) -> Tensor:
    """Regions (count, 5) in pixels of an image four times the map; some reach beyond it."""
    scale = 4.0 * torch.tensor([size[1], size[0]], dtype=dtype, device=device)
    first = (1.2 * torch.rand(count, 2, dtype=dtype, device=device) - 0.2) * scale
    last = first + torch.rand(count, 2, dtype=dtype, device=device) * scale
    return torch.cat((torch.arange(count, device=device)[:, None] % batch, first, last), dim=1)


def pooled(size: tuple[int, int], count: int, dtype: torch.dtype, device: str, **options: Any) -> list[Tensor]:
    """A map's regions through ``mmcv.ops.RoIAlign`` and the gradient of the map, of the seeded generator's numbers."""
    torch.manual_seed(1)
    image = torch.randn(2, 3, *size, dtype=dtype, device=device, requires_grad=True)
    layer = mmcv.ops.RoIAlign(spatial_scale=0.25, **options)
    y = layer(image, regions(count, 2, size, device, dtype))
    return [y.detach(), torch.autograd.grad(y, image, torch.randn_like(y))[0]]


@needs_compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("size, output_size, count", [((16, 23), 7, 9), ((5, 1), (3, 2), 4), ((8, 8), 14, 0)])
def test_regions_and_gradients_are_those_of_mmcv(
    request: pytest.FixtureRequest, device: str, size: tuple[int, int], output_size: Any, count: int,
    sampling_ratio: int, aligned: bool, dtype: torch.dtype,
) -> None:  # fmt: skip
    options = {"output_size": output_size, "sampling_ratio": sampling_ratio, "aligned": aligned}
    theirs = pooled(size, count, dtype, device, **options)
    request.getfixturevalue("stand_in")
    ours = pooled(size, count, dtype, device, **options)
    # Averages and sums of at most some hundred numbers of order 1, in another order.
    tolerance = {torch.float32: 2e-5, torch.float64: 1e-13}[dtype]
    for found, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=tolerance)


@needs_compiled
@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("threshold", [0.3, 0.7])
@pytest.mark.parametrize("count", [0, 1, 41, 500])
def test_kept_boxes_are_those_of_mmcv(
    request: pytest.FixtureRequest, device: str, count: int, threshold: float, offset: int
) -> None:
    boxes, scores = boxes_and_scores(count, device)
    limits = {"score_threshold": 0.1, "max_num": 30}
    theirs = [mmcv.ops.nms(boxes, scores, threshold, offset, **more) for more in ({}, limits)]
    request.getfixturevalue("stand_in")
    ours = [mmcv.ops.nms(boxes, scores, threshold, offset, **more) for more in ({}, limits)]
    for found, expected in zip(ours, theirs, strict=True):
        assert torch.equal(found[1], expected[1])
        assert torch.equal(found[0], expected[0])


@needs_compiled
@pytest.mark.parametrize("split_thr", [10000, 100])
@pytest.mark.parametrize("count", [0, 300])
def test_boxes_kept_by_class_are_those_of_mmcv(
    request: pytest.FixtureRequest, device: str, count: int, split_thr: int
) -> None:
    boxes, scores = boxes_and_scores(max(count, 1), device)
    boxes, scores = boxes[:count], scores[:count]
    if not count:
        return
    classes = torch.arange(count, device=device) % 3
    config = {"type": "nms", "iou_threshold": 0.5, "split_thr": split_thr, "max_num": 50}
    theirs = mmcv.ops.batched_nms(boxes, scores, classes, config)
    request.getfixturevalue("stand_in")
    ours = mmcv.ops.batched_nms(boxes, scores, classes, config)
    assert all(map(torch.equal, ours, theirs))


def test_regions_of_a_ramp(stand_in: pytest.MonkeyPatch) -> None:
    """Every bin of a map that rises from column to column holds its centre's column."""
    image = torch.arange(12.0).expand(1, 1, 10, 12)
    box = torch.tensor([[0.0, 2.0, 1.0, 8.0, 9.0]])
    y = mmcv.ops.RoIAlign(output_size=(2, 3), spatial_scale=1.0)(image, box)
    torch.testing.assert_close(y, torch.tensor([2.5, 4.5, 6.5]).expand(1, 1, 2, 3))
    with pytest.raises(NotImplementedError, match="no pool_mode='max'"):
        mmcv.ops.RoIAlign(output_size=2, pool_mode="max")(image, box)


def test_boxes_of_pixels_overlap_more(stand_in: pytest.MonkeyPatch) -> None:
    boxes = torch.tensor([[0.0, 0, 9, 9], [0, 0, 9, 4], [20, 20, 25, 25]])
    scores = torch.tensor([0.3, 0.9, 0.5])
    # Their overlap is 36 of 81, and of pixels 50 of 100.
    assert mmcv.ops.nms(boxes, scores, 0.47, offset=0)[1].tolist() == [1, 2, 0]
    assert mmcv.ops.nms(boxes, scores, 0.47, offset=1)[1].tolist() == [1, 2]


@pytest.mark.parametrize("count", [0, 13])
@pytest.mark.parametrize("gamma, alpha", [(2.0, 0.25), (1.5, 0.6)])
def test_focal_loss_is_that_of_its_formula(
    stand_in: pytest.MonkeyPatch, device: str, count: int, gamma: float, alpha: float
) -> None:
    logits = (3 * torch.randn(count, 5, device=device)).requires_grad_()
    targets = torch.arange(count, device=device) % 6  # the last is background
    losses = mmcv.ops.sigmoid_focal_loss(logits, targets, gamma, alpha, None, "none")
    exact = logits.detach().double().requires_grad_()
    p, wanted = exact.sigmoid(), targets[:, None] == torch.arange(5, device=device)
    expected = torch.where(wanted, -alpha * (1 - p) ** gamma * p.log(), -(1 - alpha) * p**gamma * (1 - p).log())
    torch.testing.assert_close(losses, expected.float(), rtol=1e-5, atol=1e-6)
    found, right = (torch.autograd.grad(y.sum(), x)[0] for y, x in ((losses, logits), (expected, exact)))
    torch.testing.assert_close(found, right.float(), rtol=1e-5, atol=1e-6)
    with pytest.raises(NotImplementedError, match="no class weights"):
        mmcv.ops.sigmoid_focal_loss(logits, targets, gamma, alpha, torch.ones(5, device=device), "none")


def test_compiled_operators_come_first() -> None:
    mmcv_ext.install()  # a second time
    assert sum(isinstance(finder, mmcv_ext.Finder) for finder in sys.meta_path) == 1
    assert mmcv_ext.stands_in() is not COMPILED


HIDDEN = """
import sys
import backbones.mm
from backbones.mm import mmcv_ext

assert "mmcv" not in sys.modules
sys.meta_path.insert(0, mmcv_ext.Finder())  # before the finder of files, which may find a compiled one
import mmdet.models, mmseg.models
import torch
from mmcv.ops import DeformConv2d, batched_nms
from mmcv.utils import collect_env

assert mmcv_ext.stands_in()
assert "torchvision" in collect_env()["MMCV Compiler"]
boxes = torch.tensor([[0.0, 0, 9, 9], [1, 1, 9, 9]])
kept = batched_nms(boxes, torch.tensor([0.2, 0.4]), torch.tensor([0, 0]), dict(type="nms", iou_threshold=0.5))[1]
assert kept.tolist() == [1]
try:
    DeformConv2d(2, 2, 1)(torch.ones(1, 2, 4, 4), torch.zeros(1, 2, 4, 4))
except NotImplementedError as error:
    print(error)
"""


def test_mmcv_without_compiled_operators() -> None:
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", HIDDEN], capture_output=True, text=True, check=True)
    assert "deform_conv_forward is not among those that come from torchvision (nms, roi_align_forward" in done.stdout
    assert mmcv_ext.COMPILE in done.stdout
