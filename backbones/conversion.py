"""Weights of unknown origin into ours: which model they belong to, and which of them it takes.

A file may hold a classifier in the official layout or in ours, or a detector or segmentor with a backbone of ours or of
the authors inside. Nothing but names and shapes decides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import timm
from torch import Tensor, nn

from backbones.base import HierarchicalBackbone
from backbones.models import family_names
from backbones.weights import CheckpointError, Weights, loading, rules
from backbones.weights.files import grids_of

_BEHIND_OUTPUT = re.compile(r"out_(?:norms|maps)\.(\d+)\.(.+)")


@dataclass(frozen=True)
class Converted:
    """Weights in our layout, with what ``timm.create_model`` must be told to load them."""

    model: str
    arguments: dict[str, Any]
    weights: Weights
    dropped: tuple[str, ...]


def model_names() -> list[str]:
    """The registered models, without second names."""
    names = [name for module in family_names() for name in timm.list_models(module=module)]
    return [name for name in names if _on_meta(name).pretrained_cfg["architecture"] == name]


def identify(weights: Mapping[str, Tensor]) -> str:
    """The registered model that ``weights`` (see :func:`backbones.weights.files.read`) belong to.

    Raises:
        CheckpointError: they resemble no model, or several alike.
    """
    weights = {name: weights[whole].to("meta") for name, whole in loading.inside_backbone(weights).items()}
    distances: dict[str, int] = {}
    for name in model_names():
        try:
            given = _shapes(rules.convert(weights, _on_meta(name).key_rules)[0])
        except CheckpointError:  # tensors that stand for another layout's
            continue
        expected = _expected(name)
        if 2 * len(given & expected) > len(expected):
            distances[name] = len(given ^ expected)
    if not distances:
        first = ", ".join(list(weights)[:4])
        raise CheckpointError(f"belongs to no model of this library; its {len(weights)} names begin with {first}")
    nearest = [name for name, distance in distances.items() if distance == min(distances.values())]
    if len(nearest) > 1:
        raise CheckpointError(f"fits {' and '.join(nearest)} alike; say which")
    return nearest[0]


def convert(
    weights: Mapping[str, Tensor], model: str | None = None, img_size: tuple[int, int] | None = None
) -> Converted:
    """``weights`` (see :func:`backbones.weights.files.read`) in our layout, held against the architecture in full.

    Another number of classes or channels, another image size of a plain model, a missing class token, classifier or
    second classifier become arguments of the model. Of a detector the backbone stays; the norm of its last output is
    the final norm of a hierarchical model.

    Args:
        weights: names and tensors, in the official layout or in ours.
        model: registered name; None finds it.
        img_size: height and width of the images that the weights were made for; None where the weights tell, or
            where it is a square.

    Raises:
        CheckpointError: no model is recognised, or names, shapes or values do not fit; every one is named.
    """
    name = model or identify(weights)
    inside, reference = loading.inside_backbone(weights), _on_meta(name)
    if img_size is not None and not hasattr(reference, "pos_embed"):
        raise CheckpointError(f"img_size: got {img_size}, but {name} has no position embedding")
    backbone = Weights(weights, getattr(weights, "grids", grids_of(weights))).renamed(inside)
    tensors, by_rule = rules.convert(backbone, reference.key_rules)
    tensors, norms = _without_output_norms(tensors, reference)
    ours = Weights(tensors, backbone.grids)
    arguments = _arguments(ours, reference, img_size)
    built = cast(Any, timm.create_model(name, device="meta", **_but_features(arguments)))
    headless = "features_only" in arguments
    try:
        if "pos_embed" in ours and img_size is not None:
            if ours.grids.get("pos_embed", built.grid_size) != built.grid_size:
                raise CheckpointError(f"img_size: got {img_size}, but the file tells {ours.grids['pos_embed']} patches")
            ours.grids["pos_embed"] = built.grid_size
        loading.check(ours, built, loading.absent_head(ours, reference, reference.pretrained_cfg) if headless else ())
    except CheckpointError as error:
        raise CheckpointError(f"held against {name}, {error}") from None
    around = sorted(weights.keys() - set(inside.values()))
    return Converted(name, arguments, ours, (*(inside[x] for x in (*by_rule, *norms)), *around))


def _but_features(arguments: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in arguments.items() if name != "features_only"}


@cache
def _on_meta(name: str) -> Any:
    return timm.create_model(name, device="meta")


@cache
def _expected(name: str) -> set[tuple[str, tuple[int, ...]]]:
    return _shapes(_on_meta(name).state_dict())


def _shapes(weights: Mapping[str, Tensor]) -> set[tuple[str, tuple[int, ...]]]:
    return {(name, tuple(x.shape)) for name, x in weights.items()}


def _without_output_norms(weights: Mapping[str, Tensor], model: nn.Module) -> tuple[dict[str, Tensor], list[str]]:
    """Leaves out the norms of a dense backbone's outputs, but for the one that is the model's own final norm."""
    expected, backbone = model.state_dict(), cast(Any, model)
    last = str(len(backbone.feature_info) - 1)
    hierarchical = isinstance(model, HierarchicalBackbone)
    kept: dict[str, Tensor] = {}
    dropped = []
    for name, x in weights.items():
        match = None if name in expected else _BEHIND_OUTPUT.fullmatch(rules.rename(name, backbone.dense_rules))
        if match is None:
            kept[name] = x
            continue
        final = next((own for own in (f"norm.{match[2]}", f"head.norm.{match[2]}") if own in expected), "")
        if hierarchical and match[1] == last and final and final not in weights:
            kept[final] = x
        else:
            dropped.append(name)
    return kept, dropped


def _arguments(weights: Weights, model: Any, img_size: tuple[int, int] | None) -> dict[str, Any]:
    """Arguments of a model that takes these weights."""
    cfg, own = model.pretrained_cfg, model.state_dict()
    arguments: dict[str, Any] = {}
    first, *more = loading.as_tuple(cfg["classifier"])
    classifier = f"{first}.weight"
    if classifier not in weights:
        lacking = {*loading.absent_head(weights, model, cfg)} - {*loading.absent_head(own, model, cfg), first, *more}
        arguments |= {"features_only": True} if lacking else {"num_classes": 0}
    elif weights[classifier].dim() == 2 and len(weights[classifier]) != len(own[classifier]):
        arguments["num_classes"] = len(weights[classifier])
    if classifier in weights and more and f"{more[0]}.weight" not in weights:
        arguments["distillation"] = False
    stem = f"{loading.as_tuple(cfg['first_conv'])[0]}.weight"
    if stem in weights and weights[stem].dim() == 4 and weights[stem].shape[1] != own[stem].shape[1]:
        arguments["in_chans"] = weights[stem].shape[1]
    if "cls_token" in own and "cls_token" not in weights:
        arguments |= {"class_token": False, "global_pool": "avg"}
    pos_embed = weights.get("pos_embed")
    if "pos_embed" in own and pos_embed is not None and pos_embed.dim() == 3:
        height, width = img_size or _image_size(weights, model)
        if (height, width) != tuple(model.img_size):
            arguments["img_size"] = height if height == width else (height, width)
    return arguments


def _image_size(weights: Weights, model: Any) -> tuple[int, int]:
    """Height and width in pixels that a plain model's position embedding is made for."""
    patches = weights["pos_embed"].shape[1] - ("cls_token" in weights)
    grid = weights.grids.get("pos_embed") or (model.source_grid(patches) if patches > 0 else model.grid_size)
    if grid == model.grid_size:
        return model.img_size
    height, width = ((n - 1) * model.patch_embed.stride + model.patch_embed.patch_size for n in grid)
    return height, width


def load_call(converted: Converted, path: str) -> str:
    """The Python expression that loads the converted file."""
    more: Sequence[str] = [f", {name}={value!r}" for name, value in converted.arguments.items()]
    return (
        f'timm.create_model("{converted.model}", pretrained=True, pretrained_cfg_overlay=dict(file="{path}")'
        f"{''.join(more)})"
    )
