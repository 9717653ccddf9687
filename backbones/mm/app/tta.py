"""Tests on several views of each image: a config's ``tta_model`` and ``tta_pipeline``, or what fits its test data."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

from mmengine.config import Config
from mmengine.registry import init_default_scope
from timm.data import DEFAULT_CROP_PCT

from backbones.mm.app.inference import loads_annotations, task_of
from backbones.mm.errors import UserError

# As mmdet's and mmseg's own configs; the "multi-scale and flip" of papers on segmentation is the latter.
SCALES = {"detection": (1.0, 0.5, 1.5), "segmentation": (0.5, 0.75, 1.0, 1.25, 1.5, 1.75)}
_ZOOM = 1.125  # of a classifier, beside its own scale and the whole image


def use_tta(config: Config) -> str:
    """Change ``config`` so that its test merges the predictions for several views of each image.

    ``tta_pipeline`` of a config counts, as in OpenMMLab; for a classifier it lists the views, see
    :class:`backbones.mm.data.datasets.ImageFolder`. Without one, images are scaled about the size of the test data and
    mirrored in the directions in which the training data are. ``tta_model`` of a config merges the predictions.

    Returns:
        The views, in words.

    Raises:
        UserError: the config has no test data, or a pipeline that cannot be taken apart.
    """
    dataset = config.test_dataloader.dataset
    while "dataset" in dataset:
        dataset = dataset.dataset
    task = task_of(config)
    init_default_scope(config.get("default_scope", "mmengine"))  # in which steps of pipelines are looked up
    flips = sorted(_flips(config.get("train_dataloader") or {}))
    if task == "classification":
        views = config.get("tta_pipeline") or _classifier_views(dataset.transform, flips)
        dataset.views, words, model = views, f"{len(views)} views", {"type": "ClassifierTTA"}
    else:
        pipeline = config.get("tta_pipeline") or _dense_pipeline(dataset.pipeline, SCALES[task], flips, config.filename)
        dataset.pipeline, words = pipeline, f"{_count(pipeline)} views"
        if task == "segmentation":
            model = {"type": "SegmentorTTA"}
        else:
            settings = config.model.test_cfg.get("rcnn", config.model.test_cfg)
            model = {"type": "DetectorTTA", "nms": settings.nms, "max_per_img": settings.max_per_img}
    hook = {"type": "PrepareTTAHook", "tta_cfg": config.get("tta_model") or model}
    config.custom_hooks = [*config.get("custom_hooks", []), hook]
    return words


def _classifier_views(transform: Any, flips: list[str]) -> list[dict[str, Any]]:
    whole = min(transform.get("crop_pct") or DEFAULT_CROP_PCT, 1.0)
    scales = [1.0, _ZOOM, *([whole] if whole < 1 else [])]
    return [{"scale": scale, "flip": flip} for scale in scales for flip in (None, *flips)]


def _dense_pipeline(
    pipeline: list[dict[str, Any]], scales: tuple[float, ...], flips: list[str], config: str
) -> list[dict[str, Any]]:
    """The steps of the test data with other sizes, mirrored or not; annotations stay those of the image itself."""
    steps = [copy.deepcopy(dict(step)) for step in pipeline]
    annotations = [step for step in steps if loads_annotations(step)]
    steps = [step for step in steps if step not in annotations]
    resizes = [i for i, step in enumerate(steps) if step["type"].endswith("Resize")]
    loads = [i for i, step in enumerate(steps) if step["type"].startswith("Load")]
    if len(resizes) > 1 or not loads or not steps[-1]["type"].startswith("Pack"):
        raise UserError(f"{config}: --tta cannot tell how its test pipeline resizes; give tta_pipeline")
    if resizes:
        resize = steps.pop(resizes[0])
        sized = [_scaled(resize, scale, config) for scale in scales]
    else:
        sized = [{"type": "Resize", "scale_factor": scale, "keep_ratio": True} for scale in scales]
    start = loads[-1] + 1
    pack = steps[-1]
    if "meta_keys" in pack:
        pack["meta_keys"] = tuple(dict.fromkeys((*pack["meta_keys"], "flip", "flip_direction")))
    mirrored = [{"type": "RandomFlip", "prob": 1.0, "direction": direction} for direction in flips]
    rest = [[step] for step in (*steps[start:-1], *annotations, pack)]
    return [
        *steps[:start],
        {"type": "TestTimeAug", "transforms": [sized, [{"type": "RandomFlip", "prob": 0.0}, *mirrored], *rest]},
    ]


def _scaled(step: dict[str, Any], scale: float, config: str) -> dict[str, Any]:
    if "scale" not in step:
        raise UserError(f"{config}: --tta cannot tell how its test pipeline resizes; give tta_pipeline")
    size = step["scale"] if isinstance(step["scale"], list | tuple) else (step["scale"],) * 2
    return {**step, "scale": tuple(max(1, round(side * scale)) for side in size)}


def _count(pipeline: list[dict[str, Any]]) -> int:
    count = 1
    for step in pipeline:
        if step["type"] == "TestTimeAug":
            for choices in step["transforms"]:
                count *= len(choices)
    return count


def _flips(config: Any) -> Iterator[str]:
    """Directions in which training images are mirrored at random."""
    found: set[str] = set()
    for step in _settings(config):
        if str(step.get("type", "")).endswith("RandomFlip") and _likely(step.get("prob", 0.0)):
            directions = step.get("direction", "horizontal")
            found |= {directions} if isinstance(directions, str) else set(directions)
        elif isinstance(step.get("transform"), dict) and step["transform"].get("is_training"):
            transform = step["transform"]
            found |= {"horizontal"} if transform.get("hflip", 0.5) else set()
            found |= {"vertical"} if transform.get("vflip", 0.0) else set()
    yield from found & {"horizontal", "vertical"}


def _likely(prob: Any) -> bool:
    return any(prob) if isinstance(prob, list | tuple) else bool(prob)


def _settings(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, dict):
        yield value
        for item in value.values():
            yield from _settings(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _settings(item)
