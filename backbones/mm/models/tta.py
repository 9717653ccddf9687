"""Test-time augmentation: what a model says about several views of an image, merged into one prediction."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.registry import MODELS
from mmengine.structures import InstanceData, PixelData
from torch import Tensor


@MODELS.register_module()
class ClassifierTTA(BaseTTAModel):
    """Means the probabilities that an ``ImageClassifier`` gives to the views of an image."""

    def merge_preds(self, data_samples_list: Sequence[Sequence[dict[str, Tensor]]]) -> list[dict[str, Tensor]]:
        """One dict per image, as the classifier's own, from one per view of each."""
        return [
            {**views[0], "scores": torch.stack([view["scores"] for view in views]).mean(0)}
            for views in data_samples_list
        ]


@MODELS.register_module()
class SegmentorTTA(BaseTTAModel):
    """Means the probabilities that a segmentor of mmseg gives to each pixel.

    mmseg's own ``SegTTAModel`` takes the sigmoid of a binary segmentor's probabilities for a second time, which lifts
    all of them above one half.
    """

    def merge_preds(self, data_samples_list: Sequence[Sequence[Any]]) -> list[Any]:
        """One ``SegDataSample`` per image, with what the first view's has beside."""
        merged = []
        for views in data_samples_list:
            # mmseg has brought all views back to the image's size, and made probabilities of a single channel.
            maps = [view.seg_logits.data for view in views]
            scores = torch.stack([x.softmax(0) if len(x) > 1 else x for x in maps]).mean(0)
            model: Any = self.module.module if is_model_wrapper(self.module) else self.module
            labels = scores.argmax(0, keepdim=True) if len(scores) > 1 else scores > model.decode_head.threshold
            sample = views[0]
            sample.set_data({"seg_logits": PixelData(data=scores), "pred_sem_seg": PixelData(data=labels.long())})
            merged.append(sample)
        return merged


@MODELS.register_module()
class DetectorTTA(BaseTTAModel):
    """Joins the boxes that a detector of mmdet finds in the views, by non-maximum suppression.

    A box keeps the mask of the view that it is from. mmdet's own ``DetTTAModel`` refuses models with masks.

    Args:
        nms: settings of mmcv's ``batched_nms``.
        max_per_img: how many boxes are kept.
        **kwargs: ``module`` and ``data_preprocessor`` of mmengine's ``BaseTTAModel``.
    """

    def __init__(self, nms: dict[str, Any], max_per_img: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.nms, self.max_per_img = dict(nms), max_per_img

    def merge_preds(self, data_samples_list: Sequence[Sequence[Any]]) -> list[Any]:
        """One ``DetDataSample`` per image, with what the first view's has beside."""
        from mmcv.ops import batched_nms

        merged = []
        for views in data_samples_list:
            found = InstanceData.cat([_unflipped(view) for view in views])
            if len(found):
                boxes, kept = batched_nms(found.bboxes, found.scores, found.labels, self.nms)
                found = found[kept]
                found.bboxes, found.scores = boxes[:, :4], boxes[:, 4]
                found = found[: self.max_per_img]
            sample = views[0]
            sample.pred_instances = found
            merged.append(sample)
        return merged


def _unflipped(view: Any) -> InstanceData:
    """What was found in a view, where it is in the image; mmdet has brought it back to the image's size."""
    found, (height, width) = view.pred_instances, view.ori_shape
    for direction in [view.flip_direction] if view.flip else []:
        axis, extent = {"horizontal": (0, width), "vertical": (1, height)}[direction]
        boxes = found.bboxes.clone()
        boxes[:, axis], boxes[:, axis + 2] = extent - found.bboxes[:, axis + 2], extent - found.bboxes[:, axis]
        found.bboxes = boxes
        if "masks" in found:
            found.masks = found.masks.flip(-1 - axis)
    return found
