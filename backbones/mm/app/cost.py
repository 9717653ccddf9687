"""Cost of a classifier, detector or segmentor for one image, part by part."""

from __future__ import annotations

from typing import Any, cast

import torch
from mmengine.config import Config
from torch import Tensor, nn

from backbones.analysis.flops import ModelCost, count_call, count_model
from backbones.mm.app.inference import build_model
from backbones.mm.errors import UserError

# The sizes at which authors count detectors, whose images have 1333 x 800 pixels at most.
_AS_COUNTED = {(1333, 800): (800, 1280)}


def count_config(config: Config, size: tuple[int, int] | None = None) -> ModelCost:
    """Counts the model of ``config`` for one image, without computing anything: only shapes go through it.

    Of a two-stage detector, the box heads see as many regions as the config's ``test_cfg`` proposes, and the mask heads
    as many as it finds at most; these are the most that an image can cost. Counted are backbone, neck and the heads
    that a prediction needs. Not counted are RoIAlign, non-maximum suppression, what turns outputs into boxes and masks,
    and heads for training alone.

    Args:
        config: of :func:`backbones.mm.app.cli.read_config`.
        size: height and width in pixels. By default that of the test pipeline, but 800 x 1280 where images have at most
            1333 x 800 pixels, which is what authors state.

    Raises:
        UserError: the config has no size, or its model takes no such image.
    """
    with torch.device("meta"):
        model = build_model(config)
    if hasattr(model, "network"):
        network = model.network
        size = size or getattr(network, "img_size", None) or network.pretrained_cfg["input_size"][1:]
        return count_model(network, cast(tuple[int, int], tuple(size)))
    size = size or _size_of_tests(config)
    parts = _Parts(model).to("meta").eval()
    try:
        return count_call(parts, size, torch.empty(1, 3, *size, device="meta"))
    except (AssertionError, RuntimeError) as error:  # how modules refuse a size
        raise UserError(f"{config.filename}: no image of {size[0]} x {size[1]} pixels: {error}") from error


def _size_of_tests(config: Config) -> tuple[int, int]:
    dataset = config.get("test_dataloader", {}).get("dataset", {})
    scales = [step["scale"] for step in dataset.get("pipeline", ()) if step["type"] == "Resize" and "scale" in step]
    if scales:
        return _AS_COUNTED.get(tuple(scales[0]), (scales[0][1], scales[0][0]))
    size = config.model.get("data_preprocessor", {}).get("size")
    if size is None:
        raise UserError(f"{config.filename}: the test pipeline resizes to no size; give one")
    return size[0], size[1]


class _Parts(nn.Module):
    """The counted parts of a detector or segmentor, each under its own name."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone = model.backbone
        self.neck = model.neck if model.with_neck else nn.Identity()
        self.dense = next(name for name in ("decode_head", "rpn_head", "bbox_head") if hasattr(model, name))
        setattr(self, self.dense, getattr(model, self.dense))
        self.regions: list[tuple[str, tuple[int, int, int, int]]] = []
        if hasattr(model, "roi_head"):
            found, proposed = model.test_cfg.rcnn.max_per_img, model.test_cfg.rpn.max_per_img
            for kind, number in (("bbox", proposed), *((("mask", found),) if model.roi_head.with_mask else ())):
                heads, channels, side = _heads(model.roi_head, kind)
                setattr(self, f"{kind}_heads", heads)
                self.regions.append((f"{kind}_heads", (number, channels, side, side)))

    def forward(self, image: Tensor) -> None:
        getattr(self, self.dense)(self.neck(self.backbone(image)))
        for name, shape in self.regions:
            for head in getattr(self, name):
                head(image.new_empty(shape))


def _heads(roi: Any, kind: str) -> tuple[nn.ModuleList, int, int]:
    """Box or mask heads, one for each stage of a cascade, and channels and side of the regions that they see."""
    head, extractors = getattr(roi, f"{kind}_head"), getattr(roi, f"{kind}_roi_extractor")
    extractor: Any = extractors[0] if isinstance(extractors, nn.ModuleList) else extractors
    side = extractor.roi_layers[0].output_size
    heads = head if isinstance(head, nn.ModuleList) else nn.ModuleList([head])
    return heads, extractor.out_channels, side[0] if isinstance(side, tuple) else side
