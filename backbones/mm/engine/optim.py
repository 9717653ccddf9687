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
from backbones.ops.tracing import RunningNorm

_NORMS = (RunningNorm, nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


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

    As in mmengine, ``norm_decay_mult`` and ``bias_decay_mult`` give norms, and all other biases, that multiple of the
    weight decay instead of none, and ``custom_keys=dict(backbone=dict(lr_mult=0.1, decay_mult=0.0))`` scales what has
    "backbone" in its name; the longest of several matching keys counts. Unlike mmengine's, a key without
    ``decay_mult`` leaves the weight decay as it would be without the key, and ``lr_mult`` multiplies ``layer_decay``.

    Raises:
        UserError: ``paramwise_cfg`` has another key, ``layer_decay`` is not within (0, 1], a custom key matches no
            parameter, or the ``lr`` or ``weight_decay`` that is to be scaled is not given.
    """

    def _validate_cfg(self) -> None:
        known = {"layer_decay", "norm_decay_mult", "bias_decay_mult", "custom_keys"}
        if unknown := self.paramwise_cfg.keys() - known:
            raise UserError(f"paramwise_cfg: got {sorted(unknown)}, expected nothing but {', '.join(sorted(known))}")
        decay = self.paramwise_cfg.get("layer_decay", 1.0)
        if not 0 < decay <= 1:
            raise UserError(f"layer_decay: got {decay}, expected a factor within (0, 1]")
        keys = self.paramwise_cfg.get("custom_keys", {})
        for key, scales in keys.items():
            if not isinstance(scales, dict) or not scales or scales.keys() - {"lr_mult", "decay_mult"}:
                raise UserError(f"custom_keys: {key!r} is {scales}, expected dict(lr_mult=, decay_mult=)")
        if self.base_lr is None and (decay < 1 or any("lr_mult" in scales for scales in keys.values())):
            raise UserError("layer_decay and lr_mult scale the learning rate, so the optimizer's lr must be given")
        decays = {"norm_decay_mult", "bias_decay_mult"} & self.paramwise_cfg.keys()
        if self.base_wd is None and (decays or any("decay_mult" in scales for scales in keys.values())):
            raise UserError("decay_mult scales the weight decay, so the optimizer's weight_decay must be given")

    def _scales(self, model: nn.Module) -> dict[str, tuple[float, float]]:
        """Of every trained parameter, what its learning rate and its weight decay are multiplied by."""
        cfg = self.paramwise_cfg
        layers = layer_scales(model, cfg["layer_decay"]) if cfg.get("layer_decay", 1.0) < 1 else {}
        no_decay = no_decay_names(model)
        keys = sorted(cfg.get("custom_keys", {}), key=lambda key: (-len(key), key))
        names = [name for name, _ in model.named_parameters()]
        if idle := [key for key in keys if not any(key in name for name in names)]:
            raise UserError(f"custom_keys: no parameter has {idle[0]!r} in its name")
        norms = {f"{prefix}." if prefix else "" for prefix, x in model.named_modules() if isinstance(x, _NORMS)}
        scales = {}
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            owner, last = name[: name.rfind(".") + 1], name.rpartition(".")[2]
            decay = float(parameter.ndim > 1 and name not in no_decay)
            if owner in norms:
                decay = cfg.get("norm_decay_mult", decay)
            elif last == "bias":
                decay = cfg.get("bias_decay_mult", decay)
            custom: dict[str, float] = next((cfg["custom_keys"][key] for key in keys if key in name), {})
            scales[name] = layers.get(name, 1.0) * custom.get("lr_mult", 1.0), custom.get("decay_mult", decay)
        return scales

    def __call__(self, model: nn.Module) -> OptimWrapper:
        model = cast(nn.Module, model.module) if is_model_wrapper(model) else model
        scales = self._scales(model)
        groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
        for name, parameter in model.named_parameters():
            if name in scales:
                groups[scales[name]].append(parameter)
        params: list[dict[str, Any]] = []
        for (scale, decay), parameters in groups.items():
            params.append({"params": parameters})
            if scale != 1:
                params[-1]["lr"] = scale * self.base_lr
            if decay != 1:
                params[-1]["weight_decay"] = decay * self.base_wd if decay else 0.0
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
