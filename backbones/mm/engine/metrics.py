"""Top-k accuracy and the confusion matrix."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.evaluator import BaseMetric
from mmengine.registry import METRICS
from torch import Tensor


@METRICS.register_module()
class ClassificationMetric(BaseMetric):
    """Top-k accuracy in per cent; keeps the confusion matrix of the last evaluation.

    Args:
        topk: the values of k; those above the number of classes are left out.
        collect_device: where results of several processes meet, ``"cpu"`` or ``"gpu"``.

    Attributes:
        confusion_matrix: (num_classes, num_classes) int64, rows are true classes, columns predicted ones.

    Raises:
        ValueError: no k within the number of classes, a data set with another number of classes, or
            scores that are not finite.
    """

    default_prefix = "accuracy"

    def __init__(self, topk: Sequence[int] = (1, 5), collect_device: str = "cpu") -> None:
        super().__init__(collect_device=collect_device)
        self.topk = tuple(topk)
        self.num_classes = 0
        self.confusion_matrix: Tensor | None = None

    def process(self, data_batch: Any, data_samples: Sequence[dict[str, Tensor]]) -> None:
        """Keep the best classes and the label of every image; results are small enough to gather."""
        scores = torch.stack([sample["scores"] for sample in data_samples])
        self.num_classes = scores.shape[1]
        if min(self.topk) > self.num_classes:
            raise ValueError(f"topk is {self.topk}, but there are {self.num_classes} classes")
        if not scores.isfinite().all():
            raise ValueError("the model's scores are not finite")
        best = scores.topk(max(k for k in self.topk if k <= self.num_classes), dim=1).indices.tolist()
        self.results += [(row, int(sample["target"])) for row, sample in zip(best, data_samples, strict=True)]

    def compute_metrics(self, results: list[tuple[list[int], int]]) -> dict[str, float]:
        classes = (self.dataset_meta or {}).get("classes")
        if classes is not None and len(classes) != self.num_classes:
            raise ValueError(f"the model has {self.num_classes} classes, the data set {len(classes)}")
        best = torch.tensor([row for row, _ in results])
        targets = torch.tensor([target for _, target in results])
        pairs = targets * self.num_classes + best[:, 0]
        counts = torch.bincount(pairs, minlength=self.num_classes**2)
        self.confusion_matrix = counts.view(self.num_classes, self.num_classes)
        hits = best == targets[:, None]
        within = [k for k in self.topk if k <= self.num_classes]
        return {f"top{k}": 100 * hits[:, :k].any(dim=1).double().mean().item() for k in within}
