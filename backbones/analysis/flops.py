"""What a model costs: parameters, operations and activations of each stage, the selective scan included.

>>> from backbones.analysis.flops import count
>>> vim = count("vim_tiny", 224)
>>> f"{vim.total.parameters / 1e6:.1f} M, {vim.total.flops / 1e9:.2f} GFLOPs, {vim.total.scan / 1e9:.2f} of them scans"
'7.1 M, 1.82 GFLOPs, 0.53 of them scans'
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import timm
import torch
from timm.models import PretrainedCfg
from torch import nn
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import backbones  # noqa: F401  (registers the models in timm)
from backbones.ops.scan.operator import _forward_flops, _projection_flops
from backbones.suggest import did_you_mean

_SCAN = torch.ops.backbones.selective_scan
_MOST_PARTS = 8  # a list of more modules is a plain model's blocks: one row


@dataclass(frozen=True)
class Cost:
    """What one image costs in a model or a part of one.

    Attributes:
        parameters: number of weights.
        macs: multiply-adds of convolutions, linear layers and matrix products.
        scan: operations of selective scans, 9 for each step, channel and state.
        other: operations of norms (5 for each element, 2 for a batch norm) and of resampling (4 for each output, 1 for
            nearest).
        activations: elements of the outputs of convolutions, products and scans.
    """

    parameters: int = 0
    macs: int = 0
    scan: int = 0
    other: int = 0
    activations: int = 0

    @property
    def flops(self) -> int:
        """Operations as the papers count them, with fvcore: a multiply-add is one, and scans are added."""
        return self.macs + self.scan + self.other


@dataclass(frozen=True)
class ModelCost:
    """The cost of a model for one image of ``size``, (height, width), and that of its parts, which add up to it."""

    size: tuple[int, int]
    total: Cost
    stages: dict[str, Cost]


def count(name: str, size: int | tuple[int, int] | None = None, **model_args: Any) -> ModelCost:
    """Counts a registered model, without computing anything: only shapes go through it.

    Args:
        name: any model of timm's, such as "vmamba_tiny_s1l8".
        size: height and width of the image in pixels; None is the size that the model was published for.
        model_args: further arguments of ``timm.create_model``.

    Raises:
        ValueError: no such model (near names are offered), or a size that it cannot take.
    """
    if not timm.is_model(name):
        raise ValueError(f"unknown model {name!r}{did_you_mean(name, timm.list_models())}")
    cfg = timm.get_pretrained_cfg(name) or PretrainedCfg(input_size=(3, 224, 224))
    height, width = cfg.input_size[1:] if size is None else (size, size) if isinstance(size, int) else size
    if min(height, width) < 1:
        raise ValueError(f"size: got {height} x {width} pixels, expected at least 1 x 1")
    if cfg.fixed_input_size:
        model_args = {"img_size": (height, width), **model_args}
    try:
        with torch.device("meta"):
            model = timm.create_model(name, **model_args)
        return count_model(model, (height, width))
    except (AssertionError, RuntimeError) as error:  # how timm's models refuse a size
        raise ValueError(f"{name} takes no image of {height} x {width} pixels: {error}") from error


def count_model(model: nn.Module, size: tuple[int, int]) -> ModelCost:
    """Counts any image model in evaluation mode; its weights are discarded.

    A stage is a child of the model, or an entry of a list of up to eight that hold its features. Downsampling counts to
    the stage it leads to.

    Args:
        model: moved to the meta device, and left there.
        size: height and width of the image in pixels.
    """
    model.to("meta").eval()
    image = torch.empty(1, getattr(model, "in_chans", 3), *size, device="meta")
    return count_call(model, size, image)


def count_call(model: nn.Module, size: tuple[int, int], *args: Any, **kwargs: Any) -> ModelCost:
    """Counts ``model(*args, **kwargs)`` for an image of ``size``, as :func:`count_model` does, where the model is."""
    operations = FlopCounterMode(display=False, custom_mapping=COUNTED_ONCE)
    activations = FlopCounterMode(display=False, custom_mapping=dict.fromkeys(flop_registry, _elements))
    with torch.no_grad(), operations, activations:
        model(*args, **kwargs)

    stage_of = _stage_names(model)
    sums: dict[str, defaultdict[str, int]] = {stage: defaultdict(int) for stage in dict.fromkeys(stage_of.values())}
    for parameter_name, parameter in model.named_parameters():
        owner = parameter_name.rpartition(".")[0]
        sums[stage_of[owner]]["parameters"] += parameter.numel()
    for module, counts in _exclusive(operations.get_flop_counts()).items():
        for op, flops in counts.items():
            kind = "scan" if op is _SCAN else "other" if op in COUNTED_ONCE else "macs"
            sums[stage_of[module]][kind] += as_counted(op, flops)
    for module, counts in _exclusive(activations.get_flop_counts()).items():
        sums[stage_of[module]]["activations"] += sum(counts.values())
    stages = {stage: Cost(**values) for stage, values in sums.items() if any(values.values())}
    fields = Cost.__dataclass_fields__
    return ModelCost(size, Cost(**{x: sum(getattr(cost, x) for cost in stages.values()) for x in fields}), stages)


def as_counted(op: Any, flops: int) -> int:
    """Operations as the papers count them: a multiply-add is one, where PyTorch's own formulas have two."""
    return flops if op in COUNTED_ONCE else flops // 2


def _scan_operations(u, delta, A, B, C, D, orders, delta_bias, dt_weight, *args, **kwargs) -> int:  # type: ignore
    """The papers' count of the recurrence, and one operation for a multiply-add of the step sizes' projection."""
    flops = _forward_flops(u, delta, A, B, C, D, orders, delta_bias, dt_weight, *args, **kwargs)
    return flops - _projection_flops(delta, dt_weight) // 2


def _stage_names(model: nn.Module) -> dict[str, str]:
    """The stage of every module, by its name; "" is the model itself."""
    features = [info["module"] for info in getattr(model, "feature_info", ())]
    lists = {
        name
        for name, child in model.named_children()
        if isinstance(child, nn.ModuleList | nn.Sequential)
        and len(child) <= _MOST_PARTS
        and any(module.startswith(f"{name}.") for module in features)
    }
    names = {}
    for name, _ in model.named_modules(remove_duplicate=False):
        first, *rest = name.split(".")
        if first == "downsamples" and rest and "stages" in lists:
            names[name] = f"stages.{int(rest[0]) + 1}"
        else:
            names[name] = f"{first}.{rest[0]}" if first in lists and rest else first or "itself"
    return names


def _exclusive(counts: Mapping[str, Mapping[Any, int]]) -> dict[str, dict[Any, int]]:
    """What each module does itself, from what it does with all that it calls; "" is the model.

    Names are those of FlopCounterMode, which begin with the class of the model. A module that is never called, as a
    list of blocks, has no count of its own.
    """
    called = {name.partition(".")[2]: dict(ops) for name, ops in counts.items() if name != "Global"}
    own = {name: dict(ops) for name, ops in called.items()}
    for name, ops in called.items():
        caller = name
        while caller:
            caller = caller.rpartition(".")[0]
            if caller in own:
                for op, value in ops.items():
                    own[caller][op] = own[caller].get(op, 0) - value
                break
    return own


def _per_element(operations: int, of_output: bool = False) -> Callable[..., int]:
    def formula(x: Any, *args: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return operations * prod(out_shape if of_output else x)

    return formula


def _elements(*args: Any, out_shape: Any = None, **kwargs: Any) -> int:
    first = out_shape if isinstance(out_shape, torch.Size) else out_shape[0]  # y of (y, states)
    return prod(first)


_aten = torch.ops.aten
COUNTED_ONCE: dict[Any, Callable[..., int]] = {
    _SCAN: _scan_operations,
    _aten.native_layer_norm: _per_element(5),
    _aten.native_group_norm: _per_element(5),
    _aten._native_batch_norm_legit_no_training: _per_element(2),
    _aten.upsample_bilinear2d: _per_element(4, of_output=True),
    _aten.upsample_nearest2d: _per_element(1, of_output=True),
}
