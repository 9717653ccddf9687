"""Any ``timm`` model as an mmengine classifier, with timm's mixup, cutmix and losses."""

from __future__ import annotations

from typing import Any, cast

import timm
import torch
from mmengine.model import BaseDataPreprocessor, BaseModel
from mmengine.registry import MODELS
from timm.data.mixup import Mixup, mixup_target
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from torch import Tensor, nn

from backbones.base import Backbone
from backbones.mm.errors import UserError
from backbones.mm.models.dense import fetch_weights
from backbones.mm.models.frozen import freeze_stages, keep_statistics
from backbones.suggest import did_you_mean
from backbones.weights.loading import load_pretrained

for _loss in (BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy):
    MODELS.register_module(module=_loss)

_INIT = ("type", "checkpoint", "headless")


def create_network(name: str, **kwargs: Any) -> nn.Module:
    """``timm.create_model`` that answers an unknown name with the nearest known ones.

    Raises:
        UserError: ``name`` is not registered in timm, the model takes no such argument, or ``num_classes`` is negative.
    """
    classes = kwargs.get("num_classes")
    if classes is not None and classes < 0:
        raise UserError(f"num_classes: got {classes}, expected at least 1, or 0 for no classifier")
    if ":" not in name and not timm.is_model(name):
        raise UserError(f"unknown model {name!r}{did_you_mean(name, timm.list_models())}")
    try:
        return timm.create_model(name, **kwargs)
    except TypeError as error:
        # Python's words for it; any other error of type is a fault.
        if "unexpected keyword argument" not in str(error):
            raise
        raise UserError(f"network: {name} takes no such argument: {error}") from error


@MODELS.register_module()
class ImagePreprocessor(BaseDataPreprocessor):
    """Moves a batch to the model's device and, in training, mixes images and labels.

    Args:
        mixup: settings of ``timm.data.Mixup`` (``mixup_alpha``, ``cutmix_alpha``, ``label_smoothing``, ...),
            or None to leave batches as they are. Mixed labels are soft: (b, num_classes) instead of (b,).
        num_classes: length of a soft label.
    """

    def __init__(self, mixup: dict[str, Any] | None = None, num_classes: int | None = None) -> None:
        super().__init__(non_blocking=True)
        self.num_classes = num_classes
        self.mixup = None if mixup is None else Mixup(num_classes=num_classes, **mixup)

    def forward(self, data: dict[str, Tensor], training: bool = False) -> dict[str, Tensor]:
        data = self.cast_data(data)
        if not training or self.mixup is None:
            return data
        inputs, targets = data["inputs"], data["targets"]
        even = len(inputs) // 2 * 2
        # timm mixes pairs; the odd image of an incomplete batch keeps its own (smoothed) label.
        soft = mixup_target(targets, self.num_classes, smoothing=self.mixup.label_smoothing)
        if even:
            inputs[:even], soft[:even] = self.mixup(inputs[:even], targets[:even])
        return {"inputs": inputs, "targets": soft}


@MODELS.register_module()
class ImageClassifier(BaseModel):
    """A classification network and its loss.

    A network with two classifiers, such as GroupMamba's, counts with the mean of their logits.

    Args:
        network: arguments of ``timm.create_model``, among them ``name``; every registered model will do.
        loss: a loss from ``timm.loss`` by its class name, such as ``dict(type="SoftTargetCrossEntropy")``.
        data_preprocessor: see :class:`ImagePreprocessor`; the number of classes is taken from the network.
        init_cfg: ``dict(type="Pretrained", checkpoint=...)`` loads weights for fine-tuning when ``init_weights`` is
            called, see :func:`backbones.mm.models.dense.fetch_weights`. A classifier for another number of classes
            starts from random weights, and so does any with ``headless=True``, for files without one, as those of
            pre-training.
        frozen_stages: -1 trains everything, 0 freezes the stem, i also the first i stages (blocks of a plain model);
            "all" trains the classifier alone (linear probing). Numbers are for models of this library.
        norm_eval: keep batch norms in eval mode, with the statistics that they have.

    Raises:
        UserError: an unknown model name, a loss that does not go with mixup, or stages that the network does not have.
    """

    def __init__(
        self,
        network: dict[str, Any],
        loss: dict[str, Any],
        data_preprocessor: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
        frozen_stages: int | str = -1,
        norm_eval: bool = False,
    ) -> None:
        built = create_network(**network)
        preprocessor = {"type": "ImagePreprocessor", "num_classes": built.num_classes, **(data_preprocessor or {})}
        super().__init__(preprocessor, init_cfg)
        self.network = built
        self.name = network["name"]
        self.criterion = MODELS.build(loss)
        mixing = getattr(self.data_preprocessor, "mixup", None) is not None
        if mixing and isinstance(self.criterion, LabelSmoothingCrossEntropy):
            raise UserError("mixup makes soft labels: use loss=dict(type='SoftTargetCrossEntropy')")
        if not mixing and isinstance(self.criterion, SoftTargetCrossEntropy):
            raise UserError("SoftTargetCrossEntropy needs the soft labels of mixup; use LabelSmoothingCrossEntropy")

        self.frozen_stages, self.norm_eval = _checked_stages(frozen_stages, built, self.name), norm_eval
        self.train()

    def train(self, mode: bool = True) -> ImageClassifier:
        """Sets training mode, except in what is frozen and, with ``norm_eval``, in batch norms."""
        super().train(mode)
        if self.frozen_stages == "all":
            self.network.eval().requires_grad_(False)
            for classifier in _classifiers(self.network):
                classifier.train(mode).requires_grad_(True)
        elif self.frozen_stages != -1:
            freeze_stages(self.network, cast(int, self.frozen_stages))
        if self.norm_eval:
            keep_statistics(self)
        return self

    def init_weights(self) -> None:
        """Loads the weights of ``init_cfg``; without it, keeps those that ``timm.create_model`` has made.

        mmengine would otherwise call ``network.init_weights`` before training, and undo ``pretrained=True``.

        Raises:
            CheckpointError: the weights do not fit the network; all that differ are named.
            UserError: there is no such file, or the network is not one of this library.
        """
        self._is_init = True
        if self.init_cfg is None:
            return
        if not isinstance(self.network, Backbone):
            raise UserError(f"init_cfg: {self.name} is not of this library, use network=dict(pretrained=True, ...)")
        load_network(self.network, self.init_cfg, self.name)

    def forward(
        self, inputs: Tensor, targets: Any = None, mode: str = "tensor"
    ) -> Tensor | dict[str, Tensor] | list[dict[str, Tensor]]:
        """Run the network on ``inputs`` (b, in_chans, height, width).

        Args:
            targets: labels (b,), or soft labels (b, num_classes).
            mode: ``"tensor"`` gives the logits (b, num_classes); ``"loss"`` the loss; ``"predict"`` one dict
                an image with ``scores`` (num_classes,), probabilities, and its ``target`` where known.
        """
        outputs = self.network(inputs)
        if mode == "loss":
            return self.losses(outputs, inputs, targets)
        logits = mean_logits(outputs)
        if mode == "tensor":
            return logits
        if mode == "predict":
            scores = torch.softmax(logits.float(), dim=-1)
            if targets is None:
                return [{"scores": row} for row in scores]
            return [{"scores": row, "target": target} for row, target in zip(scores, targets, strict=True)]
        raise ValueError(f"mode is {mode!r}, expected 'tensor', 'loss' or 'predict'")

    def losses(self, outputs: Any, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """Terms of the loss, which are added, from what the network made of ``inputs``."""
        return {"loss": self.criterion(mean_logits(outputs).float(), targets)}


def _classifiers(network: Any) -> list[nn.Module]:
    """The last layers of a network, of which distilled ones have two."""
    found = network.get_classifier()
    return [x for x in (found if isinstance(found, tuple) else (found,)) if next(x.parameters(), None) is not None]


def _checked_stages(frozen_stages: int | str, network: Any, name: str) -> int | str:
    if frozen_stages == -1:
        return frozen_stages
    if frozen_stages == "all":
        if not _classifiers(network):
            raise UserError(f"frozen_stages: got 'all', but {name} has no classifier to train")
        return frozen_stages
    if not isinstance(network, Backbone):
        raise UserError(f"frozen_stages: got {frozen_stages!r}, expected -1 or 'all': {name} is not of this library")
    stages = len(network.feature_info)
    if isinstance(frozen_stages, bool | str) or not 0 <= frozen_stages <= stages:
        raise UserError(f"frozen_stages: got {frozen_stages!r}, expected a number within -1..{stages}, or 'all'")
    return frozen_stages


def load_network(network: Backbone, init_cfg: dict[str, Any], name: str) -> None:
    """Loads the file that ``init_cfg`` names into a network; ``headless`` says that its head does not matter.

    Raises:
        CheckpointError: the weights do not fit the network; all that differ are named.
        UserError: there is no such file, or ``init_cfg`` says something else.
    """
    if init_cfg.get("type") != "Pretrained" or not {"type", "checkpoint"} <= init_cfg.keys() <= {*_INIT}:
        raise UserError(f"init_cfg: got {init_cfg}, expected dict(type='Pretrained', checkpoint=..., headless=False)")
    file = fetch_weights(init_cfg["checkpoint"], name)
    cfg = cast(dict[str, Any], cast(Any, network).pretrained_cfg)
    load_pretrained(network, {**cfg, "state_dict": None, "file": file}, name, bool(init_cfg.get("headless")))


def mean_logits(outputs: Any) -> Tensor:
    """The logits (b, num_classes) of a network, or the mean of those of its two classifiers."""
    return (outputs[0] + outputs[1]) / 2 if isinstance(outputs, tuple) else outputs
