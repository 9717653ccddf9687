"""Small models of every generation of every family, for what depends on neither width nor depth."""

from typing import Any

import timm
import torch
from torch import Tensor, nn

from backbones.base import Backbone, PlainBackbone
from backbones.models import FAMILIES, family_names

PLAIN = [module for family, module in zip(FAMILIES, family_names(), strict=True) if issubclass(family, PlainBackbone)]
_SHAPE: dict[str, Any] = {"dims": (16, 24, 40, 48), "depths": (1, 1, 2, 1)}
# How to make the smallest of every generation narrow and shallow. 16 does not divide some of the widths, so that ranks
# of step sizes are rounded up.
SMALLEST: dict[str, dict[str, Any]] = {
    "vim_tiny": {"embed_dim": 40, "depth": 4},
    "lbvim_tiny": {"embed_dim": 40, "depth": 4},
    "lbvim_528": {"embed_dim": 36, "depth": 2},
    "vmamba_tiny_s1l8": _SHAPE,
    "vanilla_vmamba_tiny": _SHAPE,
    "msvmamba_nano": _SHAPE,
    "msvmambav3_tiny": _SHAPE,
    "efficientvmamba_tiny": _SHAPE,
    "groupmamba_tiny": {**_SHAPE, "dims": (16, 24, 40, 80), "stem_dim": 8},
    "spatialmamba_tiny": _SHAPE,
    "vssd_micro": {**_SHAPE, "num_heads": (2, 4, 8, 6), "d_state": 8},
    "localvim_tiny": {"embed_dim": 40, "depth": 2},
    "localvim_tiny_midcls": {"embed_dim": 40, "depth": 2},
    "localvmamba_tiny": _SHAPE,
    "adventurer_tiny": {"embed_dim": 32, "depth": 4},
    "plainmamba_l1": {"embed_dim": 40, "depth": 2},
    "plainmamba_l2": {"embed_dim": 40, "depth": 2},
}


def smallest_of(family: type[Backbone]) -> str:
    """The first of `SMALLEST` that is a model of this family."""
    module = family.__module__.rpartition(".")[2]
    return next(name for name in SMALLEST if timm.models.is_model_in_modules(name, [module]))


def is_plain(name: str) -> bool:
    """Whether the model called ``name`` is a stack of blocks over tokens."""
    return timm.models.is_model_in_modules(name, PLAIN)


def create(name: str, **kwargs: Any) -> nn.Module:
    """A model for 64 x 64 pixels, on 10 classes."""
    size = {"img_size": 64} if is_plain(name) else {}
    return timm.create_model(name, **{"num_classes": 10, **size, **kwargs})


def create_small(name: str, **kwargs: Any) -> nn.Module:
    """The narrow and shallow one."""
    return create(name, **{**SMALLEST[name], **kwargs})


def create_shallow(name: str, **kwargs: Any) -> nn.Module:
    """A shallow one of registered width."""
    shallow = {key: value for key, value in SMALLEST[name].items() if key in ("depth", "depths")}
    return create(name, **{**shallow, **kwargs})


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """Its blocks, from the image to the head."""
    return [*model.blocks] if hasattr(model, "blocks") else [x for stage in model.stages for x in stage.blocks]


def images(*shape: int) -> Tensor:
    """Noise, 2 x 3 x 64 x 64 unless told, always the same."""
    return torch.randn(shape or (2, 3, 64, 64), generator=torch.Generator().manual_seed(0))


def total(outputs: Tensor | tuple[Tensor, ...]) -> Tensor:
    """A number that depends on every output; training mode may return one for each of two heads."""
    return sum(x.square().mean() for x in (outputs if isinstance(outputs, tuple) else (outputs,)))
