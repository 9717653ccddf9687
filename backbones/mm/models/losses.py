"""The loss for classes of unequal size."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from mmengine.registry import MODELS
from torch import Tensor, nn

from backbones.mm.errors import UserError


@MODELS.register_module()
class WeightedCrossEntropy(nn.Module):
    """Cross entropy in which the images of each class count with a weight, as in ``torch.nn.CrossEntropyLoss``.

    Args:
        class_weights: a weight for each class, in the order of their names; or "balanced" for weights inversely
            proportional to the numbers of training images, which are counted when training begins.
        smoothing: share of the label that is spread over all classes.

    Raises:
        UserError: other weights than these; in training, weights for another number of classes.
    """

    weight: Tensor | None

    def __init__(self, class_weights: Sequence[float] | str = "balanced", smoothing: float = 0.0) -> None:
        super().__init__()
        self.balanced, self.smoothing = class_weights == "balanced", smoothing
        given: Tensor | None = None
        if not self.balanced:
            numbers = [] if isinstance(class_weights, str) else list(class_weights)
            if not numbers or min(numbers) < 0:
                raise UserError(f"class_weights: got {class_weights!r}, expected 'balanced' or a number for each class")
            given = torch.tensor(numbers, dtype=torch.float32)
        # The config and the training images tell the weights, so checkpoints do not.
        self.register_buffer("weight", given, persistent=False)

    def count(self, counts: Tensor) -> None:
        """Takes the numbers of training images of each class.

        Raises:
            UserError: there is no image of a class, or ``class_weights`` are of another number of classes.
        """
        if not self.balanced:
            assert self.weight is not None
            if len(self.weight) != len(counts):
                raise UserError(
                    f"class_weights: got {len(self.weight)} numbers, the training data {len(counts)} classes"
                )
            return
        if not counts.all():
            empty = int((counts == 0).nonzero()[0])
            raise UserError(f"class_weights: 'balanced' needs images of every class, class {empty} has none")
        self.weight = counts.sum() / (len(counts) * counts.float())

    def forward(self, logits: Tensor, targets: Tensor) -> Tensor:
        """Logits (b, k) and labels (b,) or soft labels (b, k) to the mean loss."""
        if self.weight is None:
            raise UserError("class_weights: 'balanced' counts the training images when the Runner's training begins")
        return F.cross_entropy(logits, targets, self.weight.to(logits), label_smoothing=self.smoothing)
