"""Weight decay as the models ask for it, and automatic mixed precision without a GPU."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from mmengine.optim import DefaultOptimWrapperConstructor, OptimWrapper
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS, OPTIM_WRAPPERS, OPTIMIZERS
from timm.optim import param_groups_weight_decay
from torch import nn


def no_decay_names(model: nn.Module) -> set[str]:
    """Full names of the parameters that timm models inside ``model`` list in ``no_weight_decay()``."""
    return {
        f"{prefix}.{name}" if prefix else name
        for prefix, module in model.named_modules()
        if hasattr(module, "no_weight_decay")
        for name in module.no_weight_decay()
    }


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class TimmOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """No weight decay for norms, biases and other vectors, nor for what ``no_weight_decay()`` names."""

    def __call__(self, model: nn.Module) -> OptimWrapper:
        model = getattr(model, "module", model)
        groups = param_groups_weight_decay(
            model, self.optimizer_cfg.get("weight_decay", 0.0), no_weight_decay_list=no_decay_names(model)
        )
        optimizer = OPTIMIZERS.build({**self.optimizer_cfg, "params": groups})
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
