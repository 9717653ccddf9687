"""Classifiers that learn from a teacher: another network, or their own average."""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.nn.functional as F
from mmengine.hooks import EMAHook
from mmengine.registry import HOOKS, MODELS
from mmengine.runner import Runner
from torch import Tensor, nn

from backbones.base import Backbone
from backbones.mm.engine.checkpoints import load_weights
from backbones.mm.errors import UserError
from backbones.mm.models.classifier import ImageClassifier, create_network, mean_logits
from backbones.mm.models.dense import fetch_weights
from backbones.weights import files
from backbones.weights.loading import fit


class Teacher:
    """A frozen network beside a classifier: no part of its parameters, its checkpoints or its copies."""

    def __init__(self, network: nn.Module) -> None:
        self.network = network.requires_grad_(False).eval()

    def __deepcopy__(self, memo: dict[int, Any]) -> Teacher:
        return self

    @torch.no_grad()
    def __call__(self, inputs: Tensor) -> Tensor:
        """Logits (b, num_classes) in float32."""
        return mean_logits(self.network.to(inputs.device)(inputs)).float()


@MODELS.register_module()
class HardDistillation(ImageClassifier):
    """A network whose second classifier learns the teacher's decisions (DeiT, arXiv:2012.12877, equation 3).

    The teacher sees the same mixed images; its most likely class is the label.

    Args:
        network: see :class:`ImageClassifier`; a network of two classifiers, which
            ``set_distilled_training()`` makes return a pair of logits in training, as GroupMamba and timm's do.
        loss: of the first classifier.
        teacher: arguments of ``timm.create_model``, among them ``name``, and ``checkpoint``, a file or a URL.
        alpha: weight of the second classifier's loss; the first one's is ``1 - alpha``.

    Raises:
        UserError: ``teacher`` lacks its name or its checkpoint, or ``alpha`` is not within 0 and 1.
    """

    def __init__(
        self,
        network: dict[str, Any],
        loss: dict[str, Any],
        teacher: dict[str, Any],
        alpha: float = 0.5,
        data_preprocessor: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(network, loss, data_preprocessor, init_cfg)
        if missing := {"name", "checkpoint"} - teacher.keys():
            raise UserError(
                f"teacher: {', '.join(sorted(missing))} missing; a teacher with random weights teaches nothing"
            )
        if not 0 <= alpha <= 1:
            raise UserError(f"alpha: got {alpha}, expected a weight within 0 and 1")
        self.alpha = alpha
        if hasattr(self.network, "set_distilled_training"):
            cast(Any, self.network).set_distilled_training()
        self.teacher_cfg = dict(teacher)
        self.teacher: Teacher | None = None

    def init_weights(self) -> None:
        """Also builds the teacher and loads its weights; testing needs neither.

        Raises:
            CheckpointError: the teacher's weights do not fit it.
            UserError: there is no such file, or the teacher has other classes than the network.
        """
        super().init_weights()
        kwargs = dict(self.teacher_cfg)
        checkpoint = kwargs.pop("checkpoint")
        network = create_network(**kwargs)
        classes = self.network.num_classes
        if network.num_classes != classes:
            raise UserError(f"teacher: {kwargs['name']} has {network.num_classes} classes, the network {classes}")
        keys = network.weight_keys if isinstance(network, Backbone) else files.WEIGHT_KEYS
        weights = files.read(fetch_weights(checkpoint, kwargs["name"]), keys)
        load_weights(
            network,
            fit(weights, network, cast(Any, network.pretrained_cfg)) if isinstance(network, Backbone) else weights,
            checkpoint,
        )
        self.teacher = Teacher(network)

    def losses(self, outputs: Any, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        if self.teacher is None:
            raise UserError("the teacher has no weights yet: init_weights() loads them")
        if not isinstance(outputs, tuple):
            raise UserError(f"{self.name} has one classifier; hard distillation trains two")
        logits, distilled = outputs
        return {
            "loss_label": (1 - self.alpha) * self.criterion(logits.float(), targets),
            "loss_teacher": self.alpha * F.cross_entropy(distilled.float(), self.teacher(inputs).argmax(1)),
        }


@MODELS.register_module()
class SelfDistillation(ImageClassifier):
    """A network that also learns the decisions of its own average (MESA, arXiv:2205.14083, without its schedule).

    The loss is the labels' plus ``weight`` times the cross-entropy with the average's probabilities. It takes
    :class:`SelfDistillationHook` to keep the average; until the hook lends it there is only the labels' loss.

    Args:
        network: see :class:`ImageClassifier`, and so ``loss``, ``data_preprocessor`` and ``init_cfg``.
        weight: of the average's loss.
    """

    def __init__(
        self,
        network: dict[str, Any],
        loss: dict[str, Any],
        weight: float = 1.0,
        data_preprocessor: dict[str, Any] | None = None,
        init_cfg: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(network, loss, data_preprocessor, init_cfg)
        self.weight = weight
        self.teacher: Teacher | None = None

    def losses(self, outputs: Any, inputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        logits = mean_logits(outputs).float()
        losses = {"loss_label": self.criterion(logits, targets)}
        if self.teacher is not None:
            losses["loss_teacher"] = self.weight * F.cross_entropy(logits, self.teacher(inputs).softmax(1))
        return losses


@HOOKS.register_module()
class SelfDistillationHook(EMAHook):
    """Averages the weights from the first iteration, as ``EMAHook`` does, and lends the average as a teacher.

    Args:
        start_epoch: first epoch, counted from 0, in which the average teaches.
        momentum: share of the new weights in the average.

    Raises:
        UserError: the model is no :class:`SelfDistillation`.
    """

    def __init__(self, start_epoch: int, momentum: float = 1e-4) -> None:
        super().__init__(momentum=momentum, update_buffers=True)
        self.start_epoch = start_epoch

    def before_train_epoch(self, runner: Runner) -> None:
        if not isinstance(self.src_model, SelfDistillation):
            raise UserError(f"SelfDistillationHook: the model is {type(self.src_model).__name__}, not SelfDistillation")
        if runner.epoch >= self.start_epoch and self.src_model.teacher is None:
            self.src_model.teacher = Teacher(self.ema_model.module.network)
