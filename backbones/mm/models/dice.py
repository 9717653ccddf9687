"""Dice losses of the papers on U-Nets, where mmseg's compute something else."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn


class _DiceLoss(nn.Module):
    def __init__(self, loss_weight: float = 1.0, loss_name: str = "loss_dice") -> None:
        super().__init__()
        self.loss_weight, self.loss_name = loss_weight, loss_name

    @staticmethod
    def _counted(target: Tensor, ignore_index: int | None) -> Tensor:
        return torch.ones_like(target, dtype=torch.bool) if ignore_index is None else target != ignore_index


@MODELS.register_module()
class BinaryDiceLoss(_DiceLoss):
    """1 - mean over images of (2 sum(p t) + 1) / (sum(p) + sum(t) + 1), p the sigmoid of one logit (VM-UNet, ISIC).

    mmseg's ``DiceLoss`` takes every pixel for foreground where there is one logit.

    Args:
        loss_weight: factor.
        loss_name: under which mmseg sums losses; it begins with "loss_".
    """

    def forward(
        self, pred: Tensor, target: Tensor, weight: Tensor | None = None, ignore_index: int | None = 255
    ) -> Tensor:
        """Loss of logits (b, 1, h, w) and labels 0 or 1 (b, h, w).

        Raises:
            ValueError: more than one logit, or weights of pixels, which the loss has none of.
        """
        if pred.shape[1] != 1 or weight is not None:
            raise ValueError(f"pred: got {pred.shape[1]} logits for each pixel, expected 1 and no weight")
        counted = self._counted(target, ignore_index)
        p = pred.squeeze(1).float().sigmoid() * counted
        t = (target * counted).float()
        overlap, sizes = (p * t).flatten(1).sum(1), (p + t).flatten(1).sum(1)
        return self.loss_weight * (1 - ((2 * overlap + 1) / (sizes + 1)).mean())


@MODELS.register_module()
class BatchDiceLoss(_DiceLoss):
    """1 - mean over classes of (2 sum(p t) + e) / (sum(p^2) + sum(t^2) + e), summed over the whole batch.

    p is the softmax, the background is a class, e is 1e-5 (VM-UNet and MSVM-UNet, Synapse). mmseg's ``DiceLoss`` sums
    each image's classes together.

    Args:
        loss_weight: factor.
        loss_name: under which mmseg sums losses; it begins with "loss_".
    """

    def forward(
        self, pred: Tensor, target: Tensor, weight: Tensor | None = None, ignore_index: int | None = 255
    ) -> Tensor:
        """Loss of logits (b, classes, h, w) and labels (b, h, w).

        Raises:
            ValueError: a single logit, or weights of pixels, which the loss has none of.
        """
        if pred.shape[1] < 2 or weight is not None:
            raise ValueError(f"pred: got {pred.shape[1]} logits for each pixel, expected two or more and no weight")
        counted = self._counted(target, ignore_index)
        p = pred.float().softmax(1) * counted.unsqueeze(1)
        t = F.one_hot(target.where(counted, 0), pred.shape[1]).movedim(-1, 1) * counted.unsqueeze(1)
        axes = (0, 2, 3)
        dice = (2 * (p * t).sum(axes) + 1e-5) / (p.square().sum(axes) + t.sum(axes) + 1e-5)
        return self.loss_weight * (1 - dice.mean())
