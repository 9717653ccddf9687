"""A trained model from its config and checkpoint, and what it says about images."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import Compose
from mmengine.registry import MODELS, TRANSFORMS, init_default_scope
from PIL import Image
from timm.data import create_transform
from torch import nn

from backbones import images
from backbones.mm.app.colors import ClassColors, stated_metainfo
from backbones.mm.data.datasets import compare_classes
from backbones.mm.engine.checkpoints import load_weights, read_checkpoint, select_state_dict
from backbones.mm.errors import UserError

TASKS = {"mmdet": "detection", "mmseg": "segmentation"}


@dataclass(frozen=True)
class Predictor:
    """A model in evaluation mode, and how to feed it.

    Attributes:
        task: "classification", "detection" or "segmentation".
        model: an ``ImageClassifier``, or a detector of mmdet or a segmentor of mmseg.
        colors: names and colours by label.
        pipeline: from the path of an image to what the model's ``test_step`` takes, for one image.
        amp: predict under autocast to bfloat16; of a detector the backbone and the neck.
    """

    task: str
    model: Any
    colors: ClassColors
    pipeline: Any
    amp: bool = False

    @property
    def classes(self) -> Sequence[str]:
        """Names by label."""
        return self.colors.names

    @torch.no_grad()
    def __call__(self, path: str | Path) -> Any:
        """The model's prediction for one image.

        Probabilities (num_classes,) of a classifier, a ``DetDataSample`` or a ``SegDataSample`` in the image's size.

        Raises:
            UserError: the image cannot be read.
        """
        read_image(path)
        data = self.pipeline(path)
        half = torch.autocast(next(self.model.parameters()).device.type, torch.bfloat16, enabled=self.amp)
        with _only_features(self.model, half) if self.task == "detection" else half:
            result = self.model.test_step(data)[0]
        return result["scores"] if self.task == "classification" else result


@contextmanager
def _only_features(model: Any, half: torch.autocast) -> Iterator[None]:
    """``half`` for backbone and neck alone: mmcv's operators in the heads, NMS and RoIAlign, read no bfloat16."""
    extract = model.extract_feat

    def extract_half(*args: Any, **kwargs: Any) -> Any:
        with half:
            maps = extract(*args, **kwargs)
        return tuple(x.float() for x in maps)

    model.extract_feat = extract_half
    try:
        yield
    finally:
        del model.extract_feat


def load_predictor(config: Config, checkpoint: str | Path) -> Predictor:
    """Builds the model of ``config``, loads ``checkpoint`` into it in full, and makes the pipeline of its test data.

    Args:
        config: of :func:`backbones.mm.app.cli.read_config`.
        checkpoint: of a training run, or weights alone.

    Raises:
        CheckpointError: the file cannot be read, or does not fit the model; all differences are named.
        UserError: the config has no test data to take the pipeline and the classes from.
    """
    contents = read_checkpoint(checkpoint)
    model = build_model(config)
    load_weights(model, select_state_dict(contents, checkpoint), checkpoint)
    model.eval()
    if "test_dataloader" not in config:
        raise UserError(f"{config.filename} has no test_dataloader, which says how images are prepared")
    dataset = config.test_dataloader.dataset
    while "dataset" in dataset:
        dataset = dataset.dataset
    meta = contents.get("meta") or {}
    metainfo = stated_metainfo(dataset)
    stated, trained = metainfo.get("classes"), (meta.get("dataset_meta") or {}).get("classes")
    if stated and trained:
        compare_classes(stated, f"{config.filename}", trained, str(checkpoint))
    classes = trained or stated
    task = task_of(config)
    if task == "classification":
        count = model.network.num_classes
        pipeline: Any = _ClassifierPipeline(dataset)
    else:
        head = model.decode_head if task == "segmentation" else getattr(model, "roi_head", model)
        head = getattr(head, "bbox_head", head)
        count = (head[-1] if isinstance(head, nn.ModuleList) else head).num_classes
        pipeline = _DensePipeline(dataset)
    classes = classes or [str(label) for label in range(count)]
    if len(classes) != count:
        raise UserError(f"{config.filename}: the data have {len(classes)} classes, the model {count}")
    return Predictor(task, model, ClassColors.of(tuple(classes), metainfo), pipeline)


def task_of(config: Config) -> str:
    """ "classification", "detection" or "segmentation", by the config's default scope."""
    return TASKS.get(config.get("default_scope"), "classification")


def build_model(config: Config) -> Any:
    """The model of ``config`` with random weights: nothing is downloaded, and no teacher is built.

    Raises:
        UserError: the config has no model.
    """
    if "model" not in config:
        raise UserError(f"{config.filename} has no model")
    init_default_scope(config.get("default_scope", "mmengine"))
    settings = copy.deepcopy(config.model)
    if "network" in settings:
        network = {**settings.network, "pretrained": False}
        loss = {"type": "LabelSmoothingCrossEntropy"}  # unused
        settings = {"type": "ImageClassifier", "network": network, "loss": loss}
    with warnings.catch_warnings():
        # mmseg warns of a default of its loss, which plays no part here.
        warnings.filterwarnings("ignore", message="Default ``avg_non_ignore`` is False", category=UserWarning)
        return MODELS.build(settings)


def read_image(path: str | Path, mode: str = "RGB") -> Image.Image:
    """The image in RGB or another Pillow mode, see :func:`backbones.images.read_image`.

    Raises:
        UserError: no such file, or not an image.
    """
    try:
        return images.read_image(path, mode)
    except images.UNREADABLE as error:
        reason = "does not exist" if isinstance(error, FileNotFoundError) else f"cannot be read ({error})"
        raise UserError(f"image {path} {reason}") from error


def loads_annotations(step: Any) -> bool:
    """Whether a step of a pipeline reads annotations, under whatever name."""
    with TRANSFORMS.switch_scope_and_registry(None) as registry:  # of the default scope
        kind = registry.get(step["type"])
    # All such steps of mmcv, mmdet and mmseg derive from that of mmcv.
    return any(base.__name__ == "LoadAnnotations" for base in getattr(kind, "__mro__", ()))


class _ClassifierPipeline:
    def __init__(self, dataset: Config) -> None:
        self.transform = create_transform(**dataset.transform)
        self.mode = dataset.get("image_mode", "RGB")

    def __call__(self, path: str | Path) -> dict[str, Any]:
        return {"inputs": self.transform(read_image(path, self.mode)).unsqueeze(0)}


class _DensePipeline:
    """The steps of the test data, but for those that need annotations."""

    def __init__(self, dataset: Config) -> None:
        self.steps = Compose([step for step in dataset.pipeline if not loads_annotations(step)])

    def __call__(self, path: str | Path) -> dict[str, Any]:
        data = self.steps({"img_path": str(path), "img_id": 0})
        return {"inputs": [data["inputs"]], "data_samples": [data["data_samples"]]}
