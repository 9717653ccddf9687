"""Which parts of a network are not trained."""

from __future__ import annotations

from typing import Any

from torch import nn

from backbones.base import PlainBackbone
from backbones.ops.tracing import BatchNorm


def freeze_stages(model: Any, count: int) -> None:
    """Freezes the stem of a model of this library and its first ``count`` stages (blocks of a plain model).

    They keep eval mode until the next call of ``train()``.
    """
    parts: list[nn.Module | nn.Parameter]
    if isinstance(model, PlainBackbone):
        tokens: list[Any] = [x for x in (model.pos_embed, model.cls_token) if x is not None]
        parts = [model.patch_embed, *tokens, *model.blocks[:count]]
    else:
        parts = [model.stem, *model.stages[:count], *model.downsamples[: max(count - 1, 0)]]
    for part in parts:
        if isinstance(part, nn.Module):
            part.eval()
        part.requires_grad_(False)


def keep_statistics(model: nn.Module) -> None:
    """Puts every batch norm of ``model`` into eval mode, so that it keeps the statistics that it has."""
    for module in model.modules():
        if isinstance(module, BatchNorm):
            module.eval()
