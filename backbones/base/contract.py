"""The part of timm's model contract that does not depend on the shape of the features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, NoReturn, cast

import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from backbones.layers.constructor import Constructor
from backbones.layers.half_weights import with_half_weights
from backbones.layers.recorded import run_recorded
from backbones.layers.weight_decay import no_weight_decay
from backbones.weights import WEIGHT_KEYS, KeyRule, Weights
from backbones.weights.loading import TakesOfficialLayout


def run_block(block: nn.Module, *args: Any, checkpointed: bool) -> Any:
    """``block(*args)``, computed again in backward if ``checkpointed`` instead of keeping its activations."""
    if checkpointed and torch.is_grad_enabled():
        return checkpoint(with_half_weights, block, block, *args, use_reentrant=False)
    return run_recorded(block, block, *args)


@torch.compiler.assume_constant_result  # asked directly, torch.compile and torch.export answer no
def _in_onnx_export() -> bool:
    return torch.onnx.is_in_onnx_export()


def refuse_onnx_export() -> None:
    """Raises a ValueError where ``torch.onnx.export`` itself runs a model, for it does not know our operators."""
    if _in_onnx_export():
        raise ValueError(
            "torch.onnx.export does not know the operators of these models; `ssm-backbones export` and "
            "backbones.export.export_onnx write ONNX files"
        )


class Backbone(TakesOfficialLayout):
    """The part of timm's contract that does not depend on the shape of the features."""

    # Arguments of the constructor that the family's models have, unless a model or its caller gives others.
    defaults: ClassVar[Mapping[str, Any]] = {}

    weight_keys: ClassVar[Sequence[str]] = WEIGHT_KEYS  # where the authors' training states keep the published weights

    feature_indices: ClassVar[int | tuple[int, ...]]  # what ``features_only=True`` returns unless told
    head_modules: ClassVar[Sequence[str]] = ("norm",)  # behind the features, besides the classifier
    dense_norm: ClassVar[Constructor] = nn.LayerNorm  # behind each output of a dense model, called with its width
    # Names in the authors' dense models of what stands behind each output: its norm is our `out_norms.{}`.
    dense_rules: ClassVar[Sequence[KeyRule]] = (KeyRule("outnorm{}.{}", "out_norms.{}.{}"),)

    num_classes: int
    in_chans: int
    num_features: int
    head_hidden_size: int
    grad_checkpointing: bool = False
    feature_info: list[dict[str, Any]]
    pretrained_cfg: dict[str, Any]  # timm's, of models that `create_model` built

    @classmethod
    def create(cls, arch: str, **kwargs: Any) -> Backbone:
        """The family's model behind the registered name ``arch``; arguments as of ``timm.create_model``."""
        return cast(Backbone, timm.create_model(arch, **kwargs))

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trades time for memory: blocks are computed again in backward instead of keeping their activations."""
        self.grad_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        """See :func:`backbones.layers.no_weight_decay`."""
        return no_weight_decay(self)

    def __prepare_scriptable__(self) -> NoReturn:  # what torch.jit.script asks of every module
        raise ValueError(
            "torch.jit.script does not compile these models; `ssm-backbones export` writes ONNX and torch.export "
            "programs"
        )

    def adapt_state_dict(self, weights: Weights, img_size: tuple[int, int] | None = None) -> Weights:
        """Fits weights of another input size to this model; names and shapes are checked afterwards.

        Args:
            weights: in our layout.
            img_size: height and width of the images that they were made for, where known.
        """
        return weights

    def forward_features(self, x: Tensor) -> Tensor:
        """Image (b, in_chans, height, width) to normalised features."""
        raise NotImplementedError

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Features to logits, or to what the classifier would see."""
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        """Image (b, in_chans, height, width) to logits (b, num_classes)."""
        if torch.is_grad_enabled():  # gradients of weights come block by block, for what waits for them
            return self._logits(x)
        return with_half_weights(self._logits, self, x)

    def _logits(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))
