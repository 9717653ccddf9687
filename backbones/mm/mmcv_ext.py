"""torchvision's operators in place of mmcv's compiled ones, where mmcv was installed without them.

mmcv compiles its extension ``mmcv._ext`` at installation, which takes minutes and a compiler; without it nothing of
``mmcv.ops`` can be imported. Importing :mod:`backbones.mm` lets a missing ``mmcv._ext`` be found here. The operators
that the heads of this library's configs call give the same numbers as mmcv's; every other one raises when it is called.
A compiled extension that is there is always used.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any, NoReturn

import torch
import torchvision
from torch import Tensor

NAME = "mmcv._ext"
# pip keeps wheels that it built, also those without operators.
COMPILE = (
    "pip install --force-reinstall --no-deps --no-cache-dir --no-build-isolation --no-binary onedl-mmcv onedl-mmcv"
)
_logger = logging.getLogger(__name__)


def nms(boxes: Tensor, scores: Tensor, iou_threshold: float, offset: int) -> Tensor:
    """Indices of the boxes (n, 4) that are kept, by falling score; see ``mmcv.ops.nms``."""
    if offset:  # a box of pixels: its last row and column belong to it
        boxes = torch.cat((boxes[:, :2], boxes[:, 2:] + offset), dim=1)
    return torchvision.ops.nms(boxes, scores, iou_threshold)


def roi_align_forward(
    input: Tensor,
    rois: Tensor,
    output: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Writes regions (n, 5) of ``input`` (b, c, h, w) to ``output`` (n, c, h', w'); see ``mmcv.ops.RoIAlign``."""
    _require_average(pool_mode)
    size = (aligned_height, aligned_width)
    output.copy_(torchvision.ops.roi_align(input, rois, size, spatial_scale, sampling_ratio, aligned))


def roi_align_backward(
    grad_output: Tensor,
    rois: Tensor,
    argmax_y: Tensor,
    argmax_x: Tensor,
    grad_input: Tensor,
    aligned_height: int,
    aligned_width: int,
    spatial_scale: float,
    sampling_ratio: int,
    pool_mode: int,
    aligned: bool,
) -> None:
    """Writes the gradient of `roi_align_forward`'s input to ``grad_input``."""
    _require_average(pool_mode)
    size = (aligned_height, aligned_width)
    with torch.enable_grad():  # the regions are computed again: torchvision's own backward is private
        image = grad_input.detach().requires_grad_()
        regions = torchvision.ops.roi_align(image, rois, size, spatial_scale, sampling_ratio, aligned)
    grad_input.copy_(torch.autograd.grad(regions, image, grad_output)[0])


def _require_average(pool_mode: int) -> None:
    if pool_mode != 1:
        raise NotImplementedError(f"roi_align: torchvision has no pool_mode='max'; for mmcv's own: {COMPILE}")


def sigmoid_focal_loss_forward(
    input: Tensor, target: Tensor, weight: Tensor, output: Tensor, gamma: float, alpha: float
) -> None:
    """Writes each loss of logits (n, classes) to ``output``; targets (n,) beyond the classes are background."""
    output.copy_(_focal_loss(input, target, weight, gamma, alpha))


def sigmoid_focal_loss_backward(
    input: Tensor, target: Tensor, weight: Tensor, grad_input: Tensor, gamma: float, alpha: float
) -> None:
    """Writes the gradient of the losses' sum to ``grad_input``."""
    with torch.enable_grad():
        logits = input.detach().requires_grad_()
        total = _focal_loss(logits, target, weight, gamma, alpha).sum()
    grad_input.copy_(torch.autograd.grad(total, logits)[0])


def _focal_loss(input: Tensor, target: Tensor, weight: Tensor, gamma: float, alpha: float) -> Tensor:
    if weight.numel():
        raise NotImplementedError(f"sigmoid_focal_loss: torchvision has no class weights; for mmcv's own: {COMPILE}")
    wanted = (target[:, None] == torch.arange(input.shape[1], device=input.device)).to(input.dtype)
    return torchvision.ops.sigmoid_focal_loss(input, wanted, alpha=alpha, gamma=gamma)


def _not_compiled() -> str:
    return "not compiled, torchvision's operators"


OPERATORS: dict[str, Callable[..., Any]] = {
    operator.__name__: operator
    for operator in (
        nms,
        roi_align_forward,
        roi_align_backward,
        sigmoid_focal_loss_forward,
        sigmoid_focal_loss_backward,
    )
}
SUMMARY = "mmcv has no compiled operators: nms, roi_align and sigmoid_focal_loss come from torchvision"


class _Loader(Loader):
    def exec_module(self, module: ModuleType) -> None:
        def absent(name: str) -> Callable[..., NoReturn]:
            if name.startswith("__"):  # what Python itself asks modules for
                raise AttributeError(f"module {NAME!r} has no attribute {name!r}")

            def operator(*args: Any, **kwargs: Any) -> NoReturn:
                raise NotImplementedError(
                    f"mmcv was installed without its compiled operators, and {name} is not among those that come from "
                    f"torchvision ({', '.join(OPERATORS)}); to compile mmcv's (docs/training.md): {COMPILE}"
                )

            return operator

        # mmcv.ops asks for all of its operators when it is imported.
        vars(module).update(
            OPERATORS, get_compiler_version=_not_compiled, get_compiling_cuda_version=_not_compiled, __getattr__=absent
        )
        _logger.info(SUMMARY)


class Finder(MetaPathFinder):
    """Finds ``mmcv._ext`` where nothing else does."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The stand-in, for that name alone."""
        return ModuleSpec(NAME, _Loader(), origin="torchvision") if fullname == NAME else None


def install() -> None:
    """Let ``mmcv._ext`` be found here wherever it has not been compiled."""
    if not any(isinstance(finder, Finder) for finder in sys.meta_path):
        sys.meta_path.append(Finder())


def stands_in() -> bool:
    """Whether ``mmcv.ops`` has been imported and runs on torchvision's operators."""
    spec = getattr(sys.modules.get(NAME), "__spec__", None)
    return spec is not None and isinstance(spec.loader, _Loader)
