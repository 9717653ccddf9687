"""Binary masks for mmseg, as ISIC stores them."""

from __future__ import annotations

from typing import Any, ClassVar

import numpy as np
from mmseg.datasets import BaseSegDataset
from mmseg.datasets.transforms import LoadAnnotations
from mmseg.registry import DATASETS, TRANSFORMS


@DATASETS.register_module()
class ISICDataset(BaseSegDataset):
    """Skin lesions of ISIC 2017 and 2018: ``ISIC_0000000.jpg`` and ``ISIC_0000000_segmentation.png``, black and white.

    Its pipelines read masks with `LoadMask`. See mmseg's ``BaseSegDataset`` for the arguments.
    """

    METAINFO: ClassVar[dict[str, Any]] = {
        "classes": ("skin", "lesion"),
        "palette": [[0, 0, 0], [255, 255, 255]],
        "background": ("skin",),
    }

    def __init__(self, img_suffix: str = ".jpg", seg_map_suffix: str = "_segmentation.png", **kwargs: Any) -> None:
        super().__init__(img_suffix=img_suffix, seg_map_suffix=seg_map_suffix, **kwargs)


@TRANSFORMS.register_module()
class LoadMask(LoadAnnotations):
    """mmseg's ``LoadAnnotations`` of grey levels: 1 from the middle, 128, on, else 0."""

    def transform(self, results: dict[str, Any]) -> dict[str, Any]:
        """Reads ``seg_map_path`` into ``gt_seg_map`` (h, w)."""
        results = super().transform(results)
        results["gt_seg_map"] = (results["gt_seg_map"] >= 128).astype(np.uint8)
        return results
