"""Weight decay and layer-wise learning rates as the models ask for them, and mixed precision without a GPU."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any, cast

import torch
from mmengine.model import is_model_wrapper
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from timm.models._manipulate import group_with_matcher
from torch import nn

from backbones.mm.errors import UserError


def no_decay_names(model: nn.Module) -> set[str]:
    """Full names of the parameters that timm models inside ``model`` list in ``no_weight_decay()``."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if hasattr(module, "no_weight_decay")
        for name in module.no_weight_decay()
    }


def layer_scales(model: nn.Module, decay: float) -> dict[str, float]:
    """Learning rates, relative to the head's, of the parameters of timm models inside ``model``.

    A model's ``group_matcher`` sorts its parameters into layers. The last layer gets ``decay``, the layer before
    it ``decay ** 2``, and so on; a classifier counts as head. What stands outside of timm models is not listed.

    Raises:
        UserError: there is no timm model inside.
    """
    scales: dict[str, float] = {}
    for prefix, module in model.named_modules():
        if not hasattr(module, "group_matcher"):
            continue
        # A name that no pattern matches gets the number of the head, which a pruned backbone lacks.
        named = chain(module.named_parameters(), [("", None)])
        layers = group_with_matcher(named, module.group_matcher(coarse=False), reverse=True)
        head = layers.pop("")
        prefix = prefix and f"{prefix}."
        scales |= {prefix + name: decay ** (head - layer) for name, layer in layers.items()}
    if not scales:
        raise UserError("layer_decay: the model holds no timm model, whose group_matcher would tell its layers")
    return scales


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class TimmOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """No weight decay for norms, biases and other vectors, nor for what ``no_weight_decay()`` names.

    With ``paramwise_cfg=dict(layer_decay=0.9)`` the learning rate falls from layer to layer towards the image, see
    :func:`layer_scales`; necks and heads keep the whole of it.

    Raises:
        UserError: ``paramwise_cfg`` has another key, ``layer_decay`` is not within (0, 1], or ``lr`` is not given.
    """

    def __call__(self, model: nn.Module) -> OptimWrapper:
        if unknown := self.paramwise_cfg.keys() - {"layer_decay"}:
            raise UserError(f"paramwise_cfg: got {sorted(unknown)}, expected nothing but 'layer_decay'")
        decay = self.paramwise_cfg.get("layer_decay", 1.0)
        if not 0 < decay <= 1:
            raise UserError(f"layer_decay: got {decay}, expected a factor within (0, 1]")
        if decay < 1 and self.base_lr is None:
            raise UserError("layer_decay: it scales the learning rate, so the optimizer's lr must be given")
        model = cast(nn.Module, model.module) if is_model_wrapper(model) else model
        scales = layer_scales(model, decay) if decay < 1 else {}
        no_decay = no_decay_names(model)
        groups: dict[tuple[float, bool], list[nn.Parameter]] = defaultdict(list)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                groups[scales.get(name, 1.0), parameter.ndim > 1 and name not in no_decay].append(parameter)
        params: list[dict[str, Any]] = []
        for (scale, decays), parameters in groups.items():
            params.append({"params": parameters})
            if scale != 1:
                params[-1]["lr"] = scale * self.base_lr
            if not decays:
                params[-1]["weight_decay"] = 0.0
        optimizer = OPTIMIZERS.build({**self.optimizer_cfg, "params": params})
        return OPTIM_WRAPPERS.build(
            {"type": "OptimWrapper", **self.optim_wrapper_cfg}, default_args={"optimizer": optimizer}
        )


@OPTIM_WRAPPERS.register_module()
class BFloat16OptimWrapper(OptimWrapper):
    """Forward in bfloat16 autocast, on any device, where mmengine's ``AmpOptimWrapper`` wants a GPU.

    Weights and gradients stay float32 and need no loss scaling.
    """

    @contextmanager
    def optim_context(self, model: nn.Module) -> Iterator[Any]:
        device = next(model.parameters()).device.type
        with super().optim_context(model), torch.autocast(device, dtype=torch.bfloat16):
            yield
